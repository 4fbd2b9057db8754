"""What users write, for the type checker: tests/test_types.py runs mypy on it, nothing runs it.

A line that must be refused says so in a comment; mypy complains if it is not.
"""

from pathlib import Path

import effad_core
from effad_core import (
    EfficientAD,
    Evaluation,
    OperatingPoint,
    Prediction,
    Scenario,
    Schedule,
    evaluate,
    export,
    fit_thresholds,
    open_scenario,
    prepare,
    train,
)

import numpy as np
from torch import Tensor

version: str = effad_core.__version__
scenario: Scenario = open_scenario("tray")
open_scenario(Path("part"), validation_fraction=0.2)
open_scenario(7)  # type: ignore[arg-type]

detector: EfficientAD = EfficientAD("small", image_size=(256, 320)).load_teacher()
EfficientAD(colour=True)  # type: ignore[call-arg]
row: dict[str, float] = train(detector, scenario, Schedule.laptop(), run_dir=Path("run"), seed=1)
train(detector, scenario, "laptop")  # type: ignore[arg-type]

points: tuple[OperatingPoint, OperatingPoint] = fit_thresholds(detector, scenario.test, 0.05)
limit: float | None = detector.threshold
detector.threshold = 0.3
detector.threshold = "high"  # type: ignore[assignment]

one: Prediction = detector.predict("image.png")
several: list[Prediction] = detector.predict([Path("a.png"), "b.png"])
from_array: Prediction = detector.predict(np.zeros((9, 9, 3), np.uint8))
detector.predict(3.5)  # type: ignore[call-overload]
heights: tuple[int, ...] = one.map.shape
anomalous: bool = one.is_anomalous
mu: Tensor = detector.mu

fast = prepare(detector, "cpu", "bfloat16")
also_one: Prediction = fast.predict("image.png")
result: Evaluation = evaluate(fast, scenario, keep_maps=True)
area: float = result.metrics()["all"]["image_auroc"]
export(detector, "detector.onnx")
export(fast, "detector.onnx")  # type: ignore[arg-type]
