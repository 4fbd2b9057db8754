"""How long, on what and in which format to distil: the schedule of Algorithm 3.

The lines cited here are those of Algorithm 3 in the supplement.
"""

import math
from dataclasses import dataclass, replace

from effad_core.schedule import PROFILES


@dataclass(frozen=True)
class DistillationSchedule:
    """How long, on what and in which format to distil.

    Attributes:
        iterations: optimiser steps (line 14).
        batch_size: images a step (line 16), of all processes together.
        statistics_images: images for mu and sigma of Psi (line 4).
        optimizer: "adam" (line 13), or "muon": Muon for the kernels, Adam for the biases.
        learning_rate: Adam's; Muon's steps are scaled to the size of Adam's.
        cosine: decay the learning rate to 1 % along half a cosine; the paper keeps it constant.
        size: side of T's square input in pixels; Psi's is `extractor.input_size(size)`.
        scales: None resizes whole images (lines 7, 20). Otherwise T and Psi see a random window
            of an image, magnified for Psi by a factor drawn between these two: many small crops
            hold more different patches than a few whole images at the same cost.
        padding: pad T (64x64 cells at 256) or compare only the cells that see real pixels.
        gray_probability: of converting an image to gray scale (lines 6, 18).
        precision: as in `resolve_precision`; "auto" takes what is fastest when the run begins.
    """

    iterations: int = 60_000
    batch_size: int = 16
    statistics_images: int = 10_000
    optimizer: str = "adam"
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    cosine: bool = False
    size: int = 256
    scales: tuple[float, float] | None = None
    padding: bool = True
    gray_probability: float = 0.1
    precision: str = "float32"

    def __post_init__(self):
        if self.optimizer not in ("adam", "muon"):
            raise ValueError(f'optimizer must be "adam" or "muon", not {self.optimizer!r}')

    @classmethod
    def paper(cls) -> "DistillationSchedule":
        """Algorithm 3 to the letter; for a GPU."""
        return cls()

    @classmethod
    def laptop(cls) -> "DistillationSchedule":
        """Many small crops, for two CPU cores: about an hour."""
        return cls(
            iterations=1_500,
            statistics_images=1_024,
            optimizer="muon",
            learning_rate=2e-3,
            cosine=True,
            size=128,
            scales=(0.6, 1.6),
            padding=False,
            precision="auto",
        )

    @classmethod
    def quick(cls) -> "DistillationSchedule":
        """One to three minutes: enough to see the loss fall, not a teacher to use."""
        return replace(cls.laptop(), iterations=80, statistics_images=128, size=96)

    @classmethod
    def smoke(cls) -> "DistillationSchedule":
        """A handful of steps: shows that everything runs."""
        return replace(cls.quick(), iterations=3, batch_size=2, statistics_images=4)

    @classmethod
    def named(cls, name: str) -> "DistillationSchedule":
        """The schedule of a profile: smoke, quick, laptop or paper.

        Raises:
            ValueError: for another name.
        """
        if name not in PROFILES:
            raise ValueError(f"the profile must be one of {', '.join(PROFILES)}, not {name!r}")
        return getattr(cls, name)()

    def learning_rate_at(self, iteration: int) -> float:
        """The learning rate of an iteration, counted from 0."""
        if not self.cosine:
            return self.learning_rate
        rise = min(1.0, (iteration + 1) / 100)  # a short warm-up for the higher rate
        fall = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * iteration / self.iterations))
        return self.learning_rate * rise * fall
