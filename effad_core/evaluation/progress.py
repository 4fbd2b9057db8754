"""What a benchmark says of runs that are under way: done, running, failed, and the time left."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tqdm.auto import tqdm


@dataclass
class Running:
    """One run that is under way.

    Attributes:
        begun: when its first iteration here was reported, in seconds of some clock.
        first: iterations that were done then.
        done, total: iterations now, and of how many.
        now: when `done` was reported.
    """

    begun: float
    first: int
    done: int
    total: int
    now: float

    @property
    def rate(self) -> float:
        """Iterations a second since its first report; 0 before the second one."""
        seconds = self.now - self.begun
        return (self.done - self.first) / seconds if seconds > 0 else 0.0


@dataclass
class Progress:
    """Counts runs; `sentence` says where they are.

    Attributes:
        total: runs in all.
        clock: gives seconds.
        done, failed: runs that have ended.
        running: those under way, by name.
        starts: how often each was begun.

    Example:
        >>> seconds = iter([0, 0, 10, 10])
        >>> progress = Progress(4, clock=lambda: next(seconds))
        >>> progress.begin("bolt"); progress.report("bolt", 0, 40); progress.report("bolt", 20, 40)
        >>> progress.sentence()
        '0 of 4 runs done, 1 running (bolt 20/40, 2.0 it/s), 0 failed, 1 min left'
    """

    total: int
    clock: Callable[[], float] = field(default_factory=lambda: time.monotonic)
    done: int = 0
    failed: int = 0
    running: dict[str, Running | None] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        self._start = self.clock()
        self._before = 0.0  # shares of runs that were there when they were taken up

    def begin(self, name: str, starts: int = 1) -> None:
        """A run has got a worker; one whose worker died begins again."""
        self.running[name] = None
        self.starts[name] = starts

    def report(self, name: str, done: int, total: int) -> None:
        """A run has done so many iterations of so many."""
        now, known = self.clock(), self.running.get(name)
        if known is None or done < known.done:
            if known is None and total:
                self._before += done / total
            self.running[name] = Running(now, done, done, total, now)
        else:
            known.done, known.now = done, now

    def end(self, name: str, failed: bool) -> None:
        """A run has ended."""
        self.running.pop(name, None)
        self.failed += failed
        self.done += not failed

    def seconds_left(self) -> float | None:
        """As much again for each run as one took so far; None before there is anything to go by."""
        shares = sum(r.done / r.total for r in self.running.values() if r and r.total)
        whole = self.done + self.failed + shares
        here = whole - self._before
        if here <= 0:
            return None
        return (self.clock() - self._start) / here * (self.total - whole)

    def sentence(self) -> str:
        """One line."""
        each = "; ".join(
            f"{name} {r.done}/{r.total}, {r.rate:.1f} it/s" if r else name
            for name, r in self.running.items()
        )
        parts = [
            f"{self.done} of {self.total} runs done",
            f"{len(self.running)} running" + f" ({each})" * bool(each),
            f"{self.failed} failed",
        ]
        if (seconds := self.seconds_left()) is not None and self.done + self.failed < self.total:
            parts.append(f"{max(1, round(seconds / 60))} min left")
        return ", ".join(parts)


class Display:
    """Shows a `Progress`: in a terminal one line that is written anew, else a line a minute."""

    def __init__(self, progress: Progress):
        self.progress = progress
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=progress.total, bar_format="{desc}") if terminal else None
        self._every = 1.0 if terminal else 60.0  # seconds
        self._shown = time.monotonic()

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def write(self, text: str) -> None:
        """Print lines, above that line."""
        if self._bar is not None:
            self._bar.write(text.rstrip("\n"))
        else:
            print(text.rstrip("\n"), flush=True)

    def refresh(self) -> None:
        """Show it again, if it is time to."""
        now = time.monotonic()
        if now - self._shown < self._every:
            return
        self._shown = now
        if self._bar is not None:
            self._bar.set_description_str(self.progress.sentence())
        else:
            print(self.progress.sentence(), file=sys.stderr, flush=True)
