"""The examples in the docstrings give what they say.

Those that need a trained detector find one: `detector` was trained on `scenario`, a few images of
the tray; `folder` is an empty folder.
"""

import doctest
from dataclasses import replace
from importlib import import_module

from effad_core import EfficientAD, Schedule, evaluate, open_scenario, train

import pytest

MODULES = (
    *("acceleration.devices", "datasets", "datasets.pretraining", "deployment.inspection"),
    *("deployment.onnx", "deployment.prepared", "detector", "errors", "evaluation.evidence"),
    *("evaluation.known", "evaluation.scores", "extensions.puad", "losses", "metrics"),
    *("prediction", "schedule", "statistics", "storage.shipped", "thresholds", "tiles.cutting"),
    "training",
)


@pytest.fixture(scope="module")
def trained():
    whole = open_scenario("tray")
    test = (*whole.test[:2], *whole.test[-2:])
    scenario = replace(whole, train=whole.train[:3], validation=whole.validation[:2], test=test)
    detector = EfficientAD().load_teacher()
    train(detector, scenario, Schedule.smoke(precision="float32"), device="cpu")
    return {"detector": detector, "scenario": scenario, "evaluate": evaluate}


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of(name, trained, tmp_path):
    module = import_module(f"effad_core.{name}")
    found = doctest.testmod(module, extraglobs=trained | {"folder": tmp_path})
    assert found.attempted > 0 and found.failed == 0
