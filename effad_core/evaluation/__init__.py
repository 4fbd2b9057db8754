"""What a detector is worth: the paper's tables, measured here.

* `scores`: a detector over a test split; `benchmark`: scenarios over seeds, and the paper's tables
* `timing`, `costs`: the paper's Tables 11 and 12
* `examples`: which images are shown; `gallery`: pictures of them
* `tables`: rows of cells as text
"""
