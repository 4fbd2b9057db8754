"""The command `effad`. Each sub-command has its module, which is loaded when it is asked for."""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

COMMANDS = {  # name: (module of effad_core and its function, what it does)
    "train": (
        "deployment.own_images:train_main",
        "a folder of good images -> a detector",
    ),
    "predict": ("deployment.inspection:main", "a detector and images -> verdicts"),
    "serve": ("deployment.serving:main", "a detector -> verdicts over HTTP"),
    "threshold": (
        "deployment.thresholding:main",
        "give a detector another threshold",
    ),
    "export": ("deployment.exporting:main", "a detector -> an ONNX file"),
    "check-teacher": (
        "distillation.teacher_check:main",
        "does the teacher suit your images?",
    ),
    "benchmark": (
        "evaluation.benchmark:main",
        "train, evaluate, print the paper's tables",
    ),
    "distill": ("distillation.algorithm:main", "photographs -> a teacher (Algorithm 3)"),
    "gallery": (
        "evaluation.gallery:main",
        "one picture of the maps of several detectors",
    ),
    "time": ("evaluation.timing:main", "latency and throughput by the paper's protocol"),
    "costs": (
        "evaluation.costs:main",
        "parameters and FLOPs of the paper's ten methods",
    ),
    "unpack": ("datasets.archives:main", "the archive of a dataset -> its folder"),
}
HELP = """usage: effad COMMAND ...

EfficientAD: find anomalies in images, learnt from good ones alone.

{commands}

  effad train path/to/good_images          trains, finds a threshold, says where the detector is
  effad predict DETECTOR path/to/images    judges new images: a table and pictures
  effad COMMAND --help                     options and an example

exit codes: 0 done; 1 something failed or was found, which is said; 2 wrong use or input;
3 an image is anomalous (effad predict --fail-on-anomaly); 130 interrupted"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one sub-command.

    Args:
        arguments: the words after `effad`; those of the process by default.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that the console cannot show stops nothing
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = (f"  {one:<{width}}  {what}" for one, (_, what) in COMMANDS.items())
        print(HELP.format(commands="\n".join(lines)))
        return
    if name == "--version":
        print(f"effad {own_version()}")
        return
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else "effad --help lists the commands."
        print(f"effad has no command {name!r}: {hint}", file=sys.stderr)
        sys.exit(2)
    module, function = COMMANDS[name][0].split(":")
    try:
        command = getattr(import_module(f"effad_core.{module}"), function)
    except KeyboardInterrupt:  # torch takes seconds to load
        print("\nInterrupted: nothing was begun.", file=sys.stderr)
        sys.exit(130)
    sys.exit(command(rest))


def own_version() -> str:
    """Of the installed package."""
    try:
        return version("effad-core")
    except PackageNotFoundError:  # a checkout that was never installed
        return "unknown"
