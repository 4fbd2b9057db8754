"""The same results in less time. Nothing here is part of the paper.

* `precision`: in which number format to compute, measured on this machine
* `winograd`, `shortcuts`: faster convolutions and dropout on a CPU
* `devices`, `threads`, `memory`: which device, how many threads, memory that is kept
"""
