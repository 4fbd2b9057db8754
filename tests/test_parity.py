"""The benchmark that compares with anomalib, as far as it needs no anomalib: names and weights."""

from baselines.dsr import DSR
from baselines.fastflow import FastFlow
from benchmarks.parity import (
    DSR_RULES,
    FASTFLOW_RULES,
    NEIGHBOURS,
    Row,
    disturb,
    renamed,
    weights_of_scores,
)

import numpy as np
import pytest
import torch

UNETS = {"anomaly_detection_module", "upsampling_module"}


def small_dsr():
    return DSR(width=8, codes=16, base=4, image_size=64, pretrained=False)


def test_each_weight_of_dsr_has_a_name_of_anomalib():
    found = renamed(small_dsr().state_dict(), DSR_RULES)
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    latent = "discrete_latent_model."
    assert shapes[f"{latent}_encoder_b._conv_1.weight"] == (4, 3, 4, 4)
    assert shapes[f"{latent}_encoder_t._residual_stack._layers.1._block.1.weight"] == (4, 8, 3, 3)
    assert shapes[f"{latent}_decoder_b._residual_stack._layers.0._block.3.weight"] == (8, 4, 1, 1)
    assert shapes[f"{latent}_vq_vae_bot._embedding.weight"] == (16, 8)
    assert shapes[f"{latent}_vq_vae_top._ema_cluster_size"] == (16,)
    assert shapes["subspace_restriction_module_lo.unet.decoder.db2.3.weight"] == (16, 16, 3, 3)
    assert shapes["subspace_restriction_module_hi.unet.decoder.up3.1.weight"] == (8, 16, 3, 3)
    assert shapes["image_reconstruction_network._conv_trans_2.bias"] == (3,)
    for unet in UNETS:
        assert shapes[f"{unet}.unet.decoder.db1.0.weight"] == (16, 32, 3, 3)
        assert shapes[f"{unet}.unet.encoder.block4.3.weight"] == (16, 16, 3, 3)
    parts = {name.split(".")[0] for name in found}
    restrictions = {f"subspace_restriction_module_{level}" for level in ("lo", "hi")}
    assert parts == UNETS | restrictions | {latent[:-1], "image_reconstruction_network"}


def test_each_weight_of_fastflow_has_a_name_of_anomalib():
    read = ("layer1", "layer2", "layer3")
    fastflow = FastFlow("resnet-18", read, image_size=32, pretrained=False)
    weights = fastflow.state_dict()
    kept = {name: w for name, w in weights.items() if "normalise" not in name}
    found = renamed(kept, FASTFLOW_RULES)
    assert len(found) == len(kept) > len(weights) - 3
    assert found["feature_extractor.conv1.weight"].shape == (64, 3, 7, 7)
    assert found["feature_extractor.layer1.1.conv2.weight"].shape == (64, 64, 3, 3)
    assert found["feature_extractor.layer3.0.downsample.0.weight"].shape == (256, 128, 1, 1)
    assert found["norms.1.weight"].shape == (128, 4, 4)
    step = "fast_flow_blocks.2.module_list.7."
    assert found[f"{step}subnet.2.weight"].shape == (256, 128, 1, 1)
    ours = fastflow.flows[2].steps[7]
    assert torch.equal(found[f"{step}w_perm"], ours.mixing)
    assert torch.equal(found[f"{step}w_perm_inv"], ours.unmixing)


def test_names_without_a_rule_and_with_the_same_one():
    weights = {"a.0": torch.zeros(1), "b.0": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"what anomalib calls b\.0"):
        renamed(weights, [("a", "c")])
    with pytest.raises(ValueError, match=r"b\.0 is not the only weight"):
        renamed(weights, [("[ab]", "c")])


def test_permutations_and_codebooks_are_not_disturbed():
    dsr = small_dsr()
    flows = FastFlow("resnet-18", ("layer1",) * 3, image_size=32, pretrained=False).flows
    before = [{n: w.clone() for n, w in m.state_dict().items()} for m in (dsr, flows)]
    disturb(dsr, flows)
    for old, module in zip(before, (dsr, flows), strict=True):
        for name, weight in module.state_dict().items():
            same = "codes" in name or "mixing" in name
            assert torch.equal(weight, old[name]) == same, name


def test_the_weights_of_scores_are_those_of_equation_7():
    rng = np.random.default_rng(0)
    memory, queries = rng.normal(0, 1, (40, 5)), rng.normal(0, 1.5, (2, 12, 5))
    distances = np.linalg.norm(queries[:, :, None] - memory, axis=3)
    expected = []
    for patches, apart in zip(queries, distances, strict=True):
        farthest = apart.min(axis=1).argmax()
        nearest = memory[apart[farthest].argmin()]
        order = np.argsort(np.linalg.norm(memory - nearest, axis=1))[:NEIGHBOURS]
        scores = np.exp(np.linalg.norm(patches[farthest] - memory[order], axis=1))
        expected.append(1 - scores[0] / scores.sum())
    nearest = torch.tensor(distances.min(axis=2)).view(2, 3, 4)
    found = weights_of_scores(torch.tensor(memory), torch.tensor(queries), nearest)
    assert np.allclose(found, expected)


def test_a_difference_is_a_share_of_the_range_with_0():
    row = Row("M", "q", torch.tensor([2.0, 4.5]), torch.tensor([2.0, 4.0]))
    assert (row.largest, row.share) == (0.5, 0.125)
    assert Row("M", "q", torch.tensor(-1.0), torch.tensor(-2.0)).share == 0.5
