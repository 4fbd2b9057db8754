"""A trained detector at work.

* `own_images`: the commands `effad train`, `effad threshold` and `effad export`
* `inspection`: verdicts on a folder of images, and the command `effad predict`; `overlays`: its
  pictures
* `prepared`: fast inference; `onnx`: a file for machines without PyTorch
"""
