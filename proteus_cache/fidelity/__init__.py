"""How much of the teacher a codec keeps: stored targets against exact ones, on held-out views.

`run.measure_fidelity` is the door. `sides` reads caches and packs alike, `sample` chooses views and proves that both
sides hold the same ones, `stream` measures, `verdict` judges, `curve` compares codecs; `report`, `table` and `plot`
show what was found.
"""
