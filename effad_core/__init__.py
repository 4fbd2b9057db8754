"""EfficientAD step by step: the networks, algorithms and metrics of the paper, and its data."""

from importlib import import_module

from effad_core.acceleration.threads import settle_threads

settle_threads()  # before any module below loads torch

# Each public name and its module. A module is imported when a name of it is first used, so that
# `effad distill` runs that module once, and importing the package is quick.
_HOMES = {
    "Autoencoder": "networks",
    "DataError": "errors",
    "DistillationSchedule": "distillation.schedule",
    "EfficientAD": "detector",
    "Evaluation": "evaluation.scores",
    "OperatingPoint": "thresholds",
    "PatchDescriptionNetwork": "networks",
    "Prediction": "prediction",
    "RunError": "errors",
    "Sample": "datasets",
    "Scenario": "datasets",
    "Schedule": "schedule",
    "TeacherReport": "distillation.teacher_check",
    "ThresholdExplorer": "explorer",
    "teacher_report": "distillation.teacher_check",
    "choose_device": "acceleration.devices",
    "distill": "distillation.algorithm",
    "export": "deployment.onnx",
    "fit_thresholds": "deployment.inspection",
    "inspect_images": "deployment.inspection",
    "prepare": "deployment.prepared",
    "evaluate": "evaluation.scores",
    "open_extractor": "distillation.extractors",
    "open_pretraining": "datasets",
    "open_scenario": "datasets",
    "train": "training",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from effad_core.cli import own_version

        return own_version()
    if name not in _HOMES:
        raise AttributeError(f"effad_core has no public name {name!r}")
    return getattr(import_module(f"effad_core.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
