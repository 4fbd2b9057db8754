"""What a distillation begins from: the weights of a teacher that was distilled before.

A short schedule goes further from there than from random weights. The teacher may have another
number of channels, or be a small one from which a medium one begins.
"""

from collections.abc import Mapping
from pathlib import Path

from effad_core.errors import RunError
from effad_core.networks import PatchDescriptionNetwork

import torch
from torch import Tensor

SHIFT = 8.0  # standard deviations of a feature; hardly any output lies further below its mean


def starting_weights(
    weights: Mapping[str, Tensor], teacher: PatchDescriptionNetwork, path: str | Path
) -> dict[str, Tensor]:
    """A known teacher's weights, fitted to a new teacher.

    Args:
        weights: of a PDN-S or PDN-M with any number of channels.
        teacher: the new one, with random weights, which is left as it is.
        path: where the weights come from, for the error message.

    Returns:
        A state dict for it: the known weights; `widened` if they are a PDN-S's and the new teacher
        is a PDN-M; the new teacher's own random weights where the number of channels, if it
        differs, gives them another shape. Weights of any other network are returned as they are,
        and `load_weights` will refuse them.

    Raises:
        RunError: if the weights are a PDN-M's and the new teacher is a PDN-S.
    """
    if teacher.size == "small" and _are_of("medium", weights):
        raise RunError(
            f"{path} is a medium teacher, from which a small one cannot begin: give --size medium, "
            "or the path of a small teacher"
        )
    if teacher.size == "medium" and _are_of("small", weights):
        weights = widened(weights, PatchDescriptionNetwork("medium", len(weights["8.bias"])))
    if not _are_of(teacher.size, weights):
        return dict(weights)
    own = teacher.state_dict()
    return {
        name: value if value.shape == own[name].shape else own[name]
        for name, value in weights.items()
    }


def _are_of(size: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether weights have the names and shapes of a PDN with any number of channels."""
    bias = weights.get({"small": "8.bias", "medium": "12.bias"}[size])
    if bias is None or bias.ndim != 1 or not len(bias):
        return False
    with torch.device("meta"):  # shapes alone
        known = PatchDescriptionNetwork(size, len(bias)).state_dict()
    shapes = [{name: value.shape for name, value in part.items()} for part in (weights, known)]
    return shapes[0] == shapes[1]


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
