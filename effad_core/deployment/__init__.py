"""A trained detector at work.

* `own_images`: the command `effad train`; `products`: several products in one training; `rates`:
  the options --rate and --guarantee
* `thresholding`: the command `effad threshold`
* `inspection`: verdicts on a folder of images, and the command `effad predict`; `streams`: on
  images as they come; `verdicts`, `overlays`: what both write
* `serving`: the command `effad serve`, verdicts over HTTP
* `prepared`: fast inference
* `exporting`: the command `effad export`; `onnx`, `resizing`, `int8`: files for machines without
  PyTorch
"""
