"""A run is a folder: config.json, log.csv and a checkpoint from which training resumes exactly.

Every file is written beside its place and then moved there, so an interrupted run never leaves a
half-written one. Checkpoints are safetensors: nothing is ever unpickled.
"""

import csv
import json
import os
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class RunError(ValueError):
    """A run's folder or one of its files cannot be used; the message names it and the remedy."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping) -> None:
    """Write a safetensors file with a JSON header, atomically (the old one stays until the end)."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _replace(path, lambda part: save_file(contiguous, part, metadata={"effad": json.dumps(header)}))


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the JSON header of a file that `write_tensors` wrote.

    Args:
        path: a safetensors file.
        kind: what its header must say it is, for example "detector".

    Raises:
        RunError: for a missing, truncated or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path} does not exist; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("effad", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise RunError(
            f"{path} is not a whole safetensors file ({error}); copy it again or train again"
        ) from None
    if not isinstance(header, dict) or header.get("kind") != kind:
        raise RunError(f"{path} is a safetensors file, but not a {kind} that effad_core wrote")
    return tensors, header


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Load weights whose names and shapes must match the module's, all or nothing.

    Raises:
        RunError: naming the file and the first difference; the module is then unchanged.
    """
    expected = module.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights or name not in expected:
            which = "lacks" if name not in weights else "has in addition"
            raise RunError(f"{path} is of another architecture: it {which} {name!r}")
        if weights[name].shape != expected[name].shape:
            raise RunError(
                f"{path} is of another architecture: {name!r} has shape "
                f"{tuple(weights[name].shape)}, expected {tuple(expected[name].shape)}"
            )
    module.load_state_dict(weights)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits that change with any bit of the tensors."""
    digest = sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class Run:
    """Log, configuration and checkpoint of one training, in `folder` (or nowhere, if None).

    Args:
        folder: created if it does not exist.
        config: JSON-able settings that a resumed run must share.
        modules: the modules that are trained, by name.
        optimizers: their optimizers, by name.
        save_seconds: time between checkpoints.
        writes: False in the second and further processes of one training: they only resume.

    Raises:
        RunError: if the folder holds a run with other settings.
    """

    CHECKPOINT, CONFIG, LOG = "checkpoint.safetensors", "config.json", "log.csv"

    def __init__(
        self,
        folder: str | Path | None,
        config: dict,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        save_seconds: float = 120,
        writes: bool = True,
    ):
        self.folder = None if folder is None else Path(folder)
        self.config = json.loads(json.dumps(config))
        self.modules, self.optimizers, self.save_seconds = modules, optimizers, save_seconds
        self.writes = writes and self.folder is not None
        self._last_save, self._rows = time.monotonic(), []
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> tuple[int, dict[str, float]]:
        """Load the folder's checkpoint, if there is one.

        Returns:
            The iterations already done and the last row of the log, (0, {}) for a new run.
        """
        if self.folder is None:
            return 0, {}
        path = self.folder / self.CHECKPOINT
        if not path.exists():
            if self.writes:
                write_text(self.folder / self.CONFIG, json.dumps(self.config, indent=2) + "\n")
                (self.folder / self.LOG).unlink(missing_ok=True)
            return 0, {}
        tensors, header = read_tensors(path, "checkpoint")
        if not header.keys() >= {"config", "iteration"}:
            raise RunError(f"{path} has a damaged header; delete {self.folder} and train again")
        for key in sorted(self.config.keys() | header["config"].keys()):
            old, new = header["config"].get(key), self.config.get(key)
            if old != new:
                raise RunError(
                    f"{self.folder} holds a run with other settings ({key}: {old!r}, now {new!r}); "
                    "choose another run_dir, or delete that folder"
                )
        for name, module in self.modules.items():
            load_weights(module, _without_prefix(tensors, f"{name}."), path)
        for name, optimizer in self.optimizers.items():
            state = optimizer.state_dict()
            for entry, value in _without_prefix(tensors, f"{name}.").items():
                index, key = entry.split(".")
                state["state"].setdefault(int(index), {})[key] = value
            optimizer.load_state_dict(state)
        return header["iteration"], self._truncate_log(header["iteration"])

    def log(self, row: Mapping[str, float]) -> None:
        """Keep one row for log.csv; it reaches the disk with the next checkpoint or flush."""
        self._rows.append(dict(row))

    def after(self, iteration: int, last: bool) -> None:
        """Call after each iteration: saves a checkpoint when it is time to, and at the last one."""
        if last or time.monotonic() - self._last_save >= self.save_seconds:
            self.save(iteration)

    def save(self, iteration: int) -> None:
        """Write the log so far, then the checkpoint after `iteration` iterations."""
        if not self.writes:
            return
        self._flush_log()
        tensors = {
            f"{name}.{key}": value
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        for name, optimizer in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{key}": value for key, value in state.items()}
        header = {"kind": "checkpoint", "iteration": iteration, "config": self.config}
        write_tensors(self.folder / self.CHECKPOINT, tensors, header)
        self._last_save = time.monotonic()

    def _flush_log(self) -> None:
        path = self.folder / self.LOG
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self._rows[0].keys() if self._rows else [])
            if self._rows and file.tell() == 0:
                writer.writeheader()
            writer.writerows(self._rows)
        self._rows = []

    def _truncate_log(self, iteration: int) -> dict[str, float]:
        """Drop rows written after the last checkpoint; returns the last row kept."""
        path = self.folder / self.LOG
        text = path.read_text() if path.exists() else ""
        if not text:  # no row was due before the checkpoint
            return {}
        header, *lines = text.splitlines()
        names = header.split(",")
        rows = [line.split(",") for line in lines]
        rows = [row for row in rows if len(row) == len(names) and int(row[0]) <= iteration]
        if self.writes:
            write_text(path, "\n".join([header, *(",".join(row) for row in rows)]) + "\n")
        if not rows:
            return {}
        return {
            name: int(value) if name == names[0] else float(value)
            for name, value in zip(names, rows[-1], strict=True)
        }


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    _replace(path, lambda part: part.write_text(text))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
