"""How good frozen features are: students, their averages, teacher and untrained student on labelled images.

`evaluate.evaluate` is the door. Models meet pixels in `features.py`, features meet labels in `knn.py`.
"""
