"""What the networks keep for a gradient: less than all maps, and the gradient is the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from inpaint_kernels.models import DeepFillV1, DeepFillV2, _regions, deepfill_v1, deepfill_v2
from inpaint_kernels.models._deepfill import DeepFill
from inpaint_kernels.models._layers import Convolution
from torch import Tensor
from torch._subclasses import FakeTensorMode

from inpaint_kernels.memory_plan import LiveMemory

MODELS: dict[str, Callable[[], DeepFill]] = {
    "deepfill_v1": lambda: DeepFillV1(replace(deepfill_v1.DIALECTS["daa233"], width=4)),
    "deepfill_v1-reflect": lambda: DeepFillV1(replace(deepfill_v1.DIALECTS["mmagic"], width=4)),
    "deepfill_v2": lambda: DeepFillV2(replace(deepfill_v2.DIALECTS["nipponjo"], width=8)),
}


@pytest.fixture
def all_is_kept(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def keep() -> None:
        monkeypatch.setattr(_regions, "keeps_for_gradients", lambda: False)

    return keep


def gradients(model: DeepFill) -> list[Tensor]:
    image = torch.rand(2, 3, 80, 88, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 80, 88)
    mask[..., 20:50, 30:60] = 1
    model.zero_grad()
    result = model(image, mask)
    assert result.coarse is not None
    (result.output.square().mean() + result.coarse.abs().mean()).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_bits(name, all_is_kept):
    model = MODELS[name]()
    less = gradients(model)
    all_is_kept()
    assert all(torch.equal(one, other) for one, other in zip(less, gradients(model), strict=True))


def kept_floats(model: DeepFill, side: int) -> int:
    """What lives between the forward and the backward pass, beside the parameters."""
    memory = LiveMemory()
    with FakeTensorMode(allow_non_fake_inputs=True):
        image, mask = torch.empty(1, 3, side, side), torch.empty(1, 1, side, side)
        with memory:
            result = model(image, mask)
        del image, mask
        live = memory._live // 4
        del result
    return live


def test_first_maps_and_last_ones_are_not_kept(all_is_kept):
    side, width = 64, 4
    model = MODELS["deepfill_v1"]()
    less = kept_floats(model, side)
    all_is_kept()
    half = (side // 2) ** 2
    first = 3 * width * side**2 + (2 + 2 + 1 + 2 + 1 + 2) * width * half  # of three encoders
    last = (width + width // 2) * side**2  # of the first painter
    saved = kept_floats(model, side) - less
    assert saved == pytest.approx(first + last, rel=0.02)


def test_in_evaluation_mode_the_first_maps_are_kept(all_is_kept):
    """Nobody who only looks at a gradient waits for what torch's checkpoint imports."""
    model = MODELS["deepfill_v1"]()
    training, evaluation = (kept_floats(model.train(mode), 64) for mode in (True, False))
    assert training < evaluation
    all_is_kept()
    assert evaluation == kept_floats(model, 64)


@pytest.mark.parametrize("gated", [False, True])
def test_enlarged_maps_are_never_made(gated):
    layer = Convolution(8, 4, upsample=2, gated=gated)
    memory = LiveMemory()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        x = torch.empty(1, 8, 32, 32)
        with memory:
            y = layer(x)
    assert memory.peak == y.nbytes
