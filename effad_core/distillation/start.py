"""What a distillation begins from: the weights of a teacher that was distilled before.

A short schedule goes further from there than from random weights. The teacher may have another
number of channels, or be a small one from which a medium one begins.
"""

from collections.abc import Mapping

from effad_core.networks import PatchDescriptionNetwork

import torch
from torch import Tensor

SHIFT = 8.0  # standard deviations of a feature; hardly any output lies further below its mean


def starting_weights(
    weights: Mapping[str, Tensor], teacher: PatchDescriptionNetwork
) -> dict[str, Tensor]:
    """A known teacher's weights, fitted to a new teacher.

    Args:
        weights: of a PDN-S or PDN-M with any number of channels.
        teacher: the new one, with random weights, which is left as it is.

    Returns:
        A state dict for it: the known weights; `widened` if they are a PDN-S's and the new teacher
        is a PDN-M; the new teacher's own random weights where its number of channels differs.
    """
    own = teacher.state_dict()
    if teacher.size == "medium" and "8.weight" in weights and "10.weight" not in weights:
        channels = len(weights["8.weight"])
        small = PatchDescriptionNetwork("small", channels).state_dict()
        if {n: w.shape for n, w in weights.items()} == {n: w.shape for n, w in small.items()}:
            weights = widened(weights, PatchDescriptionNetwork("medium", channels))
    return {
        name: own[name] if name in own and own[name].shape != value.shape else value
        for name, value in weights.items()
    }


def widened(small: Mapping[str, Tensor], medium: PatchDescriptionNetwork) -> dict[str, Tensor]:
    """The weights of a PDN-M whose output is that of a PDN-S.

    The first channels of its layers are those of the PDN-S, and the others reach no output yet:
    the weights that lead away from them are 0, those that lead to them stay random, so that they
    learn. Conv-3, which a PDN-S does not have, passes its input on. So does Conv-6; the ReLU in
    front of it would cut negative outputs off, so Conv-5 adds `SHIFT` and Conv-6 subtracts it.

    Args:
        small: the state dict of a PDN-S.
        medium: a PDN-M with random weights and as many output channels.
    """
    new = {name: value.clone() for name, value in medium.state_dict().items()}
    for known, layer in (("0", "0"), ("3", "3"), ("6", "8"), ("8", "10")):
        weight, bias = small[f"{known}.weight"].float(), small[f"{known}.bias"].float()
        outputs, inputs = weight.shape[:2]
        new[f"{layer}.weight"][:outputs] = 0
        new[f"{layer}.weight"][:outputs, :inputs] = weight
        new[f"{layer}.bias"][:outputs] = bias
    passed = len(small["3.bias"])  # what Conv-3 passes on
    for layer, count in (("6", passed), ("12", len(small["8.bias"]))):
        new[f"{layer}.weight"][:count] = 0
        new[f"{layer}.weight"][:count, :count, 0, 0] = torch.eye(count)
        new[f"{layer}.bias"][:count] = 0
    new["10.bias"] += SHIFT
    new["12.bias"] -= SHIFT
    return new
