"""The paper's numbers: they fit one another, and agree with a second copy where there is one."""

import json
from pathlib import Path

from effad_core.datasets import DATASETS
from effad_core.evaluation.costs import METHODS
from effad_core.evaluation.tables import PAPER, PAPER_COLUMNS, PAPER_TABLES, paper_results

import pytest

SECOND_COPY = Path(__file__).parents[2] / "shared" / "data" / "paper_tables.json"
COLUMNS = {  # the second copy's -> ours
    "mvtec_ad": "mvtec-ad",
    "visa": "visa",
    "loco_structural": "mvtec-loco structural",
    "loco_logical": "mvtec-loco logical",
    "loco_mean": "mvtec-loco",
    "overall": "overall",
}
TIMINGS = {"latency_ms", "throughput", "gpu_memory_mb"}
WITH_BACKBONES = {"PatchCore", "EfficientAD-S", "EfficientAD-M"}
ROUNDING = 0.1 + 1e-9  # half a tenth from the parts, half a tenth from their mean

# Typed from the paper: method, metric, column, percent.
TYPED = """
    GCAD           image_auroc       mvtec-ad               89.1
    EfficientAD-M  image_auroc       mvtec-loco logical     86.8
    PatchCore Ens  image_auroc       overall                92.1
    AST            image_auprc       visa                   95.3
    EfficientAD-S  image_auprc       mvtec-loco structural  93.6
    SimpleNet      aupro_0.3         mvtec-loco             64.6
    EfficientAD-M  aupro_0.3         overall                93.3
    DSR            aupro_0.05        mvtec-ad               78.9
    EfficientAD-S  aupro_0.05        mvtec-loco structural  80.8
    FastFlow       pixel_auroc_0.05  mvtec-loco logical     33.7
    EfficientAD-M  pixel_auroc_0.05  visa                   86.9
    S-T            pixel_auprc       overall                43.8
    PatchCore      pixel_auprc       mvtec-loco             25.2
"""


def test_every_method_has_every_table():
    columns = {column for those in PAPER_COLUMNS.values() for column in those} | {"overall"}
    assert PAPER_COLUMNS.keys() == DATASETS.keys()
    assert paper_results().keys() == METHODS.keys()
    for method, values in paper_results().items():
        backbones = {"image_auroc_with_backbone"} & values.keys()
        assert values.keys() - backbones == {*PAPER_TABLES, *TIMINGS}, method
        assert bool(backbones) == (method in WITH_BACKBONES)
        for metric in PAPER_TABLES:
            assert values[metric].keys() == columns, (method, metric)
        for found in values.get("image_auroc_with_backbone", {}).values():
            assert found.keys() == DATASETS.keys()


def test_the_file_says_which_table_each_entry_is():
    about = json.loads(PAPER.read_text(encoding="utf-8"))["about"]
    assert "WACV 2024" in about.pop("source")
    assert about.keys() == set().union(*paper_results().values())
    for metric, title in PAPER_TABLES.items():
        assert about[metric].split(",")[0] == title.split(",")[0]
        assert ("AU-sPRO" in about[metric]) == ("AU-sPRO" in title)


@pytest.mark.parametrize("metric", PAPER_TABLES)
def test_the_means_are_those_of_their_parts(metric):
    for method, values in paper_results().items():
        found = values[metric]
        datasets = (found["mvtec-ad"] + found["mvtec-loco"] + found["visa"]) / 3
        kinds = (found["mvtec-loco structural"] + found["mvtec-loco logical"]) / 2
        assert found["overall"] == pytest.approx(datasets, abs=ROUNDING), method
        assert found["mvtec-loco"] == pytest.approx(kinds, abs=ROUNDING), method


@pytest.mark.parametrize("line", TYPED.strip().splitlines())
def test_numbers_typed_from_the_paper(line):
    method, metric, column, number = [*filter(None, map(str.strip, line.split("  ")))]
    assert paper_results()[method][metric][column] == float(number)


def test_backbones_typed_from_the_paper():
    methods = paper_results()
    found = [
        methods[name]["image_auroc_with_backbone"][backbone][dataset]
        for name, backbone, dataset in (
            ("PatchCore", "DenseNet-201", "mvtec-loco"),
            ("EfficientAD-S", "ResNeXt-101", "mvtec-ad"),
            ("EfficientAD-M", "DenseNet-201", "visa"),
        )
    ]
    assert found == [76.5, 98.9, 97.7]


@pytest.fixture
def second_copy():
    if not SECOND_COPY.is_file():
        pytest.skip("there is no second copy of the paper's tables beside this repository")
    return json.loads(SECOND_COPY.read_text(encoding="utf-8"))["tables"]


def named(rows):
    return {name.replace("_", " "): row for name, row in rows.items()}


def test_every_metric_agrees_with_a_second_copy(second_copy):
    for metric, title in PAPER_TABLES.items():
        table = second_copy[title.split(",")[0].removeprefix("Table ")]
        assert (table["metric"], table["unit"]) == (metric, "percent")
        names = [COLUMNS[column] for column in table["columns"]]
        expected = {
            method: dict(zip(names, row, strict=True))
            for method, row in named(table["rows"]).items()
        }
        assert {method: v[metric] for method, v in paper_results().items()} == expected, metric


def test_backbones_agree_with_a_second_copy(second_copy):
    first, *others = second_copy["4"]["columns"]
    assert first == "WideResNet-101"
    for dataset, rows in second_copy["4"]["rows"].items():
        assert rows.keys() == WITH_BACKBONES
        column = {**COLUMNS, "mvtec_loco": "mvtec-loco"}[dataset]
        for method, row in rows.items():
            found = paper_results()[method]
            by_backbone = {first: found["image_auroc"], **found["image_auroc_with_backbone"]}
            assert list(by_backbone) == [first, *others]
            assert [numbers[column] for numbers in by_backbone.values()] == row


def test_timings_and_costs_agree_with_a_second_copy(second_copy):
    latencies, costs = second_copy["12"], named(second_copy["11"]["rows"])
    expected = {
        method: dict(zip(latencies["columns"], row, strict=True))
        for method, row in named(latencies["rows"]).items()
    }
    assert {method: v["latency_ms"] for method, v in paper_results().items()} == expected
    for method, v in paper_results().items():
        detection, segmentation, latency, throughput, *sizes = costs[method]
        assert v["image_auroc"]["overall"] == detection
        assert v["aupro_0.3"]["overall"] == segmentation
        assert v["latency_ms"][second_copy["11"]["gpu"]] == pytest.approx(latency, abs=0.5)
        assert v["throughput"] == throughput
        ours = (METHODS[method].paper_parameters, METHODS[method].paper_flops, v["gpu_memory_mb"])
        assert ours == tuple(int(str(size).split(" + ")[0]) for size in sizes)
