"""How long and in which format to train: the schedule of Algorithm 1, and its four profiles.

The lines cited here are those of Algorithm 1 in the supplement.
"""

import math
from dataclasses import dataclass, replace

PROFILES = ("smoke", "quick", "laptop", "paper")


@dataclass(frozen=True)
class Schedule:
    """How long and in which format to train. The defaults are Algorithm 1.

    Attributes:
        iterations: optimiser steps of student and autoencoder together (line 12).
        autoencoder_iterations: steps of the autoencoder alone before them, each on
            `autoencoder_batch` training images, not augmented; none in the paper. A short schedule
            starves the autoencoder: it draws the commonest kind of image first, and its map is then
            wrong all over a rarer kind that is just as normal.
        learning_rate: Adam's (line 11).
        cosine: decay the learning rate along half a cosine instead of the single step of lines
            43-45.
        hard_quantile: of the hard feature loss (line 19); 0 is the plain mean.
        penalty: whether the pretraining penalty is part of the loss (line 22).
        divide_cells: whether each cell of the two maps is divided by its mean over training images
            (see `EfficientAD.find_cell_means`); not in the paper.
        cache_megabytes: memory for the teacher's output on training images, which never changes; in
            half precision, as many images as fit. 0 computes it each time (lines 14-15).
        precision: as in `resolve_precision`; "auto" takes what is fastest when the run begins.
    """

    iterations: int = 70_000
    autoencoder_iterations: int = 0
    autoencoder_batch: int = 4
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    cosine: bool = False
    hard_quantile: float = 0.999
    penalty: bool = True
    divide_cells: bool = False
    cache_megabytes: int = 0
    precision: str = "float32"

    @classmethod
    def paper(cls, **changes) -> "Schedule":
        """Algorithm 1 to the letter; for a GPU."""
        return replace(cls(), **changes)

    @classmethod
    def laptop(cls, **changes) -> "Schedule":
        """A real result on a CPU.

        Its loss counts the hardest hundredth of the differences, not the hardest thousandth: a
        student that has few iterations learns more from more of them.
        """
        base = cls(
            iterations=600,
            autoencoder_iterations=900,
            learning_rate=1e-3,
            cosine=True,
            hard_quantile=0.99,
            divide_cells=True,
            cache_megabytes=2_048,
            precision="auto",
        )
        return replace(base, **changes)

    @classmethod
    def quick(cls, **changes) -> "Schedule":
        """A first look, in minutes on two CPU cores.

        Its loss counts the hardest tenth of the differences: from fewer, a student learns too
        little in so few iterations (notebook 03).
        """
        short = {"iterations": 120, "autoencoder_iterations": 240}
        return cls.laptop(**short | {"learning_rate": 2e-3, "hard_quantile": 0.9} | changes)

    @classmethod
    def smoke(cls, **changes) -> "Schedule":
        """A handful of steps: shows that everything runs, detects nothing."""
        return cls.laptop(**{"iterations": 4, "autoencoder_iterations": 2} | changes)

    @classmethod
    def named(cls, name: str, **changes) -> "Schedule":
        """The schedule of a profile: smoke, quick, laptop or paper.

        Raises:
            ValueError: for another name.

        Example:
            >>> Schedule.named("paper").iterations
            70000
            >>> Schedule.named("laptop", iterations=300).iterations
            300
        """
        if name not in PROFILES:
            raise ValueError(f"the profile must be one of {', '.join(PROFILES)}, not {name!r}")
        return getattr(cls, name)(**changes)

    def learning_rates_at(self, step: int) -> tuple[float, float]:
        """Learning rates of student and autoencoder at a step, counted from 0 over both phases.

        With steps of its own before the others, the autoencoder then goes on at a tenth of the
        student's rate: at the full rate, the noise of one image a step undoes what it has learnt.
        """
        iteration = step - self.autoencoder_iterations
        if not self.cosine:  # Algorithm 1, lines 43-45: a tenth after 95 % of the iterations
            rate = self.learning_rate * (0.1 if iteration > 0.95 * self.iterations else 1.0)
            return rate, rate
        if iteration < 0:
            return 0.0, self._cosine(step, self.autoencoder_iterations, lowest=0.1)
        rate = self._cosine(iteration, self.iterations, lowest=0.01)
        return rate, 0.1 * rate if self.autoencoder_iterations else rate

    def _cosine(self, step: int, length: int, lowest: float) -> float:
        """A rise over an eighth of the steps, at most 50, then half a cosine.

        It ends at `lowest` times the learning rate.
        """
        rise = min(1.0, (step + 1) / min(50, length / 8))
        fall = 0.5 * (1 + math.cos(math.pi * step / length))
        return self.learning_rate * rise * (lowest + (1 - lowest) * fall)
