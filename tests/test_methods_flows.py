"""FastFlow and AST: their flows against autograd and SciPy, their maps and losses by hand."""

import math

from baselines.asymmetric import AST, KERNELS, Coupling, Teacher, positional_encoding
from baselines.fastflow import STEPS, FastFlow, Flow, FlowStep, negative_log_likelihood
from baselines.method import Schedule, pixels
from effad_core.datasets import ResizedImages, Sample

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm
from torch import nn

SIZE = (64, 96)


def perturbed(module, seed=0):
    """Every parameter that is trained a little elsewhere, in double precision: nothing is 0."""
    generator = torch.manual_seed(seed)
    module.double()
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def numbers(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.manual_seed(seed))


def log_determinant(function, x):
    """Of the Jacobian of one image's function, by autograd."""
    jacobian = torch.autograd.functional.jacobian(lambda v: function(v).flatten(), x)
    return torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel())).logabsdet.item()


def shown(cells, size):
    """Cells (h, w) as a map, by Pillow."""
    cells = Image.fromarray(np.asarray(cells, np.float32))
    return np.asarray(cells.resize(size[::-1], Image.BILINEAR))


def batch_of(method, paths):
    images = ResizedImages([Sample(path, 0, "good") for path in paths], method.image_size)
    return pixels(images, range(len(paths)), torch.device("cpu"))


# ---- FastFlow's steps ----------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_step_is_invertible(kernel_size):
    step, x = perturbed(FlowStep(6, kernel_size)), numbers(2, 6, 4, 5)
    with torch.no_grad():
        output, _ = step(x)
        torch.testing.assert_close(step.inverse(output), x, rtol=0, atol=1e-9)
        torch.testing.assert_close(step(step.inverse(x))[0], x, rtol=0, atol=1e-9)
    assert (output - x).abs().max() > 0.1


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_the_log_determinant_of_a_step_is_autograds(kernel_size):
    step, x = perturbed(FlowStep(4, kernel_size)), numbers(3, 4, 2, 3)
    found = step(x)[1].tolist()
    expected = [log_determinant(lambda v: step(v)[0], one[None]) for one in x]
    assert found == pytest.approx(expected, rel=1e-9)
    assert np.ptp(found) > 0.01 and min(map(abs, found)) > 0.01


def test_a_step_by_hand():
    """Half of the channels is kept, the other scaled and shifted; then all in another order."""
    step, x = perturbed(FlowStep(4, 1)), numbers(1, 4, 1, 1)
    first, _, second = step.subnet
    kept, changed = x[0, :2, 0, 0].numpy(), x[0, 2:, 0, 0].numpy()
    w, b = first.weight.detach().numpy()[:, :, 0, 0], first.bias.detach().numpy()
    hidden = np.maximum(0, w @ kept + b)
    w, b = second.weight.detach().numpy()[:, :, 0, 0], second.bias.detach().numpy()
    log_scale, shift = np.split(0.1 * (w @ hidden + b), 2)
    coupled = np.concatenate([kept, changed * np.exp(2 * np.tanh(log_scale)) + shift])
    raw = step.raw_scale.detach().numpy().ravel()
    coupled = coupled * 0.1 * 2 * np.log1p(np.exp(raw / 2)) + step.offset.detach().numpy().ravel()
    order = step.mixing[:, :, 0, 0].argmax(dim=1).numpy()
    assert sorted(order) == [0, 1, 2, 3] and step.mixing.sum() == 4
    np.testing.assert_allclose(step(x)[0].detach().numpy().ravel(), coupled[order], rtol=1e-9)


def test_a_new_step_scales_nothing_and_its_order_is_not_trained():
    step = FlowStep(8, 3)
    torch.testing.assert_close(step.scale, torch.ones(1, 8, 1, 1))
    trained = {name for name, p in step.named_parameters() if p.requires_grad}
    assert "mixing" not in trained and "unmixing" not in trained and "raw_scale" in trained
    assert torch.equal(step.mixing[..., 0, 0].T, step.unmixing[..., 0, 0])


def steps_of(flow, x):
    for step in flow.steps:
        x, _ = step(x)
    return x


def test_a_flow_is_invertible_behind_its_norm():
    flow, x = perturbed(Flow((4, 2, 3))), numbers(2, 4, 2, 3)
    with torch.no_grad():
        z, _ = flow(x)
        for step in reversed(flow.steps):
            z = step.inverse(z)
        torch.testing.assert_close(z, flow.norm(x), rtol=0, atol=1e-8)
    mean, deviation = x.mean(dim=(1, 2, 3)), x.std(dim=(1, 2, 3), correction=0)
    plain = (x - mean.view(2, 1, 1, 1)) / deviation.view(2, 1, 1, 1)
    expected = plain * flow.norm.weight + flow.norm.bias
    torch.testing.assert_close(flow.norm(x), expected, rtol=1e-4, atol=1e-4)
    sizes = [step.subnet[0].kernel_size[0] for step in flow.steps]
    assert sizes == [3, 1] * 4 and len(sizes) == STEPS


def test_the_log_determinant_of_a_flow_is_autograds():
    flow, x = perturbed(Flow((4, 2, 2))), numbers(2, 4, 2, 2)
    normed = flow.norm(x).detach()
    expected = [log_determinant(lambda v: steps_of(flow, v), one[None]) for one in normed]
    assert flow(x)[1].tolist() == pytest.approx(expected, rel=1e-8)


def test_the_negative_log_likelihood_is_scipys_without_its_constant():
    z, log_determinants = numbers(3, 4, 2, 5), numbers(3, seed=2)
    likelihoods = norm.logpdf(z.numpy()).sum(axis=(1, 2, 3)) + log_determinants.numpy()
    constant = 4 * 2 * 5 / 2 * math.log(2 * math.pi)
    found = negative_log_likelihood(z, log_determinants).item()
    assert found == pytest.approx(-likelihoods.mean() - constant, rel=1e-12)


# ---- FastFlow ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fastflow():
    torch.manual_seed(0)
    method = FastFlow(image_size=SIZE, pretrained=False)
    perturbed(method.flows)
    for flow in method.flows:  # an error in each of 8 steps would grow
        flow.float()
    return method.eval()


def test_fastflows_loss_is_the_sum_of_its_layers(fastflow, scenario):
    images = ResizedImages(scenario.train, SIZE)
    (phase,) = fastflow.phases(images)
    x = pixels(images, [3, 1], torch.device("cpu"))
    expected = 0.0
    for flow, features in zip(fastflow.flows, fastflow.layers(x), strict=True):
        z, log_determinants = flow(features.half().float())
        likelihoods = norm.logpdf(z.detach().double().numpy()).sum(axis=(1, 2, 3))
        constant = z[0].numel() / 2 * math.log(2 * math.pi)
        expected -= (likelihoods + log_determinants.detach().double().numpy()).mean() + constant
    found = phase.loss([3, 1], np.random.default_rng(0))
    assert {n: term.item() for n, term in found.items()} == {"NLL": pytest.approx(expected, 1e-5)}
    (group,) = phase.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-3, 1e-5)
    trained = {id(p) for p in fastflow.flows.parameters() if p.requires_grad}
    assert {id(p) for p in group["params"]} == trained
    assert not any(p.requires_grad for p in fastflow.layers.parameters())


def test_fastflows_map_by_hand(fastflow, drawn):
    x, maps = batch_of(fastflow, drawn[6:]), []
    with torch.no_grad():
        for flow, features in zip(fastflow.flows, fastflow.layers(x), strict=True):
            z = flow(features)[0].double().numpy()
            cells = 1 - np.exp(-(z**2).mean(axis=1) / 2)
            maps.append([shown(one, SIZE) for one in cells])
        found, scores = fastflow.maps_and_scores(x)
    expected = np.mean(maps, axis=0)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert scores[:, 0].tolist() == pytest.approx(expected.max((1, 2)).tolist(), rel=1e-4)
    assert np.ptp(expected) > 0.05


@pytest.mark.parametrize("size", [(64, 96), (33, 70)])
def test_fastflows_flows_have_the_shapes_of_their_layers(size):
    method = FastFlow(image_size=size, pretrained=False)
    layers = method.layers(torch.zeros(1, 3, *size, dtype=torch.uint8))
    assert [tuple(layer.shape[1:]) for layer in layers] == method.shapes
    assert [tuple(flow.norm.normalized_shape) for flow in method.flows] == method.shapes


def test_a_trained_flow_makes_normal_images_likelier(scenario):
    torch.manual_seed(0)
    method = FastFlow(image_size=32, pretrained=False)
    images = ResizedImages(scenario.train, method.image_size)
    likelihoods = []
    for steps in (1, 20):
        method.fit(scenario, Schedule((steps,), 4), device="cpu")
        (phase,) = method.phases(images)
        with torch.no_grad():
            likelihoods.append(-phase.loss(range(4), None)["NLL"].item())
    assert likelihoods[1] > likelihoods[0] + 100


# ---- AST's teacher -------------------------------------------------------------------------


def coupling(channels, kernel_size, seed=0):
    torch.manual_seed(seed)
    return perturbed(Coupling(channels, 5, kernel_size), seed)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_a_coupling_is_invertible(kernel_size):
    made, x, position = coupling(6, kernel_size), numbers(2, 6, 4, 3), numbers(2, 32, 4, 3, seed=2)
    with torch.no_grad():
        output, _ = made(x, position)
        torch.testing.assert_close(made.inverse(output, position), x, rtol=0, atol=1e-10)
        back, _ = made(made.inverse(x, position), position)
        torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    assert (output - x[:, made.order]).abs().amin(dim=(0, 2, 3)).min() > 1e-4  # of each channel


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_log_determinants_of_a_couplings_cells_sum_to_autograds(kernel_size):
    made, x, position = coupling(4, kernel_size), numbers(2, 4, 2, 3), numbers(1, 32, 2, 3, seed=2)
    found = made(x, position.expand(2, -1, -1, -1))[1]
    assert found.shape == (2, 2, 3)
    expected = [log_determinant(lambda v: made(v, position)[0], one[None]) for one in x]
    assert found.sum(dim=(1, 2)).tolist() == pytest.approx(expected, rel=1e-9)
    assert found.abs().min() > 1e-4


def test_a_coupling_of_single_cells_has_the_determinant_of_each():
    """With 1x1 kernels a cell's output depends on its own input alone."""
    made, x, position = coupling(4, 1), numbers(1, 4, 2, 2), numbers(1, 32, 2, 2, seed=2)
    found = made(x, position)[1]
    for row in range(2):
        for column in range(2):
            where = (..., slice(row, row + 1), slice(column, column + 1))
            own = position[where]
            expected = log_determinant(lambda v, own=own: made(v, own)[0], x[where])
            assert found[0, row, column].item() == pytest.approx(expected, rel=1e-9)


def test_a_log_scale_is_bounded():
    made = coupling(4, 3)
    made.gain.data.fill_(1e6)
    log_scale, _ = made._affine(0, numbers(1, 2, 3, 3), numbers(1, 32, 3, 3, seed=2))
    assert 1.8 < log_scale.abs().max() < 1.9


def test_a_new_coupling_only_reorders_channels():
    torch.manual_seed(0)
    made, x = Coupling(6, 5, 3).double(), numbers(2, 6, 3, 3)
    output, found = made(x, numbers(2, 32, 3, 3, seed=2))
    assert torch.equal(output, x[:, made.order]) and not found.any()
    assert sorted(made.order.tolist()) == list(range(6)) != made.order.tolist()


def test_the_teacher_is_four_couplings():
    torch.manual_seed(0)
    teacher = perturbed(Teacher(4, 5))
    x, position = numbers(2, 4, 2, 2), numbers(1, 32, 2, 2, seed=2)
    z, found = teacher(x, position.expand(2, -1, -1, -1))
    assert KERNELS == (3, 3, 3, 5) and len(teacher) == 4 and found.shape == (2, 2, 2)
    expected = [log_determinant(lambda v: teacher(v, position)[0], one[None]) for one in x]
    assert found.sum(dim=(1, 2)).tolist() == pytest.approx(expected, rel=1e-8)
    with torch.no_grad():
        for one in reversed(teacher):
            z = one.inverse(z, position.expand(2, -1, -1, -1))
    torch.testing.assert_close(z, x, rtol=0, atol=1e-9)


def test_the_positional_encoding_by_hand():
    found = positional_encoding(8, 3, 5)
    assert found.shape == (1, 8, 3, 5)
    for row in range(3):
        for column in range(5):
            expected = []
            for place in (column, row):
                for power in (0, 2):  # of four channels
                    angle = place / 10_000 ** (power / 4)
                    expected += [math.sin(angle), math.cos(angle)]
            assert found[0, :, row, column].tolist() == pytest.approx(expected, abs=1e-6)


# ---- AST -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ast():
    """A small one whose teacher is no mere permutation."""
    torch.manual_seed(0)
    method = AST(image_size=SIZE, teacher_width=8, student_width=8, pretrained=False)
    for one in method.teacher:
        one.gain.data.fill_(0.5)
    return method.eval()


def teacher_and_student(ast, features):
    """z, the log determinants and the student's output, float64."""
    position = positional_encoding(32, 2, 3).expand(len(features), -1, -1, -1)
    with torch.no_grad():
        z, found = ast.teacher(features, position)
        student = ast.student(torch.cat([features, position], dim=1))
    return (values.double().numpy() for values in (z, found, student))


def test_asts_losses_by_hand(ast, scenario):
    """The teacher's likelihood in each cell; then the student's distance, which moves it alone."""
    images = ResizedImages(scenario.train, SIZE)
    of_teacher, of_student = ast.phases(images)
    x = pixels(images, [2, 0], torch.device("cpu"))
    z, found, student = teacher_and_student(ast, ast.layers(x)[0].half().float())
    assert z.shape == (2, 192, 2, 3)
    cells = norm.logpdf(z).sum(axis=1) + found + 192 / 2 * math.log(2 * math.pi)
    terms = of_teacher.loss([2, 0], None)
    assert {n: t.item() for n, t in terms.items()} == {"NLL": pytest.approx(-cells.mean(), 1e-5)}
    terms = of_student.loss([2, 0], None)
    expected = pytest.approx(((z - student) ** 2).mean(), 1e-5)
    assert {n: t.item() for n, t in terms.items()} == {"distance": expected}

    ast.zero_grad()
    terms["distance"].backward()
    assert all(p.grad is None for p in ast.teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in ast.student.parameters())
    for phase, module in ((of_teacher, ast.teacher), (of_student, ast.student)):
        (group,) = phase.optimizer.param_groups
        assert {id(p) for p in group["params"]} == {id(p) for p in module.parameters()}
        assert (group["lr"], group["weight_decay"], group["eps"]) == (2e-4, 1e-5, 1e-8)


def cubic(distance):
    """Keys' kernel with a = -0.75."""
    d = abs(distance)
    if d <= 1:
        return 1.25 * d**3 - 2.25 * d**2 + 1
    return -0.75 * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def cubic_matrix(inside, outside):
    """Bicubic interpolation along one side, with the border's cells repeated."""
    matrix = np.zeros((outside, inside))
    for pixel in range(outside):
        centre = (pixel + 0.5) * inside / outside - 0.5
        for cell in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[pixel, min(max(cell, 0), inside - 1)] += cubic(centre - cell)
    return matrix


def test_asts_map_is_bicubic_and_its_score_the_mean_of_the_cells(ast, drawn):
    x = batch_of(ast, drawn[5:])
    z, _, student = teacher_and_student(ast, ast.layers(x)[0])
    cells = ((z - student) ** 2).mean(axis=1)
    maps, scores = ast.maps_and_scores(x)
    expected = cubic_matrix(2, 64) @ cells @ cubic_matrix(3, 96).T
    np.testing.assert_allclose(maps[:, 0], expected, rtol=1e-4, atol=1e-4)
    assert scores[:, 0].tolist() == pytest.approx(cells.mean(axis=(1, 2)).tolist(), rel=1e-5)
    assert (cells.max((1, 2)) > 1.02 * cells.mean((1, 2))).all()
    found = ast.predict(drawn[5:])
    assert [one.score for one in found] == pytest.approx(scores[:, 0].tolist())


def test_the_students_blocks_add_to_what_they_get(ast):
    block = ast.student[2]
    x = torch.randn(1, 8, 4, 4, generator=torch.manual_seed(0))
    with torch.no_grad():
        found = x
        for convolution, normed in ((block.layers[0], block.layers[1]), block.layers[3:5]):
            scale = normed.weight / (normed.running_var + normed.eps).sqrt()
            found = convolution(found) - normed.running_mean[:, None, None]
            found = found * scale[:, None, None] + normed.bias[:, None, None]
            found = torch.where(found > 0, found, 0.01 * found)
        torch.testing.assert_close(block(x), x + found)
    convolutions = [layer for layer in ast.student.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 1 + 4 * 2 + 1


def test_the_student_comes_nearer_to_the_teacher(scenario):
    torch.manual_seed(0)
    method = AST(image_size=64, teacher_width=8, student_width=16, pretrained=False)
    images, distances = ResizedImages(scenario.train, method.image_size), []
    for steps in (1, 40):
        method.fit(scenario, Schedule((2, steps), 4), device="cpu")
        with torch.no_grad():
            distances.append(method.phases(images)[1].loss(range(4), None)["distance"].item())
    assert distances[1] < 0.9 * distances[0]
