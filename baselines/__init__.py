"""The methods that the paper compares EfficientAD with, one file a paper, beside the core.

Each is a `Method`: a `Predictor` that fits, saves and loads itself, so that it is evaluated, timed
and shown as EfficientAD is. `effad benchmark --methods all` fits them.
"""
