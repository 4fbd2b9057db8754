"""The command `effad export`: a detector for machines without PyTorch."""

import argparse
from collections.abc import Sequence

from effad_core.datasets import open_scenario
from effad_core.deployment.int8 import export_int8
from effad_core.deployment.onnx import export
from effad_core.deployment.rates import RATE, add_rate, feasible_rate
from effad_core.detector import EfficientAD
from effad_core.errors import command_errors
from effad_core.storage.files import as_path


def main(arguments: Sequence[str] | None = None) -> None:
    """`effad export`."""
    parser = argparse.ArgumentParser(
        prog="effad export",
        description="Write a detector as ONNX, for ONNX Runtime or OpenVINO, without PyTorch; or "
        "as an INT8 model for OpenVINO, with thresholds found anew.",
        epilog="examples: effad export detector.safetensors my_part.onnx; "
        "effad export detector.safetensors my_part.xml --int8 path/to/my_part",
    )
    parser.add_argument("detector", type=as_path, help="a detector.safetensors")
    parser.add_argument("output", type=as_path, help="the .onnx file to write, or the .xml file")
    parser.add_argument(
        "--int8",
        metavar="FOLDER",
        help="the folder, or the scenario's name, that the detector was trained on: its training "
        "images give the ranges of the numbers, its validation images the thresholds",
    )
    add_rate(parser)
    args = parser.parse_args(arguments)
    if args.int8 is None and args.output.suffix == ".xml":
        parser.error("a .xml file holds an INT8 model: give --int8 FOLDER")
    if args.int8 is None and (args.rate, args.guarantee) != (RATE, "confident"):
        parser.error("--rate and --guarantee belong to --int8: an ONNX file keeps its thresholds")
    with command_errors("nothing was written"):
        detector = EfficientAD.load(args.detector, "cpu")
        if args.int8 is None:
            export(detector, args.output)
        else:
            scenario = open_scenario(args.int8)
            rate = feasible_rate(len(scenario.validation), args.rate, args.guarantee)
            parts = scenario.train, scenario.validation
            found = export_int8(detector, *parts, args.output, rate, args.guarantee)
            print(f"images: {found.operating_point}")
            print(f"pixels: {found.pixel_operating_point}")
            print(
                f"this holds if the detector was trained on none of the {len(scenario.validation)} "
                f"validation images of {scenario.name}"
            )
    print(f"written to {args.output}")
