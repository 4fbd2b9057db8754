"""The methods that the paper compares EfficientAD with, one file a paper, beside the core.

Each is a `Predictor` with `fit(scenario)`, so that it is evaluated as EfficientAD is.
"""
