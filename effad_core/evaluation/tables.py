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
    "auspro_0.3": "AU-sPRO 0.3",
    "auspro_0.05": "AU-sPRO 0.05",
    "pixel_auroc_1": "pixel AU-ROC",
    "pixel_auroc_0.05": "pixel AU-ROC 0.05",
    "pixel_auprc": "pixel AU-PRC",
}
PAPER_TABLES = {  # metric -> which table of the paper it is
    "image_auroc": "Table 5, image AU-ROC",
    "image_auprc": "Table 6, image AU-PRC",
    "aupro_0.3": "Table 7, AU-PRO 0.3 (of mvtec-loco AU-sPRO 0.3)",
    "aupro_0.05": "Table 8, AU-PRO 0.05 (of mvtec-loco AU-sPRO 0.05)",
    "pixel_auroc_0.05": "Table 9, pixel AU-ROC 0.05",
    "pixel_auprc": "Table 10, pixel AU-PRC",
}
PAPER_COLUMNS = {  # dataset -> column of these tables -> the group of images that it is of
    "mvtec-ad": {"mvtec-ad": "all"},
    "visa": {"visa": "all"},
    "mvtec-loco": {
        "mvtec-loco structural": KINDS[0],
        "mvtec-loco logical": KINDS[1],
        "mvtec-loco": "mean",
    },
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


def tables(by_method: Mapping[str, Mapping[str, Mapping]]) -> str:
    """The tables of a benchmark, each metric of the paper's Tables 5 to 10 beside the paper's.

    Args:
        by_method: of each method by scenario {"dataset": str, "seeds": {seed: metrics}}; scenarios
            without a finished seed are left out here (they are reported as failed).
    """
    done = {
        method: found
        for method, results in by_method.items()
        if (found := {name: entry for name, entry in results.items() if entry["seeds"]})
    }
    if not done:
        return "nothing was measured"
    entries = [
        (name, method, results[name])
        for name in dict.fromkeys(name for results in done.values() for name in results)
        for method, results in done.items()
        if name in results
    ]
    shown = [
        metric
        for metric in COLUMNS
        if any(metric in headline(m) for *_, e in entries for m in e["seeds"].values())
    ]
    rows = [["scenario", "method", "seeds", *(COLUMNS[metric] for metric in shown)]]
    for name, method, entry in entries:
        runs = [headline(metrics) for metrics in entry["seeds"].values()]
        rows.append([name, method, str(len(runs)), *(spread(runs, metric) for metric in shown)])
    parts = ["Mean and standard deviation over seeds", layout(rows, left=(0, 1))]
    parts += _structural_and_logical(entries)
    parts += _beside_the_paper(done)
    return "\n\n".join(parts)


def _structural_and_logical(entries: Sequence[tuple[str, str, Mapping]]) -> list[str]:
    """Image AU-ROC of each map on the two kinds of anomalies, as the paper's LOCO tables."""
    rows = [["scenario", "method", "map", "structural", "logical", "mean"]]
    for name, method, entry in entries:
        runs = list(entry["seeds"].values())
        if not all("mean" in metrics for metrics in runs):
            continue
        for metric in list(COLUMNS)[:3]:
            groups = [[metrics[group] for metrics in runs] for group in (*KINDS, "mean")]
            if metric not in groups[0][0]:
                continue
            title = {"image_auroc": "combined"}.get(metric, COLUMNS[metric])
            rows.append([name, method, title, *(spread(group, metric) for group in groups)])
    if len(rows) == 1:
        return []
    return ["Image AU-ROC by kind of anomaly", layout(rows, left=(0, 1, 2))]


def _beside_the_paper(done: Mapping[str, Mapping[str, Mapping]]) -> list[str]:
    """A table a metric: means over the paper's datasets, below the ten methods that it reports.

    A method that was measured on fewer scenarios than another has a table of its own.
    """
    parts = []
    for metric, title in PAPER_TABLES.items():
        alike: dict[str, list[str]] = {}  # methods by the scenarios that they were measured on
        for method, results in done.items():
            if names := _names_by_dataset(results, metric):
                alike.setdefault(repr(names), []).append(method)
        for methods in alike.values():
            first = done[methods[0]]
            counts = ", ".join(
                f"{len(found)} of {len(DATASETS[dataset])} of {dataset}"
                for dataset, found in _names_by_dataset(first, metric).items()
            )
            columns = list(dataset_means(first, metric))
            rows = [["method", *columns]]
            for method, values in paper_results().items():
                cells = (f"{values[metric][column] / 100:.3f}" for column in columns)
                rows.append([f"{method} (paper)", *cells])
            for method in methods:
                ours = dataset_means(done[method], metric).values()
                rows.append([f"{method} (measured here)", *(f"{value:.3f}" for value in ours)])
            parts += [
                f"The paper's {title}: dataset means (scenarios measured: {counts})",
                layout(rows),
            ]
    return parts


def _names_by_dataset(results: Mapping[str, Mapping], metric: str) -> dict[str, list[str]]:
    """Dataset of the paper -> the scenarios of it that have the metric in all seeds."""
    return {dataset: sorted(found) for dataset, found in _by_column(results, metric).items()}


def dataset_means(results: Mapping[str, Mapping], metric: str) -> dict[str, float]:
    """Means of a metric as in the paper's tables: over seeds, then over a dataset's scenarios.

    Args:
        results: of one method, as in `tables`.
        metric: one of `PAPER_TABLES`; of MVTec LOCO, AU-sPRO is taken for AU-PRO.

    Returns:
        By column of `PAPER_COLUMNS`, for each dataset with a scenario that has the metric in all
        its seeds; "overall", the mean of the three datasets, if all three are there.
    """
    means = {}
    for dataset, scenarios in _by_column(results, metric).items():
        for column in PAPER_COLUMNS[dataset]:
            means[column] = float(np.mean([found[column] for found in scenarios.values()]))
    if PAPER_COLUMNS.keys() <= means.keys():
        means["overall"] = float(np.mean([means[dataset] for dataset in PAPER_COLUMNS]))
    return means


def _by_column(
    results: Mapping[str, Mapping], metric: str
) -> dict[str, dict[str, dict[str, float]]]:
    """Dataset -> each scenario that has the metric in all seeds -> column -> mean over seeds."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for dataset, columns in PAPER_COLUMNS.items():
        # in the paper's tables of AU-PRO, the columns of MVTec LOCO are AU-sPRO
        name = metric.replace("aupro", "auspro") if dataset == "mvtec-loco" else metric
        for scenario, entry in results.items():
            runs = list(entry["seeds"].values())
            groups = [metrics.get(group, {}) for metrics in runs for group in columns.values()]
            if entry["dataset"] == dataset and runs and all(name in group for group in groups):
                means = {
                    column: float(np.mean([metrics[group][name] for metrics in runs]))
                    for column, group in columns.items()
                }
                found.setdefault(dataset, {})[scenario] = means
    return found


def paper_results() -> dict[str, dict]:
    """What the paper's Tables 4 to 12 say of each method.

    Returns:
        Method -> metric -> column of the table -> number in percent, and its timings. `about` in
        the file says which table each entry is of, and its unit.
    """
    return json.loads(PAPER.read_text(encoding="utf-8"))["methods"]


def spread(runs: Sequence[Mapping[str, float]], metric: str) -> str:
    """ "0.912 ± 0.004", mean and sample standard deviation; "0.912" for one run, "-" for a gap."""
    values = [run[metric] for run in runs if metric in run]
    if len(values) < len(runs):
        return "-"
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"
