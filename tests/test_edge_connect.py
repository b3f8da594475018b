"""EdgeConnect: published layout, guidance by edges, spectral norms, and the contract of models."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from inpaint_kernels.models import edge_connect
from inpaint_kernels.models.edge_connect import (
    Discriminator,
    EdgeGenerator,
    InpaintGenerator,
    canny,
    fold_spectral_norm,
    to_gray,
)

from benches.peer_models import relative_error
from tests.model_cases import CASES
from tests.model_contract import Case, contract, record_inputs
from tests.model_pairs import hashed_image, holes

SIZE = (24, 32)


@pytest.fixture(scope="module")
def case() -> Case:
    return CASES["edge_connect"]()


@contract
def test_contract(promise, case):
    promise(case)


# The published layout -------------------------------------------------------------------------------------------------

Shapes = dict[str, tuple[int, ...]]


def generator_shapes(inputs: int, outputs: int, *, spectral_norm: bool) -> Shapes:
    """Every published entry, by the rules that the listings follow."""
    shapes: Shapes = {}

    def layer(name: str, weight: tuple[int, ...], *, channels: int, bias: bool = True, spectral: bool = True) -> None:
        if spectral and spectral_norm:
            numbers = torch.Size(weight).numel()
            shapes[f"{name}.weight_orig"] = weight
            shapes[f"{name}.weight_u"] = (channels,)
            shapes[f"{name}.weight_v"] = (numbers // channels,)
        else:
            shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = (channels,)

    for index, weight in ((1, (64, inputs, 7, 7)), (4, (128, 64, 4, 4)), (7, (256, 128, 4, 4))):
        layer(f"encoder.{index}", weight, channels=weight[0])
    for block in range(8):
        for index in (1, 5):
            layer(f"middle.{block}.conv_block.{index}", (256, 256, 3, 3), channels=256, bias=not spectral_norm)
    layer("decoder.0", (256, 128, 4, 4), channels=128)  # transposed: the norm is that over the second dimension
    layer("decoder.3", (128, 64, 4, 4), channels=64)
    layer("decoder.7", (outputs, 64, 7, 7), channels=outputs, spectral=False)
    return shapes


def discriminator_shapes(inputs: int) -> Shapes:
    shapes: Shapes = {}
    for names, weight in (
        (("conv1", "features"), (64, inputs, 4, 4)),
        (("conv2",), (128, 64, 4, 4)),
        (("conv3",), (256, 128, 4, 4)),
        (("conv4",), (512, 256, 4, 4)),
        (("conv5",), (1, 512, 4, 4)),
    ):
        for name in names:
            shapes[f"{name}.0.weight_orig"] = weight
            shapes[f"{name}.0.weight_u"] = (weight[0],)
            shapes[f"{name}.0.weight_v"] = (16 * weight[1],)
    return shapes


@pytest.mark.parametrize(
    ("build", "expected", "parameters"),
    [
        (EdgeGenerator, generator_shapes(3, 1, spectral_norm=True), 10_761_089),
        (InpaintGenerator, generator_shapes(4, 3, spectral_norm=False), 10_774_595),
        (lambda: Discriminator(2), discriminator_shapes(2), 2_762_752),
        (lambda: Discriminator(3), discriminator_shapes(3), 2_763_776),
    ],
    ids=["edge_generator", "inpaint_generator", "edge_discriminator", "image_discriminator"],
)
def test_keys_shapes_and_parameters_are_the_published_ones(build, expected, parameters):
    network = build()
    assert {name: tuple(value.shape) for name, value in network.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_initial_weights_are_normal_and_biases_zero():
    for network in (EdgeGenerator(1), InpaintGenerator(1), Discriminator(3, use_spectral_norm=False)):
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any()
            else:
                assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name


# Discriminator --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_sigmoid", [True, False])
@pytest.mark.parametrize("use_spectral_norm", [True, False])
def test_discriminator_scores_patches_and_gives_all_maps(use_sigmoid, use_spectral_norm):
    network = Discriminator(3, use_sigmoid, use_spectral_norm)
    score, maps = network(hashed_image((64, 96), 2).float())
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 32, 48), (128, 16, 24), (256, 8, 12), (512, 7, 11), (1, 6, 10)]
    assert torch.equal(score, maps[-1].sigmoid() if use_sigmoid else maps[-1])
    assert any(name.endswith("bias") for name, _ in network.named_parameters()) != use_spectral_norm
    score.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


# Spectral norm --------------------------------------------------------------------------------------------------------


def test_folded_spectral_norm_is_exact_and_keeps_the_plain_keys():
    network = EdgeGenerator(1)
    x = torch.rand(1, 3, *SIZE)
    for _ in range(2):
        network(x)  # power iterations
    network.eval()
    with torch.no_grad():
        expected = network(x)
        folded = fold_spectral_norm(copy.deepcopy(network))
        assert torch.equal(folded(x), expected)
    assert relative_error(folded(x), expected) < 1e-6  # recorded; the folded weights are parameters
    plain = EdgeGenerator(1, use_spectral_norm=False).state_dict()
    assert folded.state_dict().keys() == {name for name in plain if "middle" not in name or "weight" in name}
    folded(x).mean().backward()
    folded.load_state_dict(folded.state_dict())
    assert fold_spectral_norm(folded) is folded
    weight = folded.encoder["4"].weight.detach()
    assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() < 1.6


def test_published_norm_of_a_transposed_convolution_is_that_of_its_outputs():
    layer: Any = EdgeGenerator(1).eval().decoder["0"]
    layer(torch.rand(1, 256, 2, 2))
    matrix = layer.weight_orig.transpose(0, 1).flatten(1)
    sigma = layer.weight_u @ matrix @ layer.weight_v
    assert torch.allclose(layer.weight, layer.weight_orig / sigma)


# Edges ----------------------------------------------------------------------------------------------------------------


def test_known_edges_are_cannys(case, monkeypatch):
    feature, color = pytest.importorskip("skimage.feature"), pytest.importorskip("skimage.color")
    image, mask = hashed_image((40, 48), 2).float(), holes((40, 48), 2)
    found = canny(image, mask > 0.5, sigma=1.5)
    for one, hole, ours in zip(image.double(), mask, found, strict=True):
        gray = color.rgb2gray(one.permute(1, 2, 0).numpy())
        theirs = feature.canny(gray, sigma=1.5, mask=(hole[0] < 0.5).numpy())
        assert torch.equal(ours[0].bool(), torch.from_numpy(theirs))
    assert found.dtype == torch.float32
    assert found.sum() > 20
    assert not (found * mask).any()
    expected = case.run(image, mask, canny_edges=found)
    assert torch.equal(case.run(image, mask, canny_edges=None, sigma=1.5).output, expected.output)
    assert not torch.equal(case.run(image, mask, canny_edges=None).output, expected.output)


def test_absent_scikit_image_is_named_with_the_alternative(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    image, mask = case.inputs()
    with pytest.raises(ModuleNotFoundError, match=r"pip install scikit-image, or pass canny_edges="):
        case.run(image, mask, canny_edges=None)
    case.run(image, mask)


def test_generators_see_the_published_inputs(case, monkeypatch):
    seen = record_inputs(monkeypatch, case.model.edge_generator, case.model.inpaint_generator)
    image, mask = case.inputs()
    known = case.guidance["canny_edges"]
    result = case.run(image, mask)
    hole = mask > 0.5
    gray = to_gray(image)
    assert torch.equal(seen[0][0], torch.cat([torch.where(hole, 1, gray), torch.where(hole, 0, known), mask], 1))
    assert torch.equal(seen[1][0], torch.cat([torch.where(hole, 1, image), result.edges], 1))


def test_composite_keeps_the_known_edges(case):
    image, mask = case.inputs()
    known = case.guidance["canny_edges"]
    plain, composite = case.run(image, mask), case.run(image, mask, edge_composite=True)
    assert torch.equal(composite.edges, torch.where(mask > 0.5, plain.edges, known))
    assert not torch.equal(composite.output, plain.output)


def test_drawn_edges_stand_in_the_hole_and_known_ones_around_it(case, monkeypatch):
    image, mask = case.inputs()
    drawing, known = 1 - case.guidance["canny_edges"][:1], case.guidance["canny_edges"]
    monkeypatch.setattr(edge_connect.EdgeGenerator, "forward", lambda *_: pytest.fail("nothing is to be predicted"))
    result = case.run(image, mask, edges=drawing)
    assert torch.equal(result.edges, torch.where(mask > 0.5, drawing, known))
    assert torch.equal(case.run(image, mask, edges=drawing.bool()).output, result.output)


@pytest.mark.parametrize(
    ("guidance", "error", "message"),
    [
        ({"edges": torch.zeros(2, 3, *SIZE)}, ValueError, r"edges: expected shape \[B\|1, 1, H, W\]"),
        ({"edges": [1]}, TypeError, "edges: expected a torch.Tensor"),
        ({"canny_edges": torch.zeros(3, 1, *SIZE)}, ValueError, "canny_edges: expected shape"),
        ({"canny_edges": torch.zeros(2, 1, *SIZE, dtype=torch.long)}, TypeError, "canny_edges: expected torch.bool"),
        ({"canny_edges": None, "sigma": -1.0}, ValueError, "sigma: expected a number >= 0"),
    ],
)
def test_wrong_guidance_is_named(case, guidance, error, message):
    with pytest.raises(error, match=message):
        case.run(*case.inputs(), **guidance)
