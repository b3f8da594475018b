"""Fine structure from known places: where it is found, what it adds, and that nothing else changes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from inpaint_kernels.models import InpaintingModel, InpaintResult
from inpaint_kernels.models._interface import complete
from torch import Tensor

from inpaint_kernels import inpaint, models
from inpaint_kernels.detail import carried_residual, match
from tests.model_cases import holes, narrow, seeded

SCALE = 3
TILE = 24  # pixels of the photo, a whole number of the reduced one's
HOLE = (60, 72, 110, 130)


def tiled(height: int, width: int, seed: int = 0) -> Tensor:
    """[1, 3, H, W] in [0, 1]: one random tile again and again."""
    tile = torch.rand(3, TILE, TILE, generator=torch.Generator().manual_seed(seed))
    return tile.repeat(1, -(-height // TILE), -(-width // TILE))[None, :, :height, :width]


class Copyist(InpaintingModel):  # type: ignore[misc]
    """Paints the reduced truth: all that a network could do at that size."""

    has_attention = True

    def __init__(self, truth: Tensor, attention: Tensor | None = None) -> None:
        super().__init__()
        self.truth, self.attention = truth, attention
        self.scale = torch.nn.Parameter(torch.ones(()))

    def paint(self, image: Tensor, hole: Tensor, *, return_attention: bool = False, **options: Any) -> InpaintResult:
        output = F.interpolate(self.truth, image.shape[2:], mode="area")
        attention = self.attention if return_attention else None
        return InpaintResult(output, complete(image, output, hole), attention=attention)


def error_in_hole(filled: Tensor, truth: Tensor) -> float:
    top, left, bottom, right = HOLE
    part = (slice(None), slice(None), slice(top, bottom), slice(left, right))
    return float((filled[part] - truth[part]).square().mean().sqrt())


@pytest.mark.parametrize("fit", ["resize", "crop"])
def test_repeated_texture_comes_back(fit):
    truth = tiled(192, 216)
    mask = holes(192, 216, HOLE)
    model = Copyist(truth)
    if fit == "crop":  # the crop is the photo
        options: dict[str, Any] = {"fit": "crop", "max_side": 72, "margin": 192}
    else:
        options = {"fit": "resize", "max_side": 72}
    plain = inpaint(model, truth, mask, **options)
    detailed = inpaint(model, truth, mask, detail="residual", **options)
    assert error_in_hole(plain.completed, truth) > 0.2
    assert error_in_hole(detailed.completed, truth) < 0.3 * error_in_hole(plain.completed, truth)
    assert torch.equal(detailed.completed.masked_fill(mask, 0), truth.masked_fill(mask, 0))
    assert detailed.attention is None


def test_the_search_stays_near_the_networks_attention():
    """Two halves of the photo hold the same texture; the attention says in which of them each position looked."""
    image = tiled(64, 96)
    hole = holes(64, 96, (24, 40, 40, 56))
    for side in (-3, 3):
        attention = torch.zeros(1, 2, 8, 12, dtype=torch.int64)
        attention[:, 1] = side
        offsets = match(image, hole, attention)
        columns = offsets[0, 1][hole[0, 0]]
        assert ((columns - 8 * side).abs() <= 16).all()
        assert (columns.sign() == (1 if side > 0 else -1)).all()
        assert not offsets[:, :, ~hole[0, 0]].any()


def test_exact_copies_are_found_anywhere():
    image = tiled(72, 96)
    offsets = match(image, holes(72, 96, (30, 40, 50, 60)))
    inside = offsets[0, :, 30:50, 40:60]
    assert ((inside % TILE) == 0).float().mean() > 0.9
    assert inside.abs().amax() > 0


def test_the_contrast_of_a_mean_of_different_places_is_that_of_one():
    """Noise has no copies: four different places are averaged, and the hole must not look smoother than the rest."""
    image = torch.rand(1, 1, 240, 240, generator=torch.Generator().manual_seed(1))
    hole = holes(240, 240, (90, 90, 150, 150))
    offsets = torch.randint(-12, 13, (1, 2, 60, 60), generator=torch.Generator().manual_seed(2))
    offsets[:, 0] += 30 * (1 - 2 * (offsets[:, 0] > 0).long())
    base = F.interpolate(F.avg_pool2d(image, 4), scale_factor=4.0, mode="bicubic")
    residual = carried_residual(image, base, hole, offsets)
    inside, around = residual[hole], (image - base)[~hole]
    assert abs(float(inside.std() / around.std()) - 1) < 0.1
    assert not residual[~hole].any()


def test_nothing_known_adds_nothing():
    image = torch.rand(1, 3, 48, 48)
    base = torch.rand(1, 3, 48, 48)
    hole = torch.ones(1, 1, 48, 48, dtype=torch.bool)
    offsets = match(F.avg_pool2d(base, 4), hole[..., ::4, ::4])
    assert not offsets.any()
    assert not carried_residual(image, base, hole, offsets).any()


def test_what_the_hole_holds_is_not_looked_at():
    truth = tiled(96, 96)
    mask = holes(96, 96, (30, 30, 60, 60))
    spoiled = truth.masked_fill(mask, float("nan"))
    options: dict[str, Any] = {"fit": "resize", "max_side": 32, "detail": "residual"}
    expected = inpaint(Copyist(truth), truth, mask, **options)
    assert torch.equal(inpaint(Copyist(truth), spoiled, mask, **options).completed, expected.completed)


def test_a_network_with_attention_gives_its_own():
    model = seeded(models.DeepFillV1(narrow()))
    image, mask = tiled(160, 192), holes(160, 192, (50, 60, 100, 110))
    options: dict[str, Any] = {"fit": "resize", "max_side": 96, "detail": "residual"}
    result = inpaint(model, image, mask, **options)
    assert result.attention is None
    assert inpaint(model, image, mask, return_attention=True, **options).attention is not None
    plain = inpaint(model, image, mask, fit="resize", max_side=96)
    assert not torch.equal(result.completed, plain.completed)


@pytest.mark.parametrize("name", [name for name in models.__all__ if isinstance(getattr(models, name), type)])
def test_models_say_truly_whether_they_have_attention(name):
    model = getattr(models, name)
    if issubclass(model, InpaintingModel) and model is not InpaintingModel:
        assert model.has_attention == ("return_attention" in inspect.signature(model.paint).parameters)


def test_detail_needs_a_photo_that_was_reduced():
    truth = tiled(32, 32)
    with pytest.raises(ValueError, match=r"detail: expected one of 'none', got 'residual'"):
        inpaint(Copyist(truth), truth, holes(32, 32, (8, 8, 16, 16)), detail="residual")
