"""The cost table: the counter against counts by hand, the methods against the paper's Table 11."""

import re
from functools import partial

from baselines.descriptors import DESCRIPTORS, POOL
from baselines.dsr import Codebook
from baselines.gcad import GCAD, UNet
from baselines.simplenet import SimpleNet
from baselines.student_teacher import StudentTeacher
from effad_core.evaluation.costs import METHODS, Cost, costs, count, efficientad, main, table
from effad_core.evaluation.methods import find_method

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
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
    assert count(layer, (32, 48), torch.float32) == (parameters, 2 * products)


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
    assert count(layer, (7, 6), torch.float32)[1] == 2 * jacobian.count_nonzero()


def test_a_look_up_in_a_codebook_is_two_matrix_products():
    def build():
        return nn.Sequential(nn.Conv2d(3, 24, 1), Codebook(50, 24))

    parameters, flops = count(build, 16, torch.float32)
    assert parameters == 3 * 24 + 24 + 2 * 50 * 24
    assert flops == 2 * 256 * 24 * (3 + 2 * 50)


def test_flops_grow_with_the_image_and_parameters_do_not():
    layer = partial(nn.Conv2d, 3, 8, 3, padding=1)
    small, large = (count(layer, size, torch.float32) for size in (32, (64, 96)))
    assert large == (small[0], 6 * small[1])


def test_a_network_with_memory_is_refused():
    network = nn.Conv2d(3, 8, 3)
    with pytest.raises(ValueError, match="holds memory; build it inside"):
        count(lambda: network, 32)


def test_counting_leaves_the_defaults_alone():
    count(partial(nn.Conv2d, 3, 8, 3), 32, torch.float32)
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


def paper(cls: type, **changes) -> nn.Module:
    """What is counted of a method with the paper's widths, but for some."""
    return cls.of_profile("paper", pretrained=False, **changes).counted()


def test_simplenet_without_the_unread_layers_and_at_288_pixels(rows):
    with torch.device("meta"):
        simplenet = SimpleNet.of_profile("paper", pretrained=False)
    parameters = sum(p.numel() for p in simplenet.parameters())
    assert f"it has {parameters / 1e6:.0f} M parameters" in rows["SimpleNet"].assumed
    _, flops = count(partial(paper, SimpleNet, image_size=288), 288, torch.uint8)
    assert f"{flops / 1e9:.1f} GFLOPs" in rows["SimpleNet"].assumed


def test_st_with_other_widths(rows, monkeypatch):
    row = rows["S-T"]
    wide = ((128, 5), POOL, (128, 5), POOL, (256, 5), POOL, (256, 4), (128, 1))
    monkeypatch.setitem(DESCRIPTORS, 65, wide)
    parameters, _ = count(partial(paper, StudentTeacher, image_size=64), 64, torch.uint8)
    assert f"by {(parameters - row.parameters) / 1e6:.1f} M parameters" in row.assumed


def test_gcad_with_both_models_and_the_other_one(rows):
    _, flops = count(partial(paper, GCAD, patch_size=17), 256, torch.uint8)
    assert f"({flops / 1e9:.1f} GFLOPs with 17)" in rows["GCAD"].assumed
    with torch.device("meta"):
        parameters = 2 * sum(p.numel() for n in (128, 10) for p in UNet(n).parameters())
    assert f"{parameters / 1e6:.0f} M parameters" in rows["GCAD"].assumed


def test_ast_with_all_of_efficientnet_b5(rows):
    row = rows["AST"]
    whole, _ = count(efficientnet_b5, 64, torch.float32)
    with torch.device("meta"):
        layers = find_method("AST").of_profile("paper", pretrained=False).layers
    read = sum(p.numel() for p in layers.parameters())
    assert f"would be {(whole - read) / 1e6:.0f} M)" in row.assumed
    assert f"other {row.paper_parameters - row.parameters / 1e6:.0f} M parameters" in row.assumed


@pytest.mark.parametrize("name", [m for m in METHODS if not m.startswith("EfficientAD")])
def test_images_enter_as_the_paper_has_them(name):
    """The size at which a method is counted is the one that its profile `paper` computes at."""
    with torch.device("meta"):
        method = find_method(name).of_profile("paper", pretrained=False)
    assert method.image_size == (METHODS[name].image_size,) * 2


@pytest.mark.parametrize("name", ["SimpleNet", "S-T", "FastFlow", "DSR", "GCAD", "AST"])
def test_what_is_counted_is_what_predicts(name):
    method = find_method(name).untrained("smoke")
    images = torch.zeros(1, 3, *method.image_size, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        method.combined_maps(images)
    parameters = sum(p.numel() for p in method.parameters())
    build = partial(type(method), **method.arguments, pretrained=False)
    assert count(lambda: build().counted(), method.image_size, torch.uint8) == (
        parameters,
        counter.get_total_flops(),
    )


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
