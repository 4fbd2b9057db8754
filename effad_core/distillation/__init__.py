"""Algorithm 3: distil a pretrained extractor into the teacher, and check that it suits your images.

* `algorithm`: the loop, and the command `effad distill`; `schedule`: how long it runs
* `pairs`: its training batches; `extractors`: Psi; `backbones`: the pretrained networks behind it
* `start`: a known teacher to begin from; `muon`: an optimiser for short runs
* `distributed`: several processes, started by torchrun
* `teacher_check`: does a teacher suit your images?
"""
