"""The cost table: the counter against counts by hand, the methods against the paper's Table 11."""

import re
from functools import partial
from itertools import product

from effad_core.evaluation.costs import METHODS, Cost, costs, count, efficientad, main, table
from effad_core.evaluation.costs.dsr import CODES, WIDTH, Codebook
from effad_core.evaluation.costs.features import AST, FastFlow, SimpleNet
from effad_core.evaluation.costs.regression import (
    DESCRIPTORS,
    GCAD,
    POOL,
    DenseDescriptor,
    MultiPool,
    StudentTeacher,
    UNet,
)

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models import efficientnet_b5


class NoMemory(TorchDispatchMode):
    """Fails where an operation returns a tensor that is not on the meta device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        held = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and not x.is_meta]
        assert not held, f"{function} made a tensor of shape {tuple(held[0].shape)}"
        return result


@pytest.fixture(scope="module")
def rows() -> dict[str, Cost]:
    with NoMemory():
        return {row.method: row for row in costs()}


# The counter, by hand: two FLOPs for each product of an input value and a weight.


@pytest.mark.parametrize(
    ("layer", "parameters", "products"),
    [
        (partial(nn.Conv2d, 3, 8, 5, stride=2), 8 * 75 + 8, 75 * 8 * 14 * 22),
        (partial(nn.Conv2d, 3, 8, 3, padding="same", bias=False), 8 * 27, 27 * 8 * 32 * 48),
        (partial(nn.Conv2d, 3, 8, 3, padding="same", dilation=4), 8 * 27 + 8, 27 * 8 * 32 * 48),
        (partial(nn.Conv2d, 3, 6, 1, groups=3), 6 + 6, 6 * 32 * 48),
        (partial(nn.ConvTranspose2d, 3, 8, 4, stride=2), 3 * 8 * 16 + 8, 3 * 8 * 16 * 32 * 48),
        (partial(nn.Linear, 48, 5), 48 * 5 + 5, 3 * 32 * 48 * 5),
        (partial(nn.BatchNorm2d, 3), 6, 0),
        (partial(nn.Upsample, scale_factor=2, mode="bilinear"), 0, 0),
    ],
    ids=["strided", "same", "dilated", "groups", "transposed", "linear", "norm", "resize"],
)
def test_a_layer_by_hand(layer, parameters, products):
    assert count(layer, (32, 48)) == (parameters, 2 * products)


@pytest.mark.parametrize(
    "layer",
    [
        partial(nn.Conv2d, 3, 4, 3, stride=2),
        partial(nn.Conv2d, 3, 4, 2, dilation=3),
        partial(nn.Conv2d, 3, 6, 3, groups=3),
        partial(nn.ConvTranspose2d, 3, 4, 3, stride=2),
        partial(nn.Linear, 6, 5),
    ],
    ids=["strided", "dilated", "groups", "transposed", "linear"],
)
def test_a_layer_by_its_jacobian(layer):
    """Without padding, each product of a linear layer is one entry of its Jacobian."""
    torch.manual_seed(0)
    jacobian = torch.autograd.functional.jacobian(layer(), torch.rand(1, 3, 7, 6))
    assert count(layer, (7, 6))[1] == 2 * jacobian.count_nonzero()


def test_a_look_up_in_a_codebook_is_two_matrix_products():
    def build():
        return nn.Sequential(nn.Conv2d(3, WIDTH, 1), Codebook())

    parameters, flops = count(build, 16)
    assert parameters == 3 * WIDTH + WIDTH + 2 * CODES * WIDTH
    assert flops == 2 * 256 * WIDTH * (3 + 2 * CODES)


def test_flops_grow_with_the_image_and_parameters_do_not():
    layer = partial(nn.Conv2d, 3, 8, 3, padding=1)
    small, large = count(layer, 32), count(layer, (64, 96))
    assert large == (small[0], 6 * small[1])


def test_a_network_with_memory_is_refused():
    network = nn.Conv2d(3, 8, 3)
    with pytest.raises(ValueError, match="holds memory; build it inside"):
        count(lambda: network, 32)


def test_counting_leaves_the_defaults_alone():
    count(partial(nn.Conv2d, 3, 8, 3), 32)
    assert torch.empty(1).device.type == "cpu"
    assert torch.is_grad_enabled()


# The methods.


def test_all_ten_of_the_table(rows):
    assert list(rows) == list(METHODS)
    assert len(rows) == 10
    for row in rows.values():
        assert row.parameters > 0
        assert row.flops > 2 * row.parameters  # every weight is used at more than one place
        assert row.assumed.endswith(".")


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("GCAD", "S-T", "AST")])
def test_parameters_round_to_the_papers(rows, method):
    row = rows[method]
    assert row.parameters / 1e6 == pytest.approx(row.paper_parameters, abs=0.5)
    assert row.parameters_deviation is None


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("GCAD", "S-T")])
def test_flops_round_to_the_papers(rows, method):
    row = rows[method]
    assert row.flops / 1e9 == pytest.approx(row.paper_flops, abs=0.5)
    assert row.flops_deviation is None


def test_one_flop_a_product_would_not_match(rows):
    """What the docstring says of the paper's convention."""
    row = rows["EfficientAD-S"]
    assert row.flops / 1e9 == pytest.approx(75.9, abs=0.05)
    assert row.flops / 2e9 == pytest.approx(38, abs=0.5)


# Every count of ours that the assumptions mention.


@pytest.mark.parametrize(
    ("method", "size"), [("EfficientAD-S", "small"), ("EfficientAD-M", "medium")]
)
def test_efficientad_with_padding(rows, method, size):
    _, flops = count(partial(efficientad, size, padding=True), 256)
    assert f"({flops / 1e9:.1f} GFLOPs with it)" in rows[method].assumed


def test_simplenet_without_the_unread_layers_and_at_288_pixels(rows):
    def read_layers() -> SimpleNet:
        network = SimpleNet()
        network.unread = nn.Identity()
        return network

    parameters, _ = count(read_layers, 64)
    assert f"it has {parameters / 1e6:.0f} M parameters" in rows["SimpleNet"].assumed
    assert f"{count(SimpleNet, 288)[1] / 1e9:.1f} GFLOPs" in rows["SimpleNet"].assumed


def test_st_with_other_widths_and_one_border(rows, monkeypatch):
    row = rows["S-T"]
    _, flops = count(partial(StudentTeacher, border=64), 256)
    assert f"gives {100 * (flops / row.flops - 1):.0f} % more FLOPs" in row.assumed
    wide = ((128, 5), POOL, (128, 5), POOL, (256, 5), POOL, (256, 4), (128, 1))
    monkeypatch.setitem(DESCRIPTORS, 65, wide)
    parameters, _ = count(StudentTeacher, 64)
    assert f"by {(parameters - row.parameters) / 1e6:.1f} M parameters" in row.assumed


def test_gcad_with_both_models_and_the_other_one(rows):
    assert f"({count(partial(GCAD, 17), 256)[1] / 1e9:.1f} GFLOPs with 17)" in rows["GCAD"].assumed
    parameters = 2 * (count(partial(UNet, 128), 32)[0] + count(partial(UNet, 10), 32)[0])
    assert f"{parameters / 1e6:.0f} M parameters" in rows["GCAD"].assumed


def test_ast_with_all_of_efficientnet_b5(rows):
    row = rows["AST"]
    whole, _ = count(efficientnet_b5, 64)
    read, _ = count(lambda: AST().extractor, 64)
    assert f"would be {(whole - read) / 1e6:.0f} M)" in row.assumed
    assert f"other {row.paper_parameters - row.parameters / 1e6:.0f} M parameters" in row.assumed


# The architectures.


@pytest.mark.parametrize("patch_size", DESCRIPTORS)
def test_a_descriptor_turns_one_patch_into_one_vector(patch_size):
    def output() -> tuple[int, ...]:
        return tuple(
            DenseDescriptor(patch_size, border=0)(torch.empty(1, 3, *[patch_size] * 2)).shape
        )

    with torch.device("meta"):
        assert output()[1:] == (128, 1, 1)


@pytest.mark.parametrize(("patch_size", "pools"), [(17, 0), (33, 2)])
def test_the_dense_features_are_those_of_each_patch(patch_size, pools):
    torch.manual_seed(0)
    dense, side = DenseDescriptor(patch_size), 4
    patchwise = [nn.MaxPool2d(2) if isinstance(layer, MultiPool) else layer for layer in dense]
    image = torch.rand(1, 3, side, side)
    with torch.no_grad():
        found = dense(image)
        padded = F.pad(image, [patch_size // 2] * 4)
        patches = F.unfold(padded, patch_size)[0].T.reshape(-1, 3, patch_size, patch_size)
        expected = nn.Sequential(*patchwise)(patches).reshape(side, side, 128)
    assert found.shape[0] == 4**pools
    for y, x in product(range(side), repeat=2):
        offsets = [2 * (y >> level & 1) + (x >> level & 1) for level in range(pools)]
        batch = sum(offset * 4**level for level, offset in enumerate(offsets))
        vector = found[batch, :, y >> pools, x >> pools]
        assert torch.allclose(vector, expected[y, x], atol=1e-6)


@pytest.mark.parametrize("size", [(6, 6), (7, 7), (7, 6), (2, 5)])
def test_multi_pool_loses_no_window(size):
    features = torch.rand(1, 1, *size)
    pooled = MultiPool()(features)
    assert pooled.shape == (4, 1, size[0] // 2, size[1] // 2)
    every = F.max_pool2d(features, 2, stride=1)
    assert set(every.flatten().tolist()) <= set(pooled.flatten().tolist())


@pytest.mark.parametrize("patch_size", [17, 33])
def test_gcad_branches_give_maps_of_one_size(patch_size):
    with torch.device("meta"):
        local, context, local_regression, context_regression = GCAD(patch_size)(
            torch.empty(1, 3, 256, 256)
        )
    assert local.shape[0] * local.shape[2] * local.shape[3] >= 256 * 256
    assert local.shape[1] == local_regression.shape[1] == 128
    assert context.shape == context_regression.shape == (1, 10, 256, 256)


def test_a_resnet_is_cut_behind_layer3():
    with torch.device("meta"):
        outputs, features = [], torch.empty(1, 3, 256, 256)
        for stage in FastFlow().stages:
            features = stage(features)
            outputs.append(tuple(features.shape[1:]))
    assert outputs == [(256, 64, 64), (512, 32, 32), (1024, 16, 16)]


# The table.


def test_the_table_hides_no_deviation(rows):
    lines = table(rows.values()).splitlines()
    assumed = lines[1].index("assumed")
    first = {line[:14].strip(): line for line in lines[2:] if line[0] != " "}
    assert list(first) == list(METHODS)
    for name, line in first.items():
        row = rows[name]
        percents = re.findall(r"[+-]\d+ %", line[:assumed])
        expected = [
            f"{100 * (ours / paper - 1):+.0f} %"
            for ours, paper in (
                (row.parameters / 1e6, row.paper_parameters), (row.flops / 1e9, row.paper_flops)
            )
            if abs(ours - paper) > 0.5
        ]  # fmt: skip
        assert percents == expected
        assert f"{row.parameters / 1e6:.1f}" in line
        assert f"{row.flops / 1e9:.1f}" in line
    text = " ".join(" ".join(line[assumed:].split()) for line in lines[2:])
    for row in rows.values():
        assert row.assumed in text


@pytest.mark.parametrize(
    ("parameters", "flops", "expected"),
    [
        (10_500_000, 9_500_000_000, (None, None)),
        (10_510_000, 9_480_000_000, (0.051, -0.052)),
        (20_000_000, 0, (1.0, -1.0)),
    ],
)
def test_a_deviation_is_what_rounding_does_not_explain(parameters, flops, expected):
    row = Cost("a method", parameters, flops, 10, 10, "nothing.")
    found = (row.parameters_deviation, row.flops_deviation)
    assert found == tuple(e if e is None else pytest.approx(e) for e in expected)


def test_the_command(capsys):
    main(["S-T", "EfficientAD-S"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:] if line[0] != " "] == ["S-T", "EfficientAD-S"]
    with pytest.raises(SystemExit, match="2"):
        main(["PaDiM"])
    assert "must be one of GCAD, SimpleNet" in capsys.readouterr().err


def test_an_unknown_method_is_refused_before_counting():
    with pytest.raises(ValueError, match="must be one of GCAD, .*, not 'PaDiM'"):
        costs(["GCAD", "PaDiM"])
    assert costs([]) == []
