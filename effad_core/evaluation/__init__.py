"""What a detector is worth: the paper's tables, measured here.

* `scores`: a detector over a test split; `benchmark`: scenarios over seeds and methods
* `methods`: EfficientAD, and the methods that other packages register
* `timing`, `costs`: the paper's Tables 11 and 12
* `examples`: which images are shown; `gallery`: `pictures` of them; `comparison`: of many methods
* `evidence`: runs that ship with the package, for the notebooks to show
* `tables`: the tables of a benchmark beside the paper's, as text
"""
