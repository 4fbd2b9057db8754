"""Teachers in files: those that `distill` wrote, and those that other implementations published.

Others keep a state dict, by the layers' numbers (nelson1425/EfficientAD: 0, 3, 6, 8) or by names
(anomalib and others: conv1 to conv4), as .pth, .pt or .safetensors.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from effad_core.errors import RunError
from effad_core.storage.files import as_path, one_line
from effad_core.storage.weights import fingerprint, read_tensors

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn


def read_teacher(path: str | Path, layers: nn.Sequential) -> tuple[dict[str, Tensor], dict]:
    """The weights of a teacher in a file, by our names, and its card.

    Args:
        path: a teacher that `distill` wrote, or the state dict of another implementation.
        layers: a patch description network of the size that is expected.

    Returns:
        The weights, of any number of channels, and the card: the teacher's provenance, JSON-able.
        Of another implementation's file that is the file's name and a fingerprint of its weights.

    Raises:
        RunError: if the file is missing, damaged, or of another size.
    """
    path = as_path(path)
    if path.is_file() and not _is_own(path):
        weights = _renamed(read_state_dict(path), layers, path)
        return weights, {
            "file": path.name,
            "weights": fingerprint(weights),
            "format": "a state dict",
        }
    weights, header = read_tensors(path, "teacher", card=dict)
    return weights, header["card"]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a state dict, saved by torch or as safetensors, by name.

    Raises:
        RunError: if the file is missing or cannot be read; nothing but tensors is unpickled.
    """
    path = as_path(path)
    if not path.is_file():
        raise RunError(f"{path} does not exist; check the path of the weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {str(name): tensor for name, tensor in state.items()}
    except Exception as error:  # every format and every damage raises its own type
        raise RunError(
            f"{path} cannot be read as weights (a state dict saved by torch or as safetensors); "
            "download or save it again"
        ) from error


def _is_own(path: Path) -> bool:
    """Whether `read_tensors` is the one to read it, or to say what is wrong with it."""
    if path.suffix in (".pth", ".pt"):
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return "effad" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return True


def _renamed(state: Mapping[str, Tensor], network: nn.Sequential, path: Path) -> dict[str, Tensor]:
    """The state dict of another implementation by this teacher's names."""
    layers = [str(i) for i, layer in enumerate(network) if isinstance(layer, nn.Conv2d)]
    names = {f"conv{number}": layer for number, layer in enumerate(layers, start=1)}
    names |= {layer: layer for layer in layers}
    found = {}
    for name, value in state.items():
        match = re.fullmatch(r"(?:.*\.)?(\w+)\.(weight|bias)", name)
        if match is None or match[1] not in names or not isinstance(value, Tensor):
            break
        found[f"{names[match[1]]}.{match[2]}"] = value
    if len(found) == len(state) == 2 * len(layers):
        return found
    given = ", ".join(sorted(map(str, state))[:4])
    raise RunError(
        f"{path} holds no teacher of this size: expected were weight and bias of the layers "
        f"{', '.join(layers)} or conv1 to conv{len(layers)}, not {one_line(given or 'nothing')}, "
        "...; choose the file or the size that belongs to it"
    )
