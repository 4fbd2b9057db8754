"""EfficientAD step by step: the networks, algorithms and metrics of the paper, and its data."""

from effad_core.backbones import open_extractor
from effad_core.datasets import DataError, Sample, Scenario, open_pretraining, open_scenario
from effad_core.detector import EfficientAD, Prediction
from effad_core.distillation import DistillationSchedule, distill
from effad_core.evaluation import Evaluation, evaluate
from effad_core.networks import Autoencoder, PatchDescriptionNetwork
from effad_core.runs import RunError
from effad_core.training import Schedule, train

__all__ = [
    "Autoencoder",
    "DataError",
    "DistillationSchedule",
    "EfficientAD",
    "Evaluation",
    "PatchDescriptionNetwork",
    "Prediction",
    "RunError",
    "Sample",
    "Scenario",
    "Schedule",
    "distill",
    "evaluate",
    "open_extractor",
    "open_pretraining",
    "open_scenario",
    "train",
]
