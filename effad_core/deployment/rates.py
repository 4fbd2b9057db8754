"""The rate of false alarms that a threshold keeps: its options, and what few images support."""

import argparse

from effad_core.thresholds import images_needed, lowest_rate

RATE = 0.05
GUARANTEES = ("confident", "average")


def add_rate(parser: argparse.ArgumentParser) -> None:
    """Add --rate and --guarantee."""
    parser.add_argument("--rate", type=float, default=RATE, help=f"of false alarms ({RATE})")
    parser.add_argument(
        "--guarantee",
        choices=GUARANTEES,
        default="confident",
        help="the rate is kept with 95 %% confidence, or on average (fewer images needed)",
    )


def feasible_rate(count: int, rate: float, guarantee: str) -> float:
    """The rate of false alarms, or the lowest that so few images support.

    Args:
        count: normal images for the threshold.
        rate, guarantee: as in `threshold_for_fpr`.
    """
    if count >= images_needed(rate, guarantee=guarantee):
        return rate
    return min(1.0005 * lowest_rate(count, guarantee=guarantee), 0.999)
