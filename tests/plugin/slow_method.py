"""A method that learns the mean colour, slowly: for tests of runs that are killed.

It joins the others as any package can, by an entry point: put this folder on PYTHONPATH. Into its
run's folder it writes its process (`pid`), a character a step (`steps.txt`), and a checkpoint every
fifth of a second.
"""

import os
import time
from functools import partial
from pathlib import Path
from typing import ClassVar

from baselines import method
from baselines.method import Method, Phase, Profile, Schedule
from effad_core.storage.runs import Run

import torch
import torch.nn.functional as F
from torch import nn

SECONDS = "SLOW_METHOD_SECONDS"  # that a step takes
method.Run = partial(Run, save_seconds=0.2)


class Slow(Method):
    """The distance of each pixel to a colour that was learned.

    Args:
        image_size: as in `Method`.
    """

    NAME = "Slow"
    PROFILES: ClassVar = {"quick": Profile({}, Schedule((60,), 4))}

    def __init__(self, image_size=32, pretrained=True):
        super().__init__(image_size, {})
        self.colour = nn.Parameter(torch.zeros(3))

    def initialise(self):
        with torch.no_grad():
            self.colour.copy_(torch.randn(3))

    def trained(self):
        return {"method": self}

    def fit(self, scenario, schedule="laptop", seed=0, run_dir=None, device=None):
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        (Path(run_dir) / "pid").write_text(str(os.getpid()))
        self.steps = Path(run_dir) / "steps.txt"
        if scenario.name == "killer":
            os.kill(os.getpid(), 9)
        return super().fit(scenario, schedule, seed, run_dir, device)

    def phases(self, images):
        def loss(chosen, rng):
            time.sleep(float(os.environ.get(SECONDS, 0)))
            with self.steps.open("a") as file:
                file.write(".")
            batch = torch.stack([method.to_tensor(images[i]) for i in chosen]).float() / 255
            noise = torch.from_numpy(rng.normal(0, 0.1, 3)).float()
            return {"colour": (batch.mean((0, 2, 3)) + noise - self.colour).square().sum()}

        return [Phase(torch.optim.Adam([self.colour], lr=0.02), loss)]

    def finish(self, images, validation, seed):
        pass

    def shown_and_judged(self, images):
        away = images.float() / 255 - self.colour[:, None, None]
        m = F.avg_pool2d(away.square().sum(1, keepdim=True), 5, 1, 2)
        return m, m
