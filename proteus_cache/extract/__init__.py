"""Stage 1: images, views, teacher and codec meet, and a cache comes out.

`planning` decides everything once and publishes the manifest, `rendering` makes views in worker processes,
`pipeline` runs the teacher over them and commits units, `run` joins these for one or several processes.
"""
