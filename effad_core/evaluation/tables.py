"""Tables as text: rows of cells, and the tables of a benchmark beside the paper's."""

import json
from collections.abc import Collection, Mapping, Sequence

from effad_core.datasets.published import DATASETS
from effad_core.evaluation.scores import KINDS
from effad_core.storage.shipped import shipped

import numpy as np

PAPER = shipped("paper_results.json")
COLUMNS = {  # metric -> title; those that no scenario has are left out
    "image_auroc": "AU-ROC",
    "image_auroc_student_teacher": "S-T alone",
    "image_auroc_autoencoder": "AE alone",
    "image_auprc": "AU-PRC",
    "aupro_0.3": "AU-PRO 0.3",
    "aupro_0.05": "AU-PRO 0.05",
    "auspro_0.05": "AU-sPRO 0.05",
    "pixel_auroc_1": "pixel AU-ROC",
    "pixel_auprc": "pixel AU-PRC",
}

Metrics = dict[str, dict[str, float]]  # by group, as `Evaluation.metrics` gives them


def layout(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Rows of cells as lines, two spaces between columns as wide as their longest cell.

    Args:
        rows: of equally many cells; the first may be headings.
        left: numbers of the columns that begin at the left; the others end at the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def headline(metrics: Metrics) -> dict[str, float]:
    """The group that stands for a scenario: "mean" of structural and logical, or "all"."""
    return metrics.get("mean", metrics["all"])


def tables(results: Mapping[str, Mapping]) -> str:
    """The tables of a benchmark.

    Args:
        results: by scenario {"dataset": str, "seeds": {seed: metrics}}; scenarios without a
            finished seed are left out here (they are reported as failed).
    """
    done = {name: entry for name, entry in results.items() if entry["seeds"]}
    if not done:
        return "nothing was measured"
    shown = [
        metric
        for metric in COLUMNS
        if any(metric in headline(m) for e in done.values() for m in e["seeds"].values())
    ]
    rows = [["scenario", "seeds", *(COLUMNS[metric] for metric in shown)]]
    for name, entry in done.items():
        runs = [headline(metrics) for metrics in entry["seeds"].values()]
        rows.append([name, str(len(runs)), *(spread(runs, metric) for metric in shown)])
    parts = ["Mean and standard deviation over seeds", layout(rows)]
    parts += _structural_and_logical(done)
    parts += _beside_the_paper(done)
    return "\n\n".join(parts)


def _structural_and_logical(done: Mapping[str, Mapping]) -> list[str]:
    """Image AU-ROC of each map on the two kinds of anomalies, as the paper's LOCO tables."""
    rows = [["scenario", "map", "structural", "logical", "mean"]]
    for name, entry in done.items():
        runs = list(entry["seeds"].values())
        if not all("mean" in metrics for metrics in runs):
            continue
        for metric in list(COLUMNS)[:3]:
            groups = [[metrics[group] for metrics in runs] for group in (*KINDS, "mean")]
            title = {"image_auroc": "combined"}.get(metric, COLUMNS[metric])
            rows.append([name, title, *(spread(group, metric) for group in groups)])
    return ["Image AU-ROC by kind of anomaly", layout(rows)] if len(rows) > 1 else []


def _beside_the_paper(done: Mapping[str, Mapping]) -> list[str]:
    """Means over each of the paper's datasets, beside the ten methods that it reports."""
    ours = dataset_means(done)
    if not ours:
        return []
    known = [dataset for dataset in DATASETS if dataset in ours]
    paper = json.loads(PAPER.read_text(encoding="utf-8"))["methods"]
    rows = [["method", *known, *(["overall"] if len(known) == len(DATASETS) else [])]]
    for method, values in paper.items():
        areas = values["image_auroc"]
        rows.append(
            [f"{method} (paper)", *(f"{areas[column] / 100:.3f}" for column in rows[0][1:])]
        )
    means = [ours[dataset] for dataset in known]
    rows.append(["measured here", *(f"{value:.3f}" for value in [*means, float(np.mean(means))])])
    rows[-1] = rows[-1][: len(rows[0])]
    counts = ", ".join(
        f"{sum(e['dataset'] == d for e in done.values())} of {len(DATASETS[d])} of {d}"
        for d in known
    )
    return [f"Image AU-ROC, dataset means (scenarios measured: {counts})", layout(rows)]


def dataset_means(results: Mapping[str, Mapping]) -> dict[str, float]:
    """Mean image AU-ROC of each of the paper's datasets: over seeds, then over its scenarios."""
    means = {}
    for dataset in DATASETS:
        areas = [
            np.mean([headline(metrics)["image_auroc"] for metrics in entry["seeds"].values()])
            for entry in results.values()
            if entry["dataset"] == dataset and entry["seeds"]
        ]
        if areas:
            means[dataset] = float(np.mean(areas))
    return means


def spread(runs: Sequence[Mapping[str, float]], metric: str) -> str:
    """ "0.912 ± 0.004", mean and sample standard deviation; "0.912" for one run, "-" for a gap."""
    values = [run[metric] for run in runs if metric in run]
    if len(values) < len(runs):
        return "-"
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"
