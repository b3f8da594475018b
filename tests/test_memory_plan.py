"""The plan of memory: what is estimated is what a process grows by, and a budget holds."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from inpaint_kernels.models import CSA, GLCIC, EdgeConnect, GuidedFace, PartialConvUNet
from inpaint_kernels.models._boxes import Box
from inpaint_kernels.models._interface import InpaintingModel
from inpaint_kernels.models._regions import Chain, working_memory
from inpaint_kernels.models.deepfill_v1 import DeepFillV1
from inpaint_kernels.models.deepfill_v2 import DeepFillV2

from inpaint_kernels import estimate_memory, inpaint, memory_plan, pipeline
from tests.model_cases import holes, narrow, narrow_glcic, photo, seeded

ROOT = Path(__file__).parent.parent
MODELS: dict[str, type[InpaintingModel]] = {
    model.__name__: model for model in (DeepFillV1, DeepFillV2, GLCIC, PartialConvUNet, EdgeConnect, GuidedFace, CSA)
}
GIB = 2**30
HOLE = Box(496, 496, 896, 896)

# Prints what a process grows by for one call, and the estimate.
MEASURE = """
import sys, torch
from benches.harness import with_peak_memory
from inpaint_kernels.memory_plan import estimate_memory
from inpaint_kernels.models._boxes import Box
from inpaint_kernels.models._regions import working_memory
from tests.test_memory_plan import MODELS, guidance_of

name, side, region, working = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]) or None
torch.set_num_threads(1)
model = MODELS[name]().eval()
box = Box(side // 4, side // 4, side // 4 + side // 5, side // 4 + side // 5)
image, mask = torch.rand(1, 3, side, side), torch.zeros(1, 1, side, side, dtype=torch.bool)
box.of(mask).fill_(True)
options = {"region": "full" if region == "full" else [box], **guidance_of(model, side)}
torch.nn.Conv2d(16, 16, 3)(torch.rand(1, 16, 64, 64))  # what torch sets up once is not the model's
hole = None if region == "full" else box
estimate = estimate_memory(model, side, side, hole=hole, working_bytes=working, **guidance_of(model, side))
with torch.no_grad(), working_memory(working):
    _, peak = with_peak_memory(lambda: (model(image, mask, **options).completed,))
print(peak, estimate)
"""


def guidance_of(model: InpaintingModel, side: int) -> dict[str, Any]:
    return {"canny_edges": torch.zeros(1, 1, side, side)} if isinstance(model, EdgeConnect) else {}


def measured(name: str, side: int, region: str = "full", working: int = 0) -> tuple[int, int]:
    """What a process grew by, and the estimate."""
    command = [sys.executable, "-c", MEASURE, name, str(side), region, str(working)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    peak, estimate = run.stdout.split()
    if peak == "None":
        pytest.skip("this system does not tell a process's peak memory")
    return int(peak), int(estimate)


# Estimates ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
@pytest.mark.parametrize(
    ("name", "region", "working"),
    [pytest.param("GLCIC", "full", 0, marks=pytest.mark.slow), ("DeepFillV1", "full", 16 << 20)],
)
def test_the_estimate_is_what_a_process_grows_by(name, region, working):
    peak, estimate = measured(name, 512, region, working)
    assert estimate == pytest.approx(peak, rel=0.25)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
@pytest.mark.parametrize("side", [512, 1024])
@pytest.mark.parametrize("name", MODELS)
def test_the_estimate_is_what_a_process_grows_by_for_every_model(name, side):
    peak, estimate = measured(name, side)
    assert estimate == pytest.approx(peak, rel=0.25)


LIMITS = {"DeepFillV1": 2.0, "DeepFillV2": 2.0, "GLCIC": 2.0}
"""GiB for a whole photo of 2000 x 2000; the other models have 3.5."""


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]().eval()


def test_whole_photos_of_2000_pixels_fit(model):
    side = -(-2000 // model.size_multiple) * model.size_multiple
    needed = estimate_memory(model, side, side, working_bytes=128 << 20, **guidance_of(model, side))
    assert needed <= LIMITS.get(type(model).__name__, 3.5) * GIB
    if model.needed_regions(HOLE, side, side) is not None:
        assert estimate_memory(model, side, side, hole=HOLE, working_bytes=128 << 20) <= GIB
        assert estimate_memory(model, 4096, 4096, hole=HOLE, working_bytes=128 << 20) <= 4 * GIB


def test_estimates_grow_with_the_photo_and_shrink_with_the_hole_and_the_strips():
    model = GLCIC().eval()
    none = estimate_memory(model, 4, 4)
    small, large = (estimate_memory(model, side, side) - none for side in (512, 1024))
    assert large == pytest.approx(4 * small, rel=0.05)
    for hole in (Box(400, 400, 500, 500), [Box(0, 0, 100, 100), Box(900, 900, 1000, 1000)]):
        assert estimate_memory(model, 1024, 1024, hole=hole) - none < large / 2
    assert estimate_memory(model, 1024, 1024, working_bytes=16 << 20) - none < 0.7 * large
    assert estimate_memory(model, 1024, 1024, torch.bfloat16) - none < 0.8 * large


def test_an_estimate_takes_no_memory_and_leaves_no_trace():
    model = seeded(narrow_glcic("iizuka"))
    image, mask = photo(64, 64), holes(64, 64, (10, 10, 30, 30))
    estimate_memory(model, 64 << 10, 64 << 10)
    with torch.no_grad():
        before = model(image, mask).completed
        estimate_memory(model, 64, 64)
        assert torch.equal(model(image, mask).completed, before)
    assert all(type(parameter) is torch.nn.Parameter for parameter in model.parameters())


def test_a_planned_run_in_autocast_has_the_models_own_weights():
    """Autocast keeps short copies of weights, and those of an estimate are without memory."""
    model = EdgeConnect(residual_blocks=1).eval()
    image, mask = photo(32, 32), holes(32, 32, (10, 10, 20, 20))
    plain, planned = (
        inpaint(model, image, mask, dtype=torch.bfloat16, memory=memory, **guidance_of(model, 32)).completed
        for memory in (None, GIB)
    )
    assert type(planned) is torch.Tensor
    assert torch.equal(planned, plain)


def test_guided_models_are_estimated_with_their_guidance():
    model = DeepFillV2(narrow(squash="tanh"), guided=True).eval()
    assert estimate_memory(model, 64, 64, sketch=torch.zeros(1, 1, 64, 64)) > 0
    assert estimate_memory(EdgeConnect(residual_blocks=1).eval(), 64, 64) > 0  # its own edges are Canny's


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((64, 66), ValueError, "width: expected a multiple of 4, at least 1, got 66"),
        ((0, 64), ValueError, "height: expected a number >= 1, got 0"),
        ((64.0, 64), TypeError, "height: expected an integer, got float"),
        ((64, 64, None, [(0, 0, 80, 8)]), ValueError, "region: expected boxes .* in 64 x 64"),
    ],
)
def test_wrong_sizes_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        estimate_memory(narrow_glcic("iizuka").eval(), *arguments)


def test_amounts_of_memory_are_read():
    parse = memory_plan.parse_memory
    assert [parse(m) for m in (12, "12", "1.5 GiB", "800MB", "4gib", "3 KiB")] == [
        *(12, 12, 3 * 2**29, 800 * 10**6, 4 * GIB, 3 * 2**10),
    ]
    for wrong in ("4 gigs", "GiB", "-1GiB", ""):
        with pytest.raises(ValueError, match="memory: expected a number of bytes or a text such as"):
            parse(wrong)
    with pytest.raises(ValueError, match="memory: expected a number >= 1, got 0"):
        parse(0)
    with pytest.raises(TypeError, match="memory: expected an integer, got float"):
        parse(1.5)  # type: ignore[arg-type]


# Strips ---------------------------------------------------------------------------------------------------------------

STRIPPED = {
    "deepfill_v1-zeros": lambda: seeded(DeepFillV1(narrow())),
    "deepfill_v1-same_tf": lambda: seeded(DeepFillV1(narrow("same_tf", "official"))),
    "deepfill_v1-reflect": lambda: seeded(DeepFillV1(narrow("reflect", "mmagic"))),
    "deepfill_v2": lambda: seeded(DeepFillV2(narrow("same_tf", "nipponjo_tf", "tanh")), 5.0),
    "glcic-bn_relu": lambda: seeded(narrow_glcic("iizuka")),
    "glcic-relu_bn": lambda: seeded(narrow_glcic("otenim")),
}


@pytest.mark.parametrize("name", STRIPPED)
def test_strips_equal_whole_maps(name, monkeypatch):
    model = STRIPPED[name]().double()
    image, mask = photo(200, 104, 2, torch.float64), holes(200, 104, (40, 30, 90, 80))
    strips: list[int] = []
    cut = Chain._strip_by_strip

    def record(self: Chain, x: torch.Tensor, boxes: Any) -> torch.Tensor:
        strips.append(len(boxes))
        return cut(self, x, boxes)

    monkeypatch.setattr(Chain, "_strip_by_strip", record)
    with torch.no_grad():
        for region in ("full", "hole"):
            whole = model(image, mask, region=region)
            assert not strips
            with working_memory(100_000):
                part = model(image, mask, region=region)
            torch.testing.assert_close(part.output, whole.output, rtol=0, atol=1e-12)
            assert region == "hole" or max(strips) > 3
            strips.clear()


def test_attention_in_strips_of_queries_equals_the_whole():
    model = STRIPPED["deepfill_v1-zeros"]().double()
    image, mask = photo(512, 128, dtype=torch.float64), holes(512, 128, (20, 30, 430, 80))
    with torch.no_grad():
        whole = model(image, mask, region="hole", return_attention=True)
        with working_memory(1 << 16):
            part = model(image, mask, region="hole", return_attention=True)
    torch.testing.assert_close(part.completed, whole.completed, rtol=0, atol=1e-12)
    assert torch.equal(part.attention, whole.attention)


def test_gradients_are_recorded_of_whole_maps():
    model = STRIPPED["glcic-bn_relu"]().train()
    with working_memory(1):
        model(photo(64, 64), holes(64, 64, (10, 10, 30, 30))).output.sum().backward()
    assert model.get_submodule("conv1").weight.grad is not None


# Budgets --------------------------------------------------------------------------------------------------------------


def used_working_memory(model: InpaintingModel, monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """A list that will hold what the model is allowed in each run."""
    from inpaint_kernels.models import _regions

    seen: list[int | None] = []
    paint = model.paint

    def recorded(image: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if type(image) is torch.Tensor:  # not of an estimate
            seen.append(_regions.working_bytes())
        return paint(image, *arguments, **options)

    monkeypatch.setattr(model, "paint", recorded)
    return seen


def test_a_budget_is_kept_by_strips_or_refused_with_what_is_needed(monkeypatch):
    model = STRIPPED["glcic-bn_relu"]()
    monkeypatch.setattr(pipeline, "_WORKING_MEMORY", tuple(n << 10 for n in (8192, 4096, 2048, 1024, 256)))
    seen = used_working_memory(model, monkeypatch)
    image, mask = photo(256, 256)[0], holes(256, 256, (40, 30, 90, 80))
    expected = inpaint(model, image, mask, region="full").completed
    assert seen == [2048 << 10]
    bytes_ = [
        estimate_memory(model, 256, 256, working_bytes=n << 10) + pipeline._BYTES_PER_PIXEL * 256**2
        for n in (2048, 1024, 256)
    ]
    assert bytes_[0] > bytes_[1] > bytes_[2]
    for number, needed in enumerate(bytes_):
        completed = inpaint(model, image, mask, region="full", memory=needed).completed
        torch.testing.assert_close(completed, expected, rtol=0, atol=1e-5)
        assert seen[-1] == (2048, 1024, 256)[number] << 10
    with pytest.raises(ValueError, match=rf"memory: expected at least {bytes_[2]:,} bytes .* for GLCIC on 256 x 256"):
        inpaint(model, image, mask, region="full", memory=bytes_[2] - 1)
    with pytest.raises(ValueError, match="memory: expected a number of bytes"):
        inpaint(model, image, mask, memory="much")


def test_a_batch_within_a_budget_is_painted_one_by_one(monkeypatch):
    model = STRIPPED["glcic-bn_relu"]()
    image, mask = photo(64, 64, 3), holes(64, 64, (10, 10, 30, 30))
    expected = inpaint(model, image, mask).completed
    seen = used_working_memory(model, monkeypatch)
    torch.testing.assert_close(inpaint(model, image, mask, memory="1GiB").completed, expected, rtol=0, atol=1e-6)
    assert len(seen) == 3


def test_running_out_of_memory_on_a_gpu_leads_to_thinner_strips(monkeypatch):
    model = STRIPPED["glcic-bn_relu"]()
    image, mask = photo(64, 64)[0], holes(64, 64, (10, 10, 30, 30))
    expected = inpaint(model, image, mask).completed
    seen = used_working_memory(model, monkeypatch)
    paint, stages = model.paint, []

    def out_of_memory_at_first(*arguments: Any, **options: Any) -> Any:
        result = paint(*arguments, **options)
        if len(seen) < 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(model, "paint", out_of_memory_at_first)
    completed = inpaint(model, image, mask, progress=lambda share, stage: stages.append(stage)).completed
    assert torch.equal(completed, expected)
    assert seen == list(pipeline._WORKING_MEMORY[2:])
    assert stages.count("out of memory; painting in thinner strips") == 2
    seen.clear()
    monkeypatch.setattr(pipeline, "_WORKING_MEMORY", pipeline._WORKING_MEMORY[:4])
    with pytest.raises(torch.cuda.OutOfMemoryError):
        inpaint(model, image, mask)


# Large photos ---------------------------------------------------------------------------------------------------------


def seconds_of(model: InpaintingModel, side: int, **options: Any) -> float:
    """Of each of two cores, as counted by the processor: other programs' share does not count."""
    image = torch.rand(3, side, side)
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[HOLE.top : HOLE.bottom, HOLE.left : HOLE.right] = True
    started = time.process_time()
    inpaint(model, image, mask, **options)
    return (time.process_time() - started) / 2


@pytest.mark.slow
def test_a_hole_of_400_pixels_in_2000_is_filled_at_least_8_times_as_fast_as_all():
    model = GLCIC().eval()
    seconds_of(model, 1000)
    full, hole = seconds_of(model, 2000, region="full"), min(seconds_of(model, 2000) for _ in range(3))
    assert hole < full / 8


@pytest.mark.slow
def test_a_hole_in_a_photo_of_4096_pixels_is_filled_within_its_budget():
    model = DeepFillV1().eval()
    seconds_of(model, 1000)
    assert seconds_of(model, 4096, memory="4GiB") < 30
