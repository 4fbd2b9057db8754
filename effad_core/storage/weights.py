"""Weights in files: everything is checked before it is loaded into a network.

Files are safetensors with a JSON header: nothing is ever unpickled.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from effad_core.errors import RunError
from effad_core.storage.files import as_path, one_line, write_file

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

MAX_HEADER = 2**22  # bytes; a detector's are some 20 000
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping) -> None:
    """Write a safetensors file with a JSON header, atomically (the old one stays until the end).

    Raises:
        RunError: if it cannot be written.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(contiguous, metadata={"effad": json.dumps(header)})
    write_file(path, lambda part: part.write_bytes(content))  # save_file leaves .tmp* if killed


def read_tensors(path: str | Path, kind: str, **entries: type) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the JSON header of a file that `write_tensors` wrote.

    Args:
        path: a safetensors file.
        kind: what its header must say it is, for example "detector".
        entries: what else the header must hold, and of which type each is.

    Raises:
        RunError: for a missing, truncated or foreign file.
    """
    path = as_path(path)
    with _opened(path) as (file, header):
        if not isinstance(header, dict) or header.get("kind") != kind:
            raise RunError(f"{path} is a safetensors file, but not a {kind} that effad_core wrote")
        for name, wanted in entries.items():
            if type(header.get(name)) is not wanted:
                raise RunError(
                    f"{path} has a damaged header: {name!r} is missing or no "
                    f"{wanted.__name__}; copy it again or train again"
                )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors, header


def header_of(path: str | Path) -> dict:
    """The JSON header of a file that `write_tensors` wrote; {} of another safetensors file.

    Raises:
        RunError: for a missing or truncated file.
    """
    with _opened(as_path(path)) as (_, header):
        return header if isinstance(header, dict) else {}


@contextmanager
def _opened(path: Path) -> Iterator[tuple[safe_open, object]]:
    """A safetensors file and the JSON in its header; RunError if it is missing or not whole."""
    if not path.is_file():
        raise RunError(f"{path} does not exist; check the path")
    try:
        _check_length(path)
        with safe_open(path, framework="pt") as file:
            yield file, _parsed((file.metadata() or {}).get("effad", "null"))
    except RunError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"{path} is not a whole safetensors file ({one_line(error)}); "
            "copy it again or train again"
        ) from None


def _check_length(path: Path) -> None:
    """Refuse a header that is no JSON of ours before anything as large as it claims is built."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError(f"a header of {length} bytes, more than the {MAX_HEADER} of any run")
        _parsed(file.read(length).decode())  # safetensors takes the last of two equal names


def _parsed(text: str) -> object:
    """JSON whose objects name everything once; ValueError or RecursionError for any other."""

    def once(pairs: list[tuple[str, object]]) -> dict:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a name that comes twice")
        return found

    return json.loads(text, object_pairs_hook=once)


def load_weights(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    path: str | Path,
    may_be_nan: Collection[str] = (),
) -> None:
    """Load weights whose names and shapes must match the module's, all or nothing.

    Floating-point formats of 16, 32 and 64 bits become the module's own. Everything must be finite
    in it.

    Args:
        module: receives them.
        weights: by name.
        path: where they come from, for the error message.
        may_be_nan: names of tensors whose values may not have been found yet.

    Raises:
        RunError: naming the file and the first difference; the module is then unchanged.
    """
    expected = module.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights or name not in expected:
            which = "lacks" if name not in weights else "has in addition"
            raise RunError(f"{path} is of another architecture: it {which} {one_line(repr(name))}")
        value, wanted = weights[name], expected[name]
        if value.shape != wanted.shape:
            raise RunError(
                f"{path} is of another architecture: {name!r} has shape "
                f"{one_line(tuple(value.shape))}, expected {tuple(wanted.shape)}"
            )
        if value.dtype not in (FLOATS if wanted.dtype in FLOATS else (wanted.dtype,)):
            raise RunError(
                f"{path} is of another architecture: {name!r} holds {value.dtype}, "
                f"expected {wanted.dtype}"
            )
        if name not in may_be_nan and not torch.isfinite(value.to(wanted.dtype)).all():
            raise RunError(
                f"{path} holds NaN or infinite values in {name!r}; copy it again or train again"
            )
    module.load_state_dict(weights)


def load_state(
    optimizer: torch.optim.Optimizer, entries: Mapping[str, Tensor], path: str | Path
) -> None:
    """Load the state of an optimizer: finite numbers or tensors of the parameters' shapes.

    Args:
        optimizer: receives it.
        entries: by "<number of the parameter>.<name>"; each parameter has all names or none.
        path: where they come from, for the error message.

    Raises:
        RunError: naming the file and the first entry that does not fit.
    """
    state = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for entry, value in entries.items():
        index, _, name = entry.partition(".")
        known = index in map(str, range(len(parameters)))
        if not known or value.shape not in ((), parameters[int(index)].shape):
            problem = "belongs to no parameter"
        elif value.dtype not in FLOATS or not torch.isfinite(value).all():
            problem = "is not finite"
        else:
            if value.shape == parameters[int(index)].shape:
                # a fused optimiser goes through both in the order in which they lie in memory
                value = torch.empty_like(parameters[int(index)]).copy_(value)
            state["state"].setdefault(int(index), {})[name] = value
            continue
        raise RunError(
            f"{path} is of another training: {one_line(repr(entry))} of its optimizer {problem}"
        )
    if len({frozenset(names) for names in state["state"].values()}) > 1:
        raise RunError(f"{path} lacks a part of its optimizer's state; copy it again")
    optimizer.load_state_dict(state)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits that change with any bit of the tensors."""
    digest = sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
