"""CSA: published layout, data flow, each image's own mask, the consistency loss's features, and the contract."""

from __future__ import annotations

import itertools

import pytest
import torch
from inpaint_kernels.models.csa import (
    CSA,
    CoarseGenerator,
    FeaturePatchDiscriminator,
    PatchDiscriminator,
    RefinementGenerator,
)
from torch import Tensor

from inpaint_kernels import coherent_semantic_attention
from tests.model_cases import CASES
from tests.model_contract import Case, contract, record_inputs
from tests.model_pairs import CSA_CHANNELS, CSA_DEPTH, hashed_image, holes

SIZE = (64, 72)


@pytest.fixture(scope="module")
def case() -> Case:
    return CASES["csa"]()


@contract
def test_contract(promise, case):
    promise(case)


# The published layout -------------------------------------------------------------------------------------------------

Shapes = dict[str, tuple[int, ...]]
WIDTHS = (64, 128, 256, 512, 512, 512, 512, 512)


def _conv(shapes: Shapes, name: str, *weight: int, outputs: int) -> None:
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, (outputs,)


def _norm(shapes: Shapes, name: str, channels: int) -> None:
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (channels,), (channels,)


def coarse_shapes() -> Shapes:
    shapes: Shapes = {}
    _conv(shapes, "model.model.0", 64, 3, 4, 4, outputs=64)
    _conv(shapes, "model.model.3", 128, 3, 4, 4, outputs=3)
    prefix = "model.model.1.model."
    for outer, inner in itertools.pairwise(WIDTHS[:7]):
        _conv(shapes, f"{prefix}1", inner, outer, 4, 4, outputs=inner)
        _norm(shapes, f"{prefix}2", inner)
        _conv(shapes, f"{prefix}5", 2 * inner, outer, 4, 4, outputs=outer)
        _norm(shapes, f"{prefix}6", outer)
        prefix += "3.model."
    return shapes | innermost_shapes(prefix)


def refinement_shapes() -> Shapes:
    shapes: Shapes = {}
    _conv(shapes, "model.model.0", 64, 6, 3, 3, outputs=64)
    _conv(shapes, "model.model.3", 128, 3, 3, 3, outputs=3)
    prefix = "model.model.1.model."
    for i, (outer, inner) in enumerate(itertools.pairwise(WIDTHS)):
        second_norm, deeper, *up = (7, 8, 11, 12, 14, 15) if i == 2 else (5, 6, 8, 9, 11, 12)
        _conv(shapes, f"{prefix}1", outer, outer, 4, 4, outputs=outer)
        _norm(shapes, f"{prefix}2", outer)
        _conv(shapes, f"{prefix}4", inner, outer, 3, 3, outputs=inner)
        _norm(shapes, f"{prefix}{second_norm}", inner)
        _conv(shapes, f"{prefix}{up[0]}", 2 * inner, outer, 3, 3, outputs=outer)
        _norm(shapes, f"{prefix}{up[1]}", outer)
        _conv(shapes, f"{prefix}{up[2]}", outer, outer, 4, 4, outputs=outer)
        _norm(shapes, f"{prefix}{up[3]}", outer)
        prefix += f"{deeper}.model."
    return shapes | innermost_shapes(prefix)


def innermost_shapes(prefix: str) -> Shapes:
    shapes: Shapes = {}
    _conv(shapes, f"{prefix}1", 512, 512, 4, 4, outputs=512)
    _conv(shapes, f"{prefix}3", 512, 512, 4, 4, outputs=512)
    _norm(shapes, f"{prefix}4", 512)
    return shapes


def patch_shapes() -> Shapes:
    shapes: Shapes = {}
    for index, inputs, outputs in ((0, 3, 64), (2, 64, 128), (5, 128, 256), (8, 256, 512), (11, 512, 1)):
        _conv(shapes, f"model.{index}", outputs, inputs, 4, 4, outputs=outputs)
        if 0 < index < 11:
            _norm(shapes, f"model.{index + 1}", outputs)
    return shapes


def feature_shapes() -> Shapes:
    shapes: Shapes = {}
    for index, inputs in ((0, 256), (2, 512), (5, 512)):
        _conv(shapes, f"model.{index}", 512, inputs, 4, 4, outputs=512)
    return shapes


@pytest.mark.parametrize(
    ("build", "expected", "tensors", "parameters"),
    [
        (CoarseGenerator, coarse_shapes(), 58, 54_419_459),
        (RefinementGenerator, refinement_shapes(), 122, 77_692_291),
        (PatchDiscriminator, patch_shapes(), 16, 2_766_529),
        (FeaturePatchDiscriminator, feature_shapes(), 6, 10_487_296),
    ],
    ids=["coarse", "refinement", "patch_discriminator", "feature_discriminator"],
)
def test_keys_shapes_and_parameters_are_the_published_ones(build, expected, tensors, parameters):
    with torch.device("meta"):
        network = build()
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == expected
    assert len(expected) == tensors
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_system_holds_both_networks():
    with torch.device("meta"):
        model = CSA()
    assert {name.split(".")[0] for name in model.state_dict()} == {"coarse_generator", "refinement_generator"}
    assert model.coarse_generator.state_dict().keys() == coarse_shapes().keys()
    assert model.refinement_generator.state_dict().keys() == refinement_shapes().keys()


def test_discriminators_score_patches():
    assert PatchDiscriminator(channels=4)(torch.rand(2, 3, 256, 128)).shape == (2, 1, 30, 14)
    assert FeaturePatchDiscriminator(8, 16)(torch.rand(2, 8, 32, 24)).shape == (2, 16, 4, 3)


# Data flow ------------------------------------------------------------------------------------------------------------


def test_networks_see_the_published_inputs(case, monkeypatch):
    seen = record_inputs(monkeypatch, case.model.coarse_generator, case.model.refinement_generator)
    image, mask = case.inputs()
    result = case.run(image, mask)
    hole = (mask > 0.5).expand_as(image)
    (coarse_input,), (refinement_input, flags) = seen
    for channel, mean in enumerate((123, 104, 117)):  # red, and green and blue swapped
        assert coarse_input[:, channel][hole[:, channel]].sub(2 * mean / 255 - 1).abs().max() < 1e-6
    assert torch.equal(coarse_input[~hole], (2 * image - 1)[~hole])
    first, second = refinement_input.split(3, 1)
    assert torch.equal(second, (2 * image - 1).masked_fill(hole, 0))
    assert (first - torch.where(hole, 2 * result.coarse - 1, 2 * image - 1)).abs().max() < 1e-6
    assert flags.shape == (2, SIZE[0] // 8, SIZE[1] // 8)
    assert flags.any()
    assert not torch.equal(flags[0], flags[1])


def test_every_call_has_its_own_masks(case):
    image, mask = case.inputs()
    before = case.run(image, mask)
    other = case.run(image, mask.flip(3))
    again = case.run(image, mask)
    assert torch.equal(again.output, before.output)
    assert not torch.equal(other.output, before.output)


def test_features_are_those_of_the_consistency_loss(case):
    image, mask = case.inputs()
    model, hole = case.model, mask > 0.5
    layer = model.refinement_generator.levels()[2].model
    taken: dict[str, Tensor] = {}
    hooks = [
        layer["5"].register_forward_hook(lambda m, args, y: taken.update(before=args[0].clone(), flags=args[1])),
        layer["7"].register_forward_hook(lambda m, args, y: taken.update(skip=y.clone())),
        layer["12"].register_forward_pre_hook(lambda m, args: taken.update(decoded=args[0].clone())),
    ]
    with torch.no_grad():
        stages = model.stages(image, hole, return_features=True)
    for hook in hooks:
        hook.remove()
    assert torch.equal(stages.attention, coherent_semantic_attention(taken["before"], taken["flags"]))
    assert stages.attention.shape == stages.decoder.shape == (2, 8 * CSA_CHANNELS, SIZE[0] // 8, SIZE[1] // 8)
    decoded = layer["11"](torch.cat([stages.decoder, taken["skip"]], 1).relu())
    assert (taken["decoded"] - decoded).abs().max() < case.tolerance
    assert stages.decoder.min() < 0
    plain = model.stages(image, hole)
    assert plain.attention is plain.decoder is None
    assert (plain.output - stages.output).abs().max() < case.tolerance


def test_consistency_loss_trains_the_encoder(case):
    image, mask = case.inputs()
    stages = case.model.stages(image, mask > 0.5, return_features=True)
    (gradient,) = torch.autograd.grad(
        stages.attention.square().mean() + stages.decoder.square().mean(),
        case.model.refinement_generator.model.model["0"].weight,
    )
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize("size", [(64, 64), (72, 104), (136, 64)])
def test_sides_that_are_no_powers_of_two(case, size):
    image, mask = hashed_image(size, 1).float(), holes(size, 1).float()
    assert case.run(image, mask).completed.shape == (1, 3, *size)


def test_attention_options_reach_the_layer():
    image, hole = hashed_image(SIZE, 1).float(), holes(SIZE, 1) > 0.5
    torch.manual_seed(0)
    official = CSA(CSA_CHANNELS, CSA_DEPTH).eval()
    paper = CSA(CSA_CHANNELS, CSA_DEPTH, variant="paper", gradient="exact").eval()
    paper.load_state_dict(official.state_dict())
    with torch.no_grad():
        assert not torch.equal(paper(image, hole).output, official(image, hole).output)
    with pytest.raises(ValueError, match="gradient"):
        CSA(CSA_CHANNELS, CSA_DEPTH, gradient="none")


@pytest.mark.parametrize(("arguments", "message"), [((0, 8), "channels"), ((8, 4), "depth: expected a number >= 5")])
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CSA(*arguments)
