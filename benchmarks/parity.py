"""PatchCore, FastFlow and DSR beside anomalib's, on the same weights and images.

    python -m benchmarks.parity
    python -m benchmarks.parity --methods dsr

Each of our networks gets random weights, which are disturbed so that none is 0 or 1, and anomalib's
gets the same; both see the same photographs. The networks are as wide as in the papers, the images
smaller and not square. What is compared:

 - FastFlow: features of WideResNet-50-2, z, log determinant and inverse of each flow, loss, map;
 - PatchCore: features, distances of patches, maps, scores, the choice of the memory;
 - DSR: codes, restored features, both images, logits, map, score, exchanged codes, losses.

It prints how far ours and theirs are apart at most, and that as a share of the range of theirs, 0
included. A quantity that differs by intent is marked by a letter and explained below the table. It
ends with an error if another one differs by more than `TOLERANCE`. It runs where anomalib is
installed: in an environment of its own, with PYTHONPATH=. .
"""

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from baselines import dsr, fastflow
from baselines.dsr import DSR, Codebook, exchanged, focal_loss
from baselines.fastflow import FastFlow, negative_log_likelihood
from baselines.layers import PatchFeatures
from baselines.maps import smoothed
from baselines.patchcore import PatchCore, coreset
from effad_core import open_pretraining
from effad_core.datasets.transforms import normalise
from effad_core.evaluation.timing import machine

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from anomalib.models.components import KCenterGreedy
    from anomalib.models.image.dsr.torch_model import DsrModel
    from anomalib.models.image.fastflow.loss import FastflowLoss
    from anomalib.models.image.fastflow.torch_model import FastflowModel
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel
    from kornia.losses import FocalLoss
except ImportError:
    DsrModel = None

SIZE = (128, 192)  # of the images
TOLERANCE = 1e-4  # largest difference of what should agree, as a share of the range
NEIGHBOURS = 9  # anomalib's, for a score's weight
SHARE = 0.1  # of the patches, in the memory
EDGE = 3  # cells at the border that a neighbourhood's mean reaches, after the resize
SEEDS = range(5)  # choices of a memory, whose radii are averaged


class Row(NamedTuple):
    """One quantity of a method, ours and theirs; `why`: what explains a difference by intent."""

    method: str
    quantity: str
    ours: Tensor
    theirs: Tensor
    why: str = ""

    @property
    def largest(self) -> float:
        """The largest absolute difference."""
        return (self.ours.double() - self.theirs.double()).abs().max().item()

    @property
    def share(self) -> float:
        """The same as a share of the range of theirs, 0 included."""
        low, high = self.theirs.min().clamp(max=0), self.theirs.max().clamp(min=0)
        return self.largest / (high - low).item()


# --- the same weights under anomalib's names -----------------------------------------------------

STACK = [
    (rf"(\d)\.{ours}\.", rf"_residual_stack._layers.\1._block.{theirs}.")
    for ours, theirs in (("squeeze", 1), ("widen", 3))
]
DECODER = [
    (r"0\.", "_conv_1."),
    *((rf"1\.{ours}", theirs) for ours, theirs in STACK),
    (r"2\.", "_conv_trans_1."),
    (r"4\.", "_conv_trans_2."),
]
QUANTISER = [
    ("entries", "_embedding.weight"),
    ("mean", "_ema_w"),
    ("usage", "_ema_cluster_size"),
]
RESTRICTION = [
    (r"0\.", "encoder.block1."),
    (r"2\.", "encoder.block2."),
    (r"4\.", "encoder.block3."),
    (r"6\.0\.", "decoder.up2.1."),
    (r"6\.3\.", "decoder.db2.0."),
    (r"6\.6\.", "decoder.db2.3."),
    (r"8\.0\.", "decoder.up3.1."),
    (r"8\.3\.", "decoder.db3.0."),
    (r"8\.6\.", "decoder.db3.3."),
    (r"9\.", "decoder.fin_out.0."),
]
UNET = [
    *((rf"down\.{i}\.", f"encoder.block{i + 1}.") for i in range(3)),
    (r"bottom\.", "encoder.block4."),
    *((rf"up\.{i}\.0\.", f"decoder.up{i + 1}.1.") for i in range(3)),
    *((rf"merge\.{i}\.", f"decoder.db{i + 1}.") for i in range(3)),
    (r"head\.", "decoder.fin_out.0."),
]


def within(ours: str, theirs: str, rules: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rules for what is inside a module: its names, ours and theirs, in front of each."""
    return [(ours + pattern, theirs + name) for pattern, name in rules]


LATENT = "discrete_latent_model."
# beginning of a name of ours, a regular expression -> of theirs, of which \1 is the group
DSR_RULES = [
    *within(r"autoencoder\.encoder_high\.", LATENT + "_encoder_b.", [
        (r"0\.", "_conv_1."), (r"2\.", "_conv_2."), (r"4\.", "_conv_3."),
        *within(r"5\.", "", STACK),
    ]),
    *within(r"autoencoder\.encoder_low\.", LATENT + "_encoder_t.", [
        (r"0\.", "_conv_1."), (r"2\.", "_conv_2."), *within(r"4\.", "", STACK),
    ]),
    *within(r"autoencoder\.", LATENT, [
        (r"to_low\.", "_pre_vq_conv_top."), (r"to_high\.", "_pre_vq_conv_bot."),
        *within(r"codes_low\.", "_vq_vae_top.", QUANTISER),
        *within(r"codes_high\.", "_vq_vae_bot.", QUANTISER),
        (r"enlarge\.", "upsample_t."), *within(r"decoder\.", "_decoder_b.", DECODER),
    ]),
    *within(r"restrict_low\.", "subspace_restriction_module_lo.unet.", RESTRICTION),
    *within(r"restrict_high\.", "subspace_restriction_module_hi.unet.", RESTRICTION),
    *within(r"object_decoder\.", "image_reconstruction_network.", [
        (r"0\.", "block1."), (r"2\.", "block2."), (r"4\.", "pre_vq_conv."), (r"5\.", "upblock1."),
        (r"7\.", "upblock2."), *within(r"9\.", "", DECODER),
    ]),
    *within(r"detect\.", "anomaly_detection_module.unet.", UNET),
    *within(r"upsample\.", "upsampling_module.unet.", UNET),
]  # fmt: skip
RESNET_RULES = [
    (r"layer1\.0\.", "conv1."),
    (r"layer1\.1\.", "bn1."),
    (r"layer1\.4\.", "layer1."),
    (r"layer([23])\.", r"layer\1."),
]
STEP = r"flows\.(\d)\.steps\.(\d)\."
FASTFLOW_RULES = [
    *within(r"layers\.parts\.", "feature_extractor.", RESNET_RULES),
    (r"flows\.(\d)\.norm\.", r"norms.\1."),
    *within(STEP, r"fast_flow_blocks.\1.module_list.\2.", [
        ("subnet", "subnet"), ("raw_scale", "global_scale"), ("offset", "global_offset"),
        ("mixing", "w_perm"), ("unmixing", "w_perm_inv"),
    ]),
]  # fmt: skip


def renamed(weights: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Weights by anomalib's names.

    Args:
        weights: a state dict of ours.
        rules: the beginning of a name, a regular expression, and what takes its place; the first
            that fits is taken.

    Raises:
        ValueError: if no rule fits a name, or two weights get the same one.
    """
    found = {}
    for name, tensor in weights.items():
        fitting = (rule for rule in rules if re.match(rule[0], name))
        pattern, theirs = next(fitting, (None, None))
        if pattern is None:
            raise ValueError(f"no rule says what anomalib calls {name}")
        new = re.sub(f"^{pattern}", theirs, name, count=1)
        if new in found:
            raise ValueError(f"{name} is not the only weight that anomalib calls {new}")
        found[new] = tensor
    return found


@torch.no_grad()
def disturb(*modules: nn.Module) -> None:
    """Change each weight at random by a fifth and by 0.02, but permutations and codebooks."""
    for part in (part for module in modules for part in module.modules()):
        for name, weight in part.named_parameters(recurse=False):
            if not isinstance(part, Codebook) and not name.endswith("mixing"):
                weight *= 1 + 0.2 * torch.randn_like(weight)
                weight += 0.02 * torch.randn_like(weight)


# --- FastFlow ------------------------------------------------------------------------------------


def compare_fastflow(images: Tensor) -> Iterator[Row]:
    paper = FastFlow.profile("paper").arguments
    ours = FastFlow(**paper, image_size=SIZE, pretrained=False)
    disturb(ours.flows)
    ours.eval()
    theirs = FastflowModel(SIZE, "wide_resnet50_2", pre_trained=False, flow_steps=fastflow.STEPS)
    weights = {n: w for n, w in ours.state_dict().items() if not n.startswith("layers.normalise.")}
    theirs.load_state_dict(renamed(weights, FASTFLOW_RULES))
    theirs.train()  # in which it returns what is inside
    layers, inputs = ours.layers(images), normalise(images)
    own = [flow(features) for flow, features in zip(ours.flows, layers, strict=True)]
    z, log_determinants = theirs(inputs)
    backbone = theirs.feature_extractor(inputs)
    for number, ((own_z, own_log), features) in enumerate(zip(own, layers, strict=True)):
        name = paper["read"][number]
        yield Row("FastFlow", f"{name}, features", features, backbone[number])
        yield Row("FastFlow", f"{name}, z", own_z, z[number])
        yield Row("FastFlow", f"{name}, log determinant", own_log, log_determinants[number])
        undone = own_z
        for step in reversed(ours.flows[number].steps):
            undone = step.inverse(undone)
        backwards, _ = theirs.fast_flow_blocks[number](z[number], rev=True)
        yield Row("FastFlow", f"{name}, the flow backwards", undone, backwards)
    loss = sum(negative_log_likelihood(*output) for output in own)
    yield Row("FastFlow", "loss", loss, FastflowLoss()(z, log_determinants))
    theirs.eval()
    found = theirs(inputs)
    maps, scores = ours.maps_and_scores(images)
    why = "theirs is -exp(-mean(z^2) / 2), ours 1 - exp(-mean(z^2) / 2): 1 apart everywhere"
    yield Row("FastFlow", "map, as it is", maps, found.anomaly_map, why)
    yield Row("FastFlow", "map, 1 added to theirs", maps, found.anomaly_map + 1)
    yield Row("FastFlow", "score, 1 added to theirs", scores, found.pred_score.view(-1, 1) + 1)


# --- PatchCore -----------------------------------------------------------------------------------


class Given(nn.Module):
    """Features of ours as those of anomalib's only layer, in float64."""

    def __init__(self, features: nn.Module):
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"given": self.features(images.to(torch.uint8)).double()}


def compare_patchcore(images: Tensor) -> Iterator[Row]:
    network = PatchFeatures("resnet-18", ("layer2", "layer3"), pretrained=False)
    half = len(images) // 2
    normal, test = images[:half], images[half:]
    ours = PatchCore(image_size=SIZE, features=network).eval()
    theirs = PatchcoreModel(["layer2", "layer3"], "resnet18", pre_trained=False, num_neighbors=1)
    backbone = theirs.feature_extractor.feature_extractor
    backbone.load_state_dict(renamed(network.layers.parts.state_dict(), RESNET_RULES))
    theirs.train()  # in which it returns patches
    theirs.feature_extractor.eval()
    features = network(normal)
    patches = PatchcoreModel.reshape_embedding(features)
    grid = features.permute(0, 2, 3, 1)
    embedding = theirs(normalise(normal)).view(grid.shape)
    inside = (slice(None), slice(EDGE, -EDGE), slice(EDGE, -EDGE))
    yield Row("PatchCore", "features, away from the border", grid[inside], embedding[inside])
    why = (
        "in a mean over 3x3 cells theirs counts the zeros beyond the border, ours the cells alone "
        "(with `pooled`, which is the authors' way, ours counts the zeros, too)"
    )
    yield Row("PatchCore", "features, all cells", grid, embedding, why)
    pooled = PatchFeatures("resnet-18", ("layer2",), pooled=128, channels=128, pretrained=False)
    pooled.layers.load_state_dict({
        name: tensor
        for name, tensor in network.layers.state_dict().items()
        if not name.startswith("parts.layer3.")
    })  # fmt: skip
    layer = network.layers(normal)[0]
    yield Row("PatchCore", "features, pooled", pooled(normal), theirs.feature_pooler(layer))

    count = int(SHARE * len(patches))
    ours.memory = patches[coreset(patches, count)]
    theirs.memory_bank = ours.memory.clone()
    queries = PatchcoreModel.reshape_embedding(network(test))
    distances = ours.distances(test)
    found, _ = theirs.nearest_neighbors(queries, 1)
    why = (
        "theirs takes differences of large squares in float32; ours are those of float64, see below"
    )
    yield Row("PatchCore", "distances, theirs in float32", distances, found.view_as(distances), why)
    theirs.double().eval()
    theirs.layers, theirs.feature_extractor = ["given"], Given(network)
    theirs.feature_pooler = nn.Identity()
    found, _ = theirs.nearest_neighbors(queries.double(), 1)
    found = found.view_as(distances)
    yield Row("PatchCore", "distances, theirs in float64", distances, found)
    result = theirs(test)
    maps, scores = ours.maps_and_scores(test)
    why = (
        "theirs resizes the distances to the nearest cell before the Gaussian, ours bilinearly, as "
        "the authors do"
    )
    yield Row("PatchCore", "map, as it is", maps, result.anomaly_map, why)
    resized = F.interpolate(found[:, None], size=SIZE, mode="bilinear")
    blurred = theirs.anomaly_map_generator.blur(resized)
    yield Row("PatchCore", "map, theirs resized bilinearly", maps, blurred)
    nearest = smoothed(ours.shown_and_judged(test)[1])
    yield Row("PatchCore", "map, ours resized to the nearest", nearest, result.anomaly_map)
    yield Row("PatchCore", "score, 1 neighbour", scores, result.pred_score.view(-1, 1))
    theirs.num_neighbors = NEIGHBOURS
    weighted = theirs(test).pred_score.view(-1, 1)
    why = (
        "theirs multiplies the largest distance by the paper's weight of its neighbours; ours does "
        "not, as the authors' code, see below"
    )
    yield Row("PatchCore", f"score, {NEIGHBOURS} neighbours", scores, weighted, why)
    weights = weights_of_scores(
        ours.memory, queries.view(len(test), -1, queries.shape[1]), distances
    )
    own = scores * weights[:, None]
    yield Row("PatchCore", f"score, {NEIGHBOURS}, ours times the weight", own, weighted)

    few = patches[:, :128]  # of which ours takes no projection
    with contextlib.redirect_stderr(io.StringIO()):  # their progress bars
        torch.manual_seed(0)  # so that both begin with the same patch
        chosen = torch.tensor(KCenterGreedy(few[..., None], SHARE).select_coreset_idxs())
        yield Row("PatchCore", "memory's patches, no projection", coreset(few, count), chosen)
        radii = []
        for seed in SEEDS:
            torch.manual_seed(seed)
            np.random.seed(seed)  # of scikit-learn, which draws their projection
            choice = KCenterGreedy(patches, SHARE).select_coreset_idxs()
            radii.append([radius(patches, c) for c in (coreset(patches, count, seed), choice)])
    own, other = torch.tensor(radii).mean(dim=0)
    why = (
        f"the random projections are different: means of {len(SEEDS)} choices of {count} of "
        f"{len(patches)} patches are {own:.3f} (ours) and {other:.3f} (theirs)"
    )
    yield Row("PatchCore", "memory's covering radius", own, other, why)


def weights_of_scores(memory: Tensor, queries: Tensor, distances: Tensor) -> Tensor:
    """The weights of PatchCore's paper (its equation 7), shape (N,).

    Args:
        memory: shape (M, C).
        queries: patches of each image, shape (N, n, C).
        distances: of each of them from the memory, shape (N, h, w).
    """
    found = []
    for patches, own in zip(queries.double(), distances.flatten(1), strict=True):
        apart = (memory - patches[own.argmax()]).norm(dim=1)  # of the farthest patch
        nearest = memory[apart.argmin()]
        near = (memory.double() - nearest).norm(dim=1).argsort()[:NEIGHBOURS]
        found.append(1 - apart[near].softmax(dim=0)[0])  # the first of them is `nearest`
    return torch.stack(found)


def radius(patches: Tensor, chosen: Sequence[int]) -> float:
    """How far a patch is at most from the nearest of those chosen."""
    return torch.cdist(patches, patches[chosen]).min(dim=1).values.max().item()


# --- DSR -----------------------------------------------------------------------------------------


def compare_dsr(images: Tensor) -> Iterator[Row]:
    paper = DSR.profile("paper").arguments
    images = images[:2]
    ours = DSR(**paper, image_size=SIZE, pretrained=False)
    codes = ours.autoencoder
    disturb(ours)
    scaled = images.float() / 255
    encoded = codes.encoder_high(scaled)
    features_low = codes.features_low(encoded)
    fill_codes(codes.codes_low, features_low, ours.restrict_low(features_low))
    low = codes.codes_low(features_low)
    features_high = codes.features_high(encoded, low)
    fill_codes(codes.codes_high, features_high, ours.restrict_high(features_high))
    high = codes.codes_high(features_high)
    ours.eval()

    theirs = DsrModel(embedding_dim=paper["width"], num_embeddings=paper["codes"]).eval()
    theirs.load_state_dict(renamed(ours.state_dict(), DSR_RULES))
    seen = {}
    for name, module in theirs.named_children():
        module.register_forward_hook(lambda m, i, output, name=name: seen.update({name: output}))
    result = theirs(scaled)
    latent = seen["discrete_latent_model"]
    coarse, refined = ours.logits(images.float() / 255)
    normal, general = ours.both(low, high)
    maps, scores = ours.maps_and_scores(images)
    for level, short, own, key, restrict, book in (
        ("low", "lo", low, "quantized_t", ours.restrict_low, codes.codes_low),
        ("high", "hi", high, "quantized_b", ours.restrict_high, codes.codes_high),
    ):
        restored = restrict(own)
        features, quantised = seen[f"subspace_restriction_module_{short}"]
        yield Row("DSR", f"{level} codes ({different(own)})", own, latent[key])
        yield Row("DSR", f"{level} features, restored", restored, features)
        again = book(restored)
        yield Row("DSR", f"{level} codes, restored ({different(again)})", again, quantised)
    yield Row("DSR", "general image", general, latent["recon_image"])
    yield Row("DSR", "object-specific image", normal, seen["image_reconstruction_network"])
    yield Row("DSR", "coarse logits", coarse, seen["anomaly_detection_module"])
    yield Row("DSR", "refined logits", refined, seen["upsampling_module"])
    yield Row("DSR", "map", maps, result.anomaly_map[:, None])
    yield Row("DSR", "score", scores, result.pred_score.view(-1, 1))

    masks = torch.zeros(len(images), 1, *SIZE)
    masks[:, :, 37:90, 50:131] = 1
    # so many that the nearest twentieth and one more are left: nothing is random
    strengths = torch.full((len(images),), int(dsr.NEAREST * paper["codes"]) / paper["codes"])
    for level, features, own, book, other in (
        ("low", features_low, low, codes.codes_low, theirs.discrete_latent_model.vq_vae_top),
        ("high", features_high, high, codes.codes_high, theirs.discrete_latent_model.vq_vae_bot),
    ):
        found = theirs.discrete_latent_model.generate_fake_anomalies_joined(
            features, own, other.embedding.weight, masks, strengths
        )
        yield Row(
            "DSR",
            f"{level} codes, exchanged",
            exchanged(features, own, book, masks, strengths),
            found,
        )

    theirs.train()  # in which it returns what its loss takes
    empty = torch.zeros_like(masks)  # so that what is exchanged at random is nothing
    trained, losses = theirs(scaled, empty), ours.restoring_loss(scaled, empty)
    for name, found in {
        "low": F.mse_loss(trained["recon_feat_lo"], trained["embedding_top"]),
        "high": F.mse_loss(trained["recon_feat_hi"], trained["embedding_bot"]),
        "image": 10 * F.mse_loss(trained["obj_spec_image"], scaled),
    }.items():
        yield Row("DSR", f"loss, {name}", losses[name], found)
    target, own = masks[:, 0].long(), focal_loss(coarse, masks)
    summed = FocalLoss(None, reduction="sum")(coarse, target)
    yield Row("DSR", "focal loss, kornia's of logits", own, summed / target.numel())
    why = (
        "theirs gives probabilities to kornia's loss, which takes logits; its alpha = 1 counts no "
        "background, its mean is over classes too; ours is the authors' without their smoothing of "
        "1e-5, and kornia's with other arguments, see the line above"
    )
    found = FocalLoss(1, reduction="mean")(coarse.softmax(dim=1), target)
    yield Row("DSR", "focal loss, as it is", own, found, why)


@torch.no_grad()
def fill_codes(codebook: Codebook, *features: Tensor) -> None:
    """Codes that cells of these features are near to, so that many are chosen."""
    cells = torch.cat([f.transpose(0, 1).flatten(1).T for f in features])
    drawn = cells[torch.randint(len(cells), (len(codebook.entries),))]
    codebook.entries.copy_(drawn + 0.1 * cells.std(dim=0) * torch.randn_like(drawn))


def different(codes: Tensor) -> str:
    """How many different codes there are."""
    cells = codes.transpose(0, 1).flatten(1).T
    return f"{len(cells.round(decimals=4).unique(dim=0))} different"


# --- the table -----------------------------------------------------------------------------------

METHODS: dict[str, Callable[[Tensor], Iterator[Row]]] = {
    "fastflow": compare_fastflow,
    "patchcore": compare_patchcore,
    "dsr": compare_dsr,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0, help="of weights and images")
    args = parser.parse_args(arguments)
    if DsrModel is None:
        parser.error("anomalib is not installed here")
    print(machine(torch.device("cpu")), flush=True)
    images = open_pretraining().crops(np.random.default_rng(args.seed), 4, max(SIZE))
    images = images[:, :, : SIZE[0], : SIZE[1]].contiguous()
    reasons, wrong = [], []
    print(f"{'method':<10} {'quantity':<38} {'apart at most':>13} {'of the range':>13}")
    for method in args.methods:
        torch.manual_seed(args.seed)
        with torch.no_grad():
            for row in METHODS[method](images):
                letter = ""
                if row.why:
                    letter = chr(ord("a") + len(reasons))
                    reasons.append(row.why)
                elif not row.share <= TOLERANCE:
                    wrong.append(f"{row.method}: {row.quantity}")
                numbers = f"{row.largest:>13.1e} {row.share:>13.1e}"
                print(
                    f"{row.method:<10} {row.quantity:<38} {numbers} {letter}".rstrip(), flush=True
                )
    for number, reason in enumerate(reasons):
        print(f"{chr(ord('a') + number)}: {reason}")
    if wrong:
        sys.exit(f"more than {TOLERANCE:g} of the range apart: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
