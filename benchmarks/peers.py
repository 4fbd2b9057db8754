"""PatchCore and anomalib's EfficientAd on the images that EfficientAD is measured on.

    python -m benchmarks.peers solar-mono tray path/to/mvtec_ad/bottle --minutes 5

Each trains on a scenario's training images and is scored on its test images by the metrics of
`effad benchmark`. PatchCore has the features that the shipped teacher was distilled from.
anomalib's EfficientAd has the shipped teacher, the same photographs for its penalty, and as many
minutes as `--minutes` says; the networks, losses, statistics and quantiles are anomalib's own code,
with its optimiser's settings. It takes part where anomalib is installed: in an environment of its
own, from which this file runs with PYTHONPATH=. . The last column is the median of predictions one
by one, with the resize of image and map.

    python -m benchmarks.peers solar-mono --parity build/runs/RUN

instead gives anomalib's model the weights of a run and prints how far its maps are from ours.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

from baselines.patchcore import PatchCore
from effad_core import EfficientAD, evaluate, open_extractor, open_pretraining, open_scenario
from effad_core.acceleration.devices import choose_device
from effad_core.acceleration.precision import resolve_precision
from effad_core.datasets import ResizedImages, Sample, Scenario
from effad_core.datasets.transforms import to_tensor
from effad_core.errors import command_errors
from effad_core.evaluation.scores import KINDS
from effad_core.evaluation.tables import COLUMNS
from effad_core.evaluation.timing import machine
from effad_core.prediction import Predictor

import numpy as np
import torch
from torch import Tensor, nn

SHOWN = ("image_auroc", "image_auprc", "aupro_0.3", "aupro_0.05")
TIMED = 20  # predictions
FIRST = 10  # anomalib's iterations, by whose time the number of all is chosen
try:
    from anomalib.models.image.efficient_ad.lightning_model import EfficientAd
except ImportError:
    EfficientAd = None


class Anomalib(nn.Module, Predictor):
    """anomalib's EfficientAd with a teacher of ours."""

    map_names = ("combined",)

    def __init__(self, size: str = "small", seed: int = 0):
        super().__init__()
        ours = EfficientAD(size).load_teacher()
        torch.manual_seed(seed)
        self.ad = EfficientAd(teacher_out_channels=ours.out_channels, model_size=size)
        self.ad.model.teacher.load_state_dict(named_as_theirs(ours.teacher))
        self.image_size, self.seed = ours.image_size, seed
        self.operating_point = self.pixel_operating_point = None

    def use_device(self, device: str | torch.device | None = None) -> None:
        self.to(choose_device(device))

    def fit(self, scenario: Scenario, minutes: float) -> int:
        """Train for so many minutes; returns the number of iterations."""
        self.use_device()
        model, pretraining = self.ad.model, open_pretraining()
        found = self.ad.teacher_channel_mean_std(self._batches(scenario.train))
        model.mean_std.update(found)
        networks = [*model.student.parameters(), *model.ae.parameters()]
        optimizer = torch.optim.Adam(networks, lr=self.ad.lr, weight_decay=self.ad.weight_decay)
        rng = np.random.default_rng(self.seed)
        images = ResizedImages(scenario.train, self.image_size)
        model.train()
        model.teacher.eval()
        start, iteration, steps = time.perf_counter(), 0, FIRST
        while iteration < steps:
            image = as_theirs(to_tensor(images[int(rng.integers(len(images)))])[None])
            photograph = as_theirs(pretraining.whole_images(rng, 1, self.image_size, 0.3))
            optimizer.zero_grad()
            sum(model(batch=image, batch_imagenet=photograph)).backward()
            optimizer.step()
            iteration += 1
            if iteration == FIRST:
                steps = max(FIRST, round(60 * minutes * FIRST / (time.perf_counter() - start)))
            if iteration == int(0.95 * steps):  # as its StepLR
                optimizer.param_groups[0]["lr"] *= 0.1
        model.eval()
        model.quantiles.update(self.ad.map_norm_quantiles(self._batches(scenario.validation)))
        return iteration

    def _batches(self, samples: tuple[Sample, ...]) -> Iterator[SimpleNamespace]:
        """As anomalib's data loaders give them."""
        for images in ResizedImages(samples, self.image_size).batches(1):
            yield SimpleNamespace(image=as_theirs(images), gt_label=torch.zeros(len(images)))

    @torch.inference_mode()
    def combined_maps(self, images: Tensor) -> Tensor:
        return self.ad.model(as_theirs(images)).anomaly_map


def as_theirs(images: Tensor) -> Tensor:
    """Images as anomalib takes them: from 0 to 1."""
    return images.float() / 255


def named_as_theirs(network: nn.Sequential) -> dict[str, Tensor]:
    """Weights of one of our PDNs by anomalib's names, which count its convolutions from conv1."""
    convolutions = [layer for layer in network if isinstance(layer, nn.Conv2d)]
    return {
        f"conv{number}.{name}": tensor
        for number, layer in enumerate(convolutions, start=1)
        for name, tensor in layer.state_dict().items()
    }


def parity(source: str, run: str) -> None:
    """Give anomalib's model a detector's weights, and compare their maps on test images."""
    detector, scenario = EfficientAD.load(run, "cpu"), open_scenario(source)
    detector.precision = "float32"
    theirs = EfficientAd(teacher_out_channels=detector.out_channels, model_size=detector.size).model
    for network in ("teacher", "student"):
        getattr(theirs, network).load_state_dict(named_as_theirs(getattr(detector, network)))
    own = list(detector.autoencoder.state_dict().values())
    theirs.ae.load_state_dict(dict(zip(theirs.ae.state_dict(), own, strict=True)))
    theirs.mean_std.update({"mean": detector.mu[None], "std": detector.sigma[None]})
    theirs.eval()
    images = next(ResizedImages(scenario.test, detector.image_size).batches(8))
    with torch.inference_mode():
        student, distance = theirs.compute_student_teacher_distance(as_theirs(images))
        autoencoder = theirs.ae(as_theirs(images), images.shape[-2:])
        difference = (autoencoder - student[:, detector.out_channels :]).square()
    for name, ours, m in zip(
        ("student-teacher", "autoencoder"),
        detector.cells(images).unbind(dim=1),
        (distance, difference),
        strict=True,
    ):
        largest = ((ours - m.mean(dim=1)).abs().max() / ours.max()).item()
        print(
            f"{name} map, cells of {len(images)} images: at most {largest:.1e} of its maximum apart"
        )


def milliseconds(method: Predictor, samples: tuple[Sample, ...]) -> float:
    """Median time of a prediction, of images that are in memory."""
    taken, images = [], [sample.load() for sample in samples[:TIMED]]
    for image in [*images[:1] * 2, *images]:
        start = time.perf_counter()
        method.predict(image)
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken[2:])


def train_patchcore(scenario: Scenario, seed: int, args: argparse.Namespace) -> tuple:
    patchcore = PatchCore(features=open_extractor(), image_size=512, standardise=True, smoothing=0)
    patchcore.use_device()
    patchcore.precision = resolve_precision("auto", patchcore.device)
    patchcore.fit(scenario, seed=seed)
    return patchcore, f"{len(patchcore.memory):,} patches in memory"


def train_anomalib(scenario: Scenario, seed: int, args: argparse.Namespace) -> tuple:
    method = Anomalib(args.size, seed)
    return method, f"{method.fit(scenario, args.minutes)} iterations"


METHODS = {"patchcore": train_patchcore, "anomalib": train_anomalib}


def report(row: dict) -> None:
    """Print a run: of each group of the paper's, or all images, its metrics."""
    found = row["metrics"]
    for group in [kind for kind in KINDS if kind in found] or ["all"]:
        areas = [f"{COLUMNS[n]} {v:.3f}" for n, v in found[group].items() if n in SHOWN]
        cells = [row["scenario"], group, row["method"], f"seed {row['seed']}", *areas]
        cells += [f"{row['minutes']:.1f} min", f"{row['milliseconds']:.0f} ms", row["note"]]
        print("  ".join(cells), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="+", help="names or folders")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--size", choices=("small", "medium"), default="small", help="anomalib's")
    parser.add_argument("--minutes", type=float, default=5, help="of anomalib's training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, help="write the metrics into this file, too")
    parser.add_argument("--parity", metavar="RUN", help="compare maps on equal weights instead")
    args = parser.parse_args(arguments)
    if EfficientAd is None and (args.parity or "anomalib" in args.methods):
        parser.error("anomalib is not installed here (--methods patchcore leaves it out)")
    if args.parity:
        with command_errors():
            return parity(args.scenarios[0], args.parity)
    print(machine(torch.device("cpu")), flush=True)
    written = []
    with command_errors():
        for source in args.scenarios:
            scenario = open_scenario(source)
            for name in args.methods:
                for seed in args.seeds:
                    start = time.perf_counter()
                    method, note = METHODS[name](scenario, seed, args)
                    minutes = (time.perf_counter() - start) / 60
                    metrics = evaluate(method, scenario).metrics()
                    speed = milliseconds(method, scenario.test)
                    row = {"scenario": scenario.name, "method": name, "seed": seed, "note": note}
                    row |= {"minutes": minutes, "milliseconds": speed, "metrics": metrics}
                    written.append(row)
                    report(row)
                    if args.output:
                        args.output.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
