"""The optimiser of the short distillation schedules."""

from collections.abc import Sequence

from effad_core.acceleration.precision import Instead

import torch
from torch import Tensor, nn


class KernelMuon(torch.optim.Muon):
    """torch.optim.Muon, which takes matrices, on convolution kernels in channels_last format.

    A kernel is a matrix of C_out rows; here one row is the kernel as it lies in memory, so that the
    matrix shares it. Rates are scaled so that a step is as large as one of Adam's.

    torch makes the step's matrix orthogonal in bfloat16. Here that happens in float32: a CPU
    without instructions for bfloat16 takes about fifty times as long in it.

    Raises:
        ValueError: for kernels in another format, whose matrix would be a copy.
    """

    def __init__(self, kernels: Sequence[nn.Parameter], lr: float, weight_decay: float):
        self.kernels = tuple(kernels)
        matrices = [nn.Parameter(_matrix(kernel.data)) for kernel in self.kernels]
        if any(m.data_ptr() != k.data_ptr() for m, k in zip(matrices, self.kernels, strict=True)):
            raise ValueError(
                "Muon needs kernels in channels_last format: convert the network first"
            )
        super().__init__(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw")

    def step(self, closure=None):
        matrices = self.param_groups[0]["params"]
        for matrix, kernel in zip(matrices, self.kernels, strict=True):
            matrix.grad = _matrix(kernel.grad)
        with Instead({Tensor.bfloat16: Tensor.clone}):
            return super().step(closure)


def _matrix(kernel: Tensor) -> Tensor:
    """Shape (C_out, kh * kw * C_in); of a channels_last kernel it is a view."""
    return kernel.permute(0, 2, 3, 1).flatten(1)
