"""S-T: students regress a teacher's descriptors, and err and disagree where an image is new.

Bergmann, Fauser, Sattlegger, Steger: Uninformed Students: Student-Teacher Anomaly Detection with
Discriminative Latent Embeddings, CVPR 2020. The teachers are those of `baselines.descriptors`.

EfficientAD's authors measured the multi-scale variant, patches of 17, 33 and 65 pixels, with its
default settings: three students each, Adam with 1e-4 and weight decay 1e-5, batches of one image,
100 epochs. Assumed: a leaky ReLU's slope of 5e-3 and zeros beyond the border, as in public
implementations.

With 1e-4, the few steps of the short profiles leave the students where they began. They take 1e-3.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from baselines.descriptors import CHANNELS, DESCRIPTORS, DenseDescriptor, open_descriptors
from baselines.maps import scales_of, standardised
from baselines.method import Method, Phase, Profile, Schedule, checked_positive, pixels
from effad_core.datasets import ResizedImages
from effad_core.datasets.transforms import normalise
from effad_core.statistics import channel_statistics

import torch
from torch import Tensor, nn

STUDENTS = 3  # of each patch size
SMALL = {"width": 0.25, "image_size": 128, "learning_rate": 1e-3}


class StudentTeacher(Method):
    """A teacher and three students for each patch size.

    Args:
        patch_sizes: of 17, 33 and 65 pixels.
        width: as in `DenseDescriptor`.
        image_size: images are resized to this before they enter.
        learning_rate: of Adam.
        weights: a file with the teachers; None takes the shipped ones, of width 0.25.
        pretrained: False leaves the teachers' weights as they are drawn.

    Example:
        >>> st = StudentTeacher.of_profile("smoke").fit(scenario, "smoke")
        >>> st.predict(scenario.test[0].path).map.shape
        (480, 480)
    """

    NAME = "S-T"
    NEEDS_VALIDATION = True
    PROFILES: ClassVar = {
        "smoke": Profile(SMALL | {"image_size": 64}, Schedule((2,), 1)),
        "quick": Profile(SMALL | {"image_size": 64}, Schedule((30,), 1)),
        "laptop": Profile(SMALL, Schedule((300,), 1)),
        "paper": Profile({"width": 1.0}, Schedule((100,), 1, epochs=True)),
    }

    def __init__(
        self,
        patch_sizes: Sequence[int] = tuple(DESCRIPTORS),
        width: float = 0.25,
        image_size: int | Sequence[int] = 256,
        learning_rate: float = 1e-4,
        weights: str | Path | None = None,
        pretrained: bool = True,
    ):
        arguments = {"patch_sizes": tuple(patch_sizes), "width": width}
        learning_rate = checked_positive("learning_rate", learning_rate)
        super().__init__(image_size, arguments | {"learning_rate": learning_rate})
        self.width, self.learning_rate = width, learning_rate
        teachers = {size: DenseDescriptor(size, width) for size in patch_sizes}
        if pretrained:
            teachers = open_descriptors(patch_sizes, width, weights)
        self.teachers = nn.ModuleList(teachers.values()).requires_grad_(False)
        count = len(self.teachers)
        self.register_buffer("mean", torch.zeros(count, CHANNELS, 1, 1))  # of the teachers' output
        self.register_buffer("deviation", torch.ones(count, CHANNELS, 1, 1))
        self.register_buffer("scales", torch.tensor([[0.0, 1.0]] * 2 * count))
        self.initialise()

    def initialise(self) -> None:
        self.students = nn.ModuleList(
            nn.ModuleList(DenseDescriptor(teacher.patch_size, self.width) for _ in range(STUDENTS))
            for teacher in self.teachers
        )

    def trained(self) -> dict[str, nn.Module]:
        return {"students": self.students}

    def _targets(self, images: Tensor) -> list[Tensor]:
        """The teachers' normalised descriptors of normalised images, each (N, 128, H, W)."""
        with torch.no_grad():
            return [
                (teacher(images) - mean) / deviation
                for teacher, mean, deviation in zip(
                    self.teachers, self.mean, self.deviation, strict=True
                )
            ]

    @torch.no_grad()
    def find_statistics(self, images: ResizedImages, most: int = 64) -> None:
        """Mean and deviation of each number of the teachers' descriptors on training images."""
        for index, teacher in enumerate(self.teachers):
            found = channel_statistics(
                teacher(normalise(batch.to(self.device))) for batch in images.batches(1, most)
            )
            self.mean[index, :, 0, 0], self.deviation[index, :, 0, 0] = found

    def phases(self, images: ResizedImages) -> list[Phase]:
        parameters = self.students.parameters()
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate, weight_decay=1e-5)

        def loss(chosen: Sequence[int], rng: object) -> dict[str, Tensor]:
            batch = normalise(pixels(images, chosen, self.device))
            return {
                f"L{teacher.patch_size}": sum(
                    (student(batch) - target).square().sum(dim=1).mean() for student in students
                )
                for teacher, students, target in zip(
                    self.teachers, self.students, self._targets(batch), strict=True
                )
            }

        return [Phase(optimizer, loss, begin=lambda: self.find_statistics(images))]

    def raw_maps(self, images: Tensor) -> list[Tensor]:
        """For each patch size the regression error e and the variance v, each (N, 1, H, W).

        e is the squared distance of the students' mean from the teacher's descriptor, v the mean
        squared distance of the students from their mean.
        """
        images, found = normalise(images.to(self.device)), []
        for students, target in zip(self.students, self._targets(images), strict=True):
            outputs = torch.stack([student(images) for student in students])
            mean = outputs.mean(dim=0)
            error = (mean - target).square().sum(dim=1, keepdim=True)
            variance = (outputs - mean).square().sum(dim=2, keepdim=True).mean(dim=0)
            found += [error, variance]
        return found

    def finish(self, images: ResizedImages, validation: ResizedImages, seed: int) -> None:
        self.scales.copy_(scales_of(validation.batches(1), self.raw_maps))

    def shown_and_judged(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Each map standardised, e and v added, the mean over the patch sizes."""
        shown = standardised(self.raw_maps(images), self.scales).sum(dim=0) / len(self.teachers)
        return shown, shown
