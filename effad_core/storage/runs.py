"""A run is a folder: config.json, log.csv and a checkpoint from which training resumes exactly."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from effad_core.acceleration.precision import PRECISIONS, resolve_precision
from effad_core.errors import RunError
from effad_core.storage import files
from effad_core.storage.digests import Inventory, combined, difference
from effad_core.storage.files import as_path, write_text
from effad_core.storage.weights import load_state, load_weights, read_tensors, write_tensors

import torch
from torch import Tensor, nn

REMEDY = "choose another run_dir (--run-dir or --runs of a command), or delete that folder"


@contextmanager
def alone(path: Path, lock: Path, choice: str) -> Iterator[None]:
    """Lock `path` while the block runs.

    Args:
        path: a folder or a file, for the error message.
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


Watcher = Callable[[Path, int, int], None]
_watchers: list[Watcher] = []


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Call `watcher` after each iteration of a run of this process while the block runs.

    Args:
        watcher: the run's folder, how many iterations are done, and of how many.
    """
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def settled_precision(
    precision: str,
    device: torch.device,
    folder: str | os.PathLike | None,
    size: str = "small",
) -> str:
    """`resolve_precision`, but "auto" stays what the folder's run began with.

    "auto" is timed, and the same machine may be timed differently while it is busy: a run that is
    taken up again would become another one.

    Args:
        precision, device, size: as in `resolve_precision`.
        folder: of the run; its config.json holds the schedule, if the run was begun before.

    Raises:
        ValueError: as `resolve_precision`.
    """
    if precision == "auto" and folder is not None:
        precision = precision_of(folder) or precision
    return resolve_precision(precision, device, "training", size=size)


def precision_of(folder: str | os.PathLike) -> str | None:
    """The precision that the folder's run began with; None if there is no run."""
    try:
        config = json.loads((as_path(folder) / Run.CONFIG).read_text(encoding="utf-8"))
        if config["schedule"]["precision"] in PRECISIONS:
            return config["schedule"]["precision"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass  # there is no run, or it is refused later
    return None


class Run:
    """Log, configuration and checkpoint of one training, in `folder` (or nowhere, if None).

    A context manager: inside its block no other run may use the folder, and Ctrl-C lets the
    iteration in progress end and be saved (a second Ctrl-C does not). Where the signal is ignored,
    as under `nohup`, or has another handler, that stays so: then kill the process, which loses no
    more than the iterations since the last checkpoint.

    Args:
        folder: created if it does not exist.
        config: JSON-able settings that a resumed run must share.
        modules: the modules that are trained, by name.
        optimizers: their optimizers, by name.
        total: iterations until it is finished.
        save_seconds: time between checkpoints.
        writes: False in the second and further processes of one training: they only resume.
        notes: JSON-able facts for config.json which a resumed run need not share.
        images: names and digests of the images of each split whose digest stands in the config's
            entry "digests"; checkpoints hold them, for an error message that says which differ.

    Attributes:
        before_save: is called before a checkpoint is written; what it raises prevents that.
        window: JSON-able values of the iterations since the last row of the log, which the next
            row sums up; a checkpoint holds them too. To be appended to, and cleared, in place.
    """

    CHECKPOINT, CONFIG, LOG, LOCK = "checkpoint.safetensors", "config.json", "log.csv", ".lock"
    HISTORY = "history"  # log and window, a tensor of a checkpoint: headers must stay short
    IMAGES = "images"  # their names and digests, another one

    def __init__(
        self,
        folder: str | Path | None,
        config: dict,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        total: int,
        save_seconds: float = 120,
        writes: bool = True,
        notes: Mapping[str, str] | None = None,
        images: Mapping[str, Inventory] | None = None,
    ):
        self.folder = None if folder is None else as_path(folder)
        self.config = json.loads(json.dumps(config))
        self.images = dict(images or {})
        self.notes = dict(notes or {})
        self.before_save: Callable[[], None] = lambda: None
        self.modules, self.optimizers, self.total = modules, optimizers, total
        self.save_seconds = save_seconds
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
                if not self._is_described():
                    content = json.dumps(self.config | self.notes, indent=2) + "\n"
                    write_text(self.folder / self.CONFIG, content)
                (self.folder / self.LOG).unlink(missing_ok=True)
            return 0, {}
        tensors, header = read_tensors(path, "checkpoint", config=dict, iteration=int)
        self._check_images(header["config"], tensors)
        for key in sorted(self.config.keys() | header["config"].keys()):
            old, new = header["config"].get(key), self.config.get(key)
            if old != new:
                raise RunError(
                    f"{self.folder} holds a run with other settings ({key}: {old!r}, now {new!r}); "
                    f"{REMEDY}"
                )
        iteration = header["iteration"]
        if not 0 <= iteration <= self.total:
            raise RunError(
                f"{path} is damaged: it is of iteration {iteration} of {self.total}; copy it "
                "again, or delete its folder and train again"
            )
        for name, module in self.modules.items():
            load_weights(module, _without_prefix(tensors, f"{name}."), path)
        for name, optimizer in self.optimizers.items():
            load_state(optimizer, _without_prefix(tensors, f"{name}."), path)
        self._log, self.window[:] = _history(tensors, path)
        try:
            row = self._last_row()
        except ValueError:
            raise RunError(
                f"{self.folder} holds a damaged log; delete that folder and train again"
            ) from None
        if self.writes and self._log:  # it may hold rows of after the checkpoint, or half of one
            write_text(self.folder / self.LOG, self._log)
        return iteration, row

    def _check_images(self, config: Mapping, tensors: Mapping[str, Tensor]) -> None:
        """Raise RunError if the checkpoint is of other images, and say which they are."""
        old, new = config.get("digests"), self.config.get("digests")
        if old == new or new is None:  # or `resume` names another setting
            return
        if not isinstance(old, dict):
            raise RunError(
                f"{self.folder} holds a run of an older version, which did not write down the "
                f"content of its images; {REMEDY}"
            )
        other = [split for split in new if old.get(split) != new[split]]
        known = _images(tensors)
        whole = all(combined(known.get(split, ())) == old.get(split) for split in self.images)
        listed = self.images if whole else {}  # else the checkpoint's list is damaged
        what = [f"the {split} images are others" for split in other if split not in listed]
        if any(split in listed for split in other):
            what.insert(0, difference(known, self.images))
        raise RunError(f"{self.folder} holds a run of other images ({'; '.join(what)}); {REMEDY}")

    def _is_described(self) -> bool:
        """Whether config.json is this run's, from a call that ended before its first checkpoint."""
        try:
            found = json.loads((self.folder / self.CONFIG).read_text(encoding="utf-8"))
            return {**found, **self.config} == found and found.keys() >= self.notes.keys()
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return False

    def log(self, row: Mapping[str, float]) -> None:
        """Append a row to log.csv; it reaches the disk with the next checkpoint."""
        if not self._log:
            self._log = ",".join(row) + "\n"
        self._log += ",".join(str(value) for value in row.values()) + "\n"

    def after(self, iteration: int) -> None:
        """Call after each iteration: saves a checkpoint when it is time to, and at the last one.

        Args:
            iteration: how many are done.

        Raises:
            KeyboardInterrupt: if Ctrl-C was pressed during the iteration, which is saved then.
        """
        for watcher in _watchers if self.folder is not None else ():
            watcher(self.folder, iteration, self.total)
        last = iteration == self.total
        due = time.monotonic() - self._last_save >= self.save_seconds
        if last or due or self._interrupted:
            self.save(iteration)
        self._in_step = not last
        if self._interrupted:
            raise KeyboardInterrupt(f"{iteration} iterations are in {self.folder}")

    def save(self, iteration: int) -> None:
        """Write the log so far, then the checkpoint after `iteration` iterations."""
        self.before_save()
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
        if self.images:
            images = bytearray(json.dumps(self.images).encode())
            tensors[self.IMAGES] = torch.frombuffer(images, dtype=torch.uint8)
        header = {"kind": "checkpoint", "iteration": iteration, "config": self.config}
        write_tensors(self.folder / self.CHECKPOINT, tensors, header)
        if self._log:
            write_text(self.folder / self.LOG, self._log)
        self._last_save = time.monotonic()

    def _last_row(self) -> dict[str, float]:
        names, *rows = (line.split(",") for line in self._log.splitlines() or [""])
        if not rows:
            return {}
        return {
            name: int(value) if name == names[0] else float(value)
            for name, value in zip(names, rows[-1], strict=True)
        }


def _history(tensors: Mapping[str, Tensor], path: Path) -> tuple[str, list]:
    """The log and the window that a checkpoint holds."""
    try:
        history = json.loads(tensors[Run.HISTORY].numpy().tobytes())
        log, window = history["log"], history["window"]
        if isinstance(log, str) and isinstance(window, list):
            return log, window
    except (ValueError, TypeError, KeyError):
        pass
    raise RunError(
        f"{path} has a damaged history; copy it again, or delete its folder and train again"
    )


def _images(tensors: Mapping[str, Tensor]) -> dict[str, Inventory]:
    """The names and digests of the images that a checkpoint holds; none if they are damaged."""
    try:
        found = json.loads(tensors[Run.IMAGES].numpy().tobytes())
        return {split: [(str(name), str(d)) for name, d in found[split]] for split in found}
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
