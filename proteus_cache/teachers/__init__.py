"""Teachers: a name and weights become a function from uint8 views to named targets.

`registry.load_teacher` is the door; `teacher.Teacher` is what comes out. Nothing here knows of stores.
"""
