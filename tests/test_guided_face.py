"""The HOG-guided face network: its target, what counts as known, both inputs of its first stage, and the contract."""

from __future__ import annotations

import pytest
import torch
from inpaint_kernels.models.edge_connect import EdgeConnect, to_gray
from inpaint_kernels.models.guided_face import GuidedFace, discriminators, hog_target, touched_cells

from tests.model_cases import CASES, DIALECTS
from tests.model_contract import Case, contract, record_inputs
from tests.model_pairs import hashed_image

SIZE = (32, 48)


@pytest.fixture(scope="module")
def case() -> Case:
    return CASES["guided_face"]()


@pytest.fixture(scope="module")
def literal() -> Case:
    return DIALECTS["guided_face-literal"]()


@contract
def test_contract(promise, case):
    promise(case)


def test_edge_connects_weights_are_a_warm_start():
    torch.manual_seed(0)
    theirs, ours = EdgeConnect(), GuidedFace()
    ours.hog_generator.load_state_dict(theirs.edge_generator.state_dict())
    ours.inpaint_generator.load_state_dict(theirs.inpaint_generator.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == 10_761_089 + 10_774_595


def test_target_is_scikit_images_drawing():
    feature = pytest.importorskip("skimage.feature")
    gray = hashed_image((64, 80), 2, 1)
    target = hog_target(gray)
    for one, ours in zip(gray, target, strict=True):
        _, drawing = feature.hog(255 * one[0].numpy(), 9, (8, 8), (3, 3), visualize=True)
        assert torch.allclose(ours[0], torch.from_numpy(drawing).div(10).clamp(0, 1), atol=1e-9)
    assert target.max() == 1
    assert (target == 0).float().mean() > 0.3
    assert hog_target(gray.float()).dtype == torch.float32


def test_cells_in_and_beside_the_hole_are_not_known():
    hole = torch.zeros(1, 1, 40, 40, dtype=torch.bool)
    hole[..., 10:16, 17:20] = True  # ends at the lower border of its cell
    cells = touched_cells(hole)[0, 0, ::8, ::8]
    assert cells.nonzero().tolist() == [[1, 2], [2, 2]]
    assert torch.equal(touched_cells(hole)[0, 0], cells.repeat_interleave(8, 0).repeat_interleave(8, 1))


def test_known_cells_are_those_of_the_whole_image(case):
    image, mask = case.inputs()
    touched = touched_cells(mask > 0.5)
    expected = hog_target(to_gray(image))
    guide = case.run(image, mask).hog
    assert (guide - expected).masked_fill(touched, 0).abs().max() <= 1e-5
    assert expected.masked_fill(touched, 0).any()


def test_generators_see_the_stated_inputs(case, monkeypatch):
    seen = record_inputs(monkeypatch, case.model.hog_generator, case.model.inpaint_generator)
    image, mask = case.inputs()
    result = case.run(image, mask)
    hole, touched = mask > 0.5, touched_cells(mask > 0.5)
    gray = to_gray(image)
    known = result.hog.masked_fill(touched, 0)
    assert torch.equal(seen[0][0], torch.cat([torch.where(hole, 1, gray), known, mask], 1))
    assert torch.equal(seen[1][0], torch.cat([torch.where(hole, 1, image), result.hog], 1))


def test_literal_input_is_the_truth_where_it_is_given(literal, monkeypatch):
    seen = record_inputs(monkeypatch, literal.model.hog_generator, literal.model.inpaint_generator)
    image, mask = literal.inputs()
    white = torch.where(mask > 0.5, 1, image)
    literal.run(image, mask)
    literal.run(image, mask, ground_truth=image)
    assert torch.equal(seen[0][0], torch.cat([white, white], 1))
    assert torch.equal(seen[2][0], torch.cat([image, white], 1))


def test_wrong_arguments_are_named(case, literal):
    with pytest.raises(ValueError, match="gh_input: expected one of 'masked', 'literal'"):
        GuidedFace("cells")
    image, mask = case.inputs()
    with pytest.raises(ValueError, match='ground_truth: expected None unless gh_input is "literal"'):
        case.run(image, mask, ground_truth=image)
    with pytest.raises(ValueError, match=r"ground_truth: expected shape \[B\|1, 3, H, W\]"):
        literal.run(image, mask, ground_truth=mask)
    assert "gh_input='literal'" in repr(literal.model)


def test_discriminators_take_hog_and_images_or_pairs():
    of_hog, of_images = discriminators()
    assert of_hog(torch.rand(1, 2, 32, 32))[0].shape == (1, 1, 2, 2)
    assert of_images(torch.rand(1, 3, 32, 32))[0].shape == (1, 1, 2, 2)
    _, of_pairs = discriminators(conditional=True)
    assert of_pairs(torch.rand(1, 6, 32, 32))[0].shape == (1, 1, 2, 2)
