"""Models, training steps and the pipeline on a GPU: what the CPU computes, within the memory that they may take.

Everything here needs a GPU; it is the same code that the other tests run on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from inpaint_kernels.models._regions import working_memory
from torch import Tensor

import inpaint_kernels
from benches.harness import with_peak_gpu_memory
from benches.photo_case import HOLE, MODELS, STRIPS, WHOLE, WORKING_BYTES, PhotoCase
from inpaint_kernels import estimate_memory, inpaint
from tests import foreign_modules
from tests.compare import relative_error
from tests.model_cases import CASES, holes, narrow_glcic, photo, seeded
from tests.model_contract import CONTRACT, errors_name_the_argument, maps_of
from tests.test_training import CASES as STEPS
from tests.test_training import batch_of, built

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
GIB = 2**30
PROMISES = [promise for promise in CONTRACT if promise is not errors_name_the_argument]  # of no device


@pytest.fixture(autouse=True)
def _plain_float32(_reproducible: None) -> Iterator[None]:
    """No tf32, the same bits again, and the memory fraction of the test before is forgotten."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic
    cudnn.allow_tf32, cudnn.deterministic = False, True
    yield
    cudnn.allow_tf32, cudnn.deterministic = before
    if DEVICE == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_models_paint_what_they_paint_on_the_cpu(name):
    case = CASES[name]()
    expected = case.run(*case.inputs())
    there = case.on(DEVICE)
    result = there.run(*there.inputs())
    assert maps_of(result).keys() == maps_of(expected).keys()
    for field, value in maps_of(expected).items():
        got = maps_of(result)[field]
        assert got.device.type == DEVICE
        assert (got.cpu() - value).abs().max() <= 20 * case.tolerance, field


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("name", CASES)
def test_models_keep_their_promises_on_a_gpu(name, promise):
    promise(replace(CASES[name]().on(DEVICE), tolerance=1e-3))


@pytest.mark.parametrize("name", ["glcic", "deepfill_v2"])
def test_a_compiled_model_paints_the_same(name):
    case = CASES[name]().on(DEVICE)
    compiled = case.with_model(torch.compile(case.model, fullgraph=True))
    expected, result = case.run(*case.inputs()), compiled.run(*case.inputs())
    assert (result.completed - expected.completed).abs().max() <= 1e-3


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.name)
def test_a_step_has_the_losses_of_the_cpu(case):
    batch = batch_of(case.size, *case.guidance)
    systems = [built(case), built(case)]
    for network in systems[1].networks.values():
        network.to(DEVICE)
    for module in vars(systems[1]).values():  # frozen features
        if isinstance(module, torch.nn.Module):
            module.to(DEVICE)
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    there = type(batch)(**{k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in values.items()})
    expected, losses = systems[0].step(batch), systems[1].step(there)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert loss.device.type == DEVICE
        assert loss.item() == pytest.approx(expected[name].item(), rel=5e-3, abs=1e-4), name


# accelerate -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [foreign_modules.plain_block, foreign_modules.gated_block], ids=["plain", "gated"])
def test_foreign_modules_are_replaced_on_a_gpu(build):
    torch.manual_seed(0)
    model = build().to(DEVICE).eval()
    x = torch.randn(2, next(model.parameters()).shape[1], 32, 40, device=DEVICE)
    with torch.no_grad():
        expected = model(x)
        report = inpaint_kernels.accelerate(model, (x,))
        assert report.replaced, str(report)
        assert relative_error(model(x), expected) <= 1e-4
        report.undo()
        assert torch.equal(model(x), expected)


# Photos ---------------------------------------------------------------------------------------------------------------


def test_a_photo_is_filled_as_on_the_cpu():
    model = seeded(narrow_glcic("iizuka"))
    image, mask = (255 * photo(75, 101)[0]).byte(), holes(75, 101, (20, 30, 44, 60))[0]
    expected = inpaint(model, image, mask)
    result = inpaint(copy.deepcopy(model).to(DEVICE), image, mask)
    assert result.completed.device.type == "cpu"  # the caller's
    assert (result.completed.int() - expected.completed.int()).abs().max() <= 1
    assert torch.equal(result.completed[:, ~mask[0]], image[:, ~mask[0]])


LIMITS = {torch.float32: 6 * GIB, torch.bfloat16: 3 * GIB}
"""Of a whole photo of 2000 x 2000 pixels."""


def photo_case(name: str, dtype: torch.dtype = torch.float32) -> PhotoCase:
    return PhotoCase(name, 2000, 400, device=DEVICE, precision=str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("dtype", LIMITS, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_whole_photos_of_2000_pixels_fit(name, dtype):
    """Also where the GPU has no more than that."""
    case = photo_case(name, dtype)
    image, mask = case.photo
    model = case.model
    options: dict[str, Any] = {"region": "full", "memory": LIMITS[dtype], **case.guidance}
    options["dtype"] = None if dtype == torch.float32 else dtype
    model(*(x[..., :256, :256] for x in (image, mask)))  # cuBLAS's and cuDNN's own memory is not the model's
    beside = torch.cuda.memory_reserved()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((beside + 1.15 * LIMITS[dtype]) / total)
    (completed,), peak = with_peak_gpu_memory(lambda: (inpaint(model, image, mask, **options).completed,))
    print(f"{name} {dtype}: {peak / GIB:.2f} GiB")
    assert peak <= LIMITS[dtype]
    assert torch.equal(completed[..., ~mask[0, 0]], image[..., ~mask[0, 0]])
    assert completed.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_a_planned_run_equals_one_of_whole_maps(name):
    case = photo_case(name)
    whole = case.fill(WHOLE)[0]
    assert (case.fill(STRIPS)[0] - whole).abs().max() <= 1e-4
    if HOLE in case.provider_names:
        assert (case.fill(HOLE)[0] - whole).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["deepfill_v1", "glcic"])
def test_the_estimate_is_what_the_allocator_gives(name):
    case = photo_case(name)
    case.fill(STRIPS)
    _, peak = with_peak_gpu_memory(lambda: case.fill(STRIPS))
    estimate = estimate_memory(case.model, *case.size, working_bytes=WORKING_BYTES[STRIPS])
    print(f"{name}: {peak / 2**20:.0f} MiB, estimate {estimate / 2**20:.0f} MiB")
    assert estimate == pytest.approx(peak, rel=0.25)


def test_a_gpu_that_runs_out_of_memory_gets_thinner_strips():
    case = photo_case("glcic")
    image, mask = case.photo
    whole = case.fill(WHOLE)[0]
    stages: list[str] = []
    torch.cuda.empty_cache()
    reserved, total = torch.cuda.memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((reserved + 1.2 * GIB) / total)
    result = inpaint(case.model, image, mask, region="full", progress=lambda _, stage: stages.append(stage))
    assert "out of memory; painting in thinner strips" in stages
    assert (result.completed - whole).abs().max() <= 1e-4


def test_working_memory_bounds_the_peak():
    case = photo_case("glcic")
    image, mask = case.photo
    peaks = []
    for working_bytes in (None, 128 << 20):
        with torch.no_grad(), working_memory(working_bytes):
            peaks.append(with_peak_gpu_memory(lambda: (case.model(image, mask).completed,))[1])
    assert peaks[1] < 0.7 * peaks[0]
