"""Draws the parts tray: an inspection camera's view, normal or with one anomaly and its masks.

* `scene`: which parts lie where, and what is wrong; `parts`: nuts, washers, screws, cables
* `light`: shapes, shadows, noise; `damage`: structural anomalies

`effad_core.datasets.tray` writes the images as a dataset and says what is normal.
"""
