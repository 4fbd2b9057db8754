"""Teachers of other implementations give their output; their forward pass is written here."""

from benchmarks.peers import named_as_theirs
from effad_core import EfficientAD, RunError, open_extractor
from effad_core.datasets import normalise
from effad_core.storage.shipped import shipped

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

SHAPES = {  # of each convolution: inputs, outputs, kernel (Tables 1 and 2)
    "small": ((3, 128, 4), (128, 256, 4), (256, 256, 3), (256, 384, 4)),
    "medium": (
        *((3, 256, 4), (256, 512, 4), (512, 512, 1), (512, 512, 3), (512, 384, 4)),
        (384, 384, 1),
    ),
}
POOLED = (0, 1)  # average pooling follows the first two


class Named(nn.Module):
    """conv1, conv2, ... as anomalib keeps them."""

    def __init__(self, size):
        super().__init__()
        for number, shape in enumerate(SHAPES[size], start=1):
            setattr(self, f"conv{number}", nn.Conv2d(*shape))

    def forward(self, x):
        layers = list(self.children())
        for number, layer in enumerate(layers):
            x = layer(x)
            if number + 1 < len(layers):
                x = F.relu(x)
            if number in POOLED:
                x = F.avg_pool2d(x, 2)
        return x


def numbered(size, network):
    """The state dict of a Sequential in which activations and poolings have numbers too."""
    layers = []
    for number, layer in enumerate(network.children()):
        layers += [layer] + ([nn.ReLU()] if number + 1 < len(SHAPES[size]) else [])
        layers += [nn.AvgPool2d(2)] if number in POOLED else []
    return nn.Sequential(*layers).state_dict()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["numbered", "named", "named in a module"])
@pytest.mark.parametrize("size", ["small", "medium"])
def test_a_published_teacher_gives_its_own_output(tmp_path, size, kind, suffix):
    torch.manual_seed(0)
    theirs = Named(size).eval()
    state = numbered(size, theirs) if kind == "numbered" else theirs.state_dict()
    if kind == "named in a module":
        state = {f"model.teacher.{name}": value for name, value in state.items()}
    path = tmp_path / f"teacher{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    detector = EfficientAD(size).load_teacher(path)
    x = normalise(torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8))
    with torch.no_grad():
        torch.testing.assert_close(detector.teacher(x), theirs(x), rtol=1e-4, atol=1e-5)
    card = detector.card["teacher"]
    assert card["file"] == path.name and str(tmp_path) not in str(detector.card)


@pytest.mark.parametrize("size", ["small", "medium"])
def test_our_weights_by_their_names_give_the_same_output(size):
    theirs, ours = Named(size), EfficientAD(size).teacher
    theirs.load_state_dict(named_as_theirs(ours))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x))


def test_what_is_no_teacher_of_this_size_is_refused(tmp_path):
    detector = EfficientAD("small")
    before = {name: value.clone() for name, value in detector.teacher.state_dict().items()}
    medium, other, odd = Named("medium").state_dict(), nn.Linear(2, 2).state_dict(), {"a": 3}
    lacking = {k: v for k, v in Named("small").state_dict().items() if k != "conv2.bias"}
    for state in (medium, other, lacking, odd, {}):
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(RunError, match=r"x\.pth holds no teacher .* 0, 3, 6, 8 or conv1 to co"):
            detector.load_teacher(tmp_path / "x.pth")
    torch.save(Named("small").state_dict() | {"conv1.bias": torch.zeros(7)}, tmp_path / "x.pth")
    with pytest.raises(RunError, match=r"'0.bias' has shape \(7,\), expected \(128,\)"):
        detector.load_teacher(tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(b"no weights")
    with pytest.raises(RunError, match="cannot be read as weights"):
        detector.load_teacher(tmp_path / "x.pth")
    for name, value in detector.teacher.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(("size", "megabytes"), [("small", 6), ("medium", 17)])
def test_a_shipped_teacher_predicts_the_features_of_psi(size, megabytes):
    """Of photographs that it was not distilled from; a random one has a correlation near 0."""
    assert shipped(f"teachers/pdn_{size}.safetensors").stat().st_size < megabytes * 1e6
    images = [getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee")]
    images = [torch.from_numpy(np.ascontiguousarray(i)).permute(2, 0, 1)[None] for i in images]
    large = torch.cat([F.interpolate(i, (512, 512), mode="bilinear") for i in images])
    torch.manual_seed(0)
    random, shipped_one = EfficientAD(size, out_channels=192), EfficientAD(size).load_teacher()
    with torch.inference_mode():
        features = open_extractor()(large)[..., 4:-4, 4:-4]  # without padding T is 56 cells wide
        small = normalise(F.interpolate(large, (256, 256), mode="bilinear", antialias=True))
        found, untrained = (ad.teacher(small) for ad in (shipped_one, random))

    def correlation(output):
        """Mean over channels of the correlation with the same channel of Psi."""
        a, b = (x.transpose(0, 1).flatten(1) for x in (output, features))
        a, b = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (a, b))
        return (a * b).mean().item()

    assert correlation(found) > 0.7 and abs(correlation(untrained)) < 0.2
