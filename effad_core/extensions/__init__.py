"""What is not in EfficientAD's paper, each by the name of its own paper, and off unless you ask.

* `puad`: how unusual an image is as a whole, added to the anomaly score
"""
