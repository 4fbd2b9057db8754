"""A run is a folder: config.json, log.csv and a checkpoint from which training resumes exactly.

Every file is written beside its place and then moved there, so an interrupted run never leaves a
half-written one. Checkpoints are safetensors: nothing is ever unpickled.
"""

import errno
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from effad_core import files

MAX_HEADER = 2**22  # bytes; a detector's are some 20 000
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class RunError(ValueError):
    """A run's folder or one of its files cannot be used; the message names it and the remedy."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping) -> None:
    """Write a safetensors file with a JSON header, atomically (the old one stays until the end).

    Raises:
        RunError: if it cannot be written.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(part: Path) -> None:
        try:
            save_file(contiguous, part, metadata={"effad": json.dumps(header)})
        except SafetensorError as error:  # "... No space left on device (os error 28)"
            code = re.search(r"os error (\d+)", str(error))
            raise OSError(int(code[1]) if code else errno.EIO, one_line(error)) from None

    write_file(path, write)


def read_tensors(path: str | Path, kind: str, **entries: type) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the JSON header of a file that `write_tensors` wrote.

    Args:
        path: a safetensors file.
        kind: what its header must say it is, for example "detector".
        entries: what else the header must hold, and of which type each is.

    Raises:
        RunError: for a missing, truncated or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path} does not exist; check the path")
    try:
        _check_length(path)
        with safe_open(path, framework="pt") as file:
            header = _parsed((file.metadata() or {}).get("effad", "null"))
            if not isinstance(header, dict) or header.get("kind") != kind:
                raise RunError(
                    f"{path} is a safetensors file, but not a {kind} that effad_core wrote"
                )
            for name, wanted in entries.items():
                if type(header.get(name)) is not wanted:
                    raise RunError(
                        f"{path} has a damaged header: {name!r} is missing or no "
                        f"{wanted.__name__}; copy it again or train again"
                    )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except RunError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"{path} is not a whole safetensors file ({one_line(error)}); "
            "copy it again or train again"
        ) from None
    return tensors, header


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


def one_line(error: object) -> str:
    """What an error says, on one line and at most 200 characters long: it may quote the file."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:197]}..."


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
        path: where they come from, for the sentence.
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
        path: where they come from, for the sentence.

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


@contextmanager
def alone(path: Path, lock: Path, choice: str) -> Iterator[None]:
    """No other process, and no other call in this one, writes `path` while the block runs.

    Args:
        path: a folder or a file, for the sentence.
        lock: the file that stands for it; its folder is created.
        choice: the argument or option that names another.

    Raises:
        RunError: if another does, or nothing can be written there.
    """
    with ExitStack() as held:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(files.locked(lock))
        except BlockingIOError:
            raise RunError(
                f"{path} is in use by another run: wait for its end, or choose another {choice}"
            ) from None
        except OSError as error:
            raise RunError(
                f"{path} cannot be written: {files.reason(error)}, or choose another {choice}"
            ) from None
        yield


class Run:
    """Log, configuration and checkpoint of one training, in `folder` (or nowhere, if None).

    A context manager: inside its block no other run may use the folder, and Ctrl-C lets the
    iteration in progress end and be saved (a second Ctrl-C does not).

    Args:
        folder: created if it does not exist.
        config: JSON-able settings that a resumed run must share.
        modules: the modules that are trained, by name.
        optimizers: their optimizers, by name.
        save_seconds: time between checkpoints.
        writes: False in the second and further processes of one training: they only resume.

    Attributes:
        window: JSON-able values of the iterations since the last row of the log, which the next
            row sums up; a checkpoint holds them too. To be appended to, and cleared, in place.
    """

    CHECKPOINT, CONFIG, LOG, LOCK = "checkpoint.safetensors", "config.json", "log.csv", ".lock"
    HISTORY = "history"  # log and window, a tensor of a checkpoint: headers must stay short

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
        self.window: list = []
        self._last_save, self._log, self._held = time.monotonic(), "", ExitStack()
        self._in_step = self._interrupted = False

    def __enter__(self) -> "Run":
        """Take the folder.

        Raises:
            RunError: if another run has it, or it cannot be written.
        """
        if not self.writes:
            return self
        self._held.enter_context(alone(self.folder, self.folder / self.LOCK, "run_dir"))
        files.remove_parts(self.folder)
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)
            self._held.callback(signal.signal, signal.SIGINT, signal.default_int_handler)
        return self

    def __exit__(self, *_) -> None:
        self._held.close()

    def _interrupt(self, *_) -> None:
        """On Ctrl-C: at once, but `after` the iteration if one is in progress."""
        if not self._in_step or self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True

    def resume(self) -> tuple[int, dict[str, float]]:
        """Load the folder's checkpoint, if there is one.

        Returns:
            The iterations already done and the last row of the log, (0, {}) for a new run.

        Raises:
            RunError: if the folder holds a damaged run, or one with other settings.
        """
        if self.folder is None:
            return 0, {}
        path = self.folder / self.CHECKPOINT
        if not path.exists():
            if self.writes:
                write_text(self.folder / self.CONFIG, json.dumps(self.config, indent=2) + "\n")
                (self.folder / self.LOG).unlink(missing_ok=True)
            return 0, {}
        tensors, header = read_tensors(path, "checkpoint", config=dict, iteration=int)
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
            load_state(optimizer, _without_prefix(tensors, f"{name}."), path)
        if self.HISTORY in tensors:
            self._log, self.window[:] = _history(tensors[self.HISTORY], path)
        else:  # a checkpoint of before they were part of it
            self._log = self._log_until(header["iteration"])
        if self.writes and self._log:  # it may hold rows of after the checkpoint, or half of one
            write_text(self.folder / self.LOG, self._log)
        return header["iteration"], self._last_row()

    def log(self, row: Mapping[str, float]) -> None:
        """Append a row to log.csv; it reaches the disk with the next checkpoint."""
        if not self._log:
            self._log = ",".join(row) + "\n"
        self._log += ",".join(str(value) for value in row.values()) + "\n"

    def after(self, iteration: int, last: bool) -> None:
        """Call after each iteration: saves a checkpoint when it is time to, and at the last one.

        Raises:
            KeyboardInterrupt: if Ctrl-C was pressed during the iteration, which is saved then.
        """
        due = time.monotonic() - self._last_save >= self.save_seconds
        if last or due or self._interrupted:
            self.save(iteration)
        self._in_step = not last
        if self._interrupted:
            raise KeyboardInterrupt(f"{iteration} iterations are in {self.folder}")

    def save(self, iteration: int) -> None:
        """Write the log so far, then the checkpoint after `iteration` iterations."""
        if not self.writes:
            return
        tensors = {
            f"{name}.{key}": value
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        for name, optimizer in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{key}": value for key, value in state.items()}
        history = json.dumps({"log": self._log, "window": self.window}).encode()
        tensors[self.HISTORY] = torch.frombuffer(bytearray(history), dtype=torch.uint8)
        header = {"kind": "checkpoint", "iteration": iteration, "config": self.config}
        write_tensors(self.folder / self.CHECKPOINT, tensors, header)
        if self._log:
            write_text(self.folder / self.LOG, self._log)
        self._last_save = time.monotonic()

    def _log_until(self, iteration: int) -> str:
        """What log.csv says of the first iterations, in whole rows."""
        path = self.folder / self.LOG
        text = path.read_text(errors="replace") if path.exists() else ""
        header, *lines = text.splitlines(keepends=True) or [""]
        return header + "".join(
            line
            for line in lines
            if line.endswith("\n") and line.count(",") == header.count(",")
            if (step := line.split(",")[0]).isdecimal() and int(step) <= iteration
        )

    def _last_row(self) -> dict[str, float]:
        names, *rows = (line.split(",") for line in self._log.splitlines() or [""])
        if not rows:
            return {}
        return {
            name: int(value) if name == names[0] else float(value)
            for name, value in zip(names, rows[-1], strict=True)
        }


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        RunError: if it cannot be written.
    """
    write_file(path, lambda part: part.write_text(text, encoding="utf-8", newline="\n"))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file beside `path`, then move it there.

    Raises:
        RunError: if it cannot be written; `path` is then what it was.
    """
    try:
        files.replace(path, write)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {files.reason(error)}, and the same command goes on from "
            "what it held before, which is kept"
        ) from None


def _history(tensor: Tensor, path: Path) -> tuple[str, list]:
    """The log and the window that a checkpoint holds."""
    try:
        history = json.loads(tensor.numpy().tobytes())
        log, window = history["log"], history["window"]
        if isinstance(log, str) and isinstance(window, list):
            return log, window
    except (ValueError, TypeError, KeyError):
        pass
    raise RunError(
        f"{path} has a damaged history; copy it again, or delete its folder and train again"
    )


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
