"""contextual_attention, forward: every backend against the float64 reference, and the reference against the paper."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inpaint_kernels import PRESETS, ContextualAttentionPreset, contextual_attention, explain
from inpaint_kernels.ops._contextual_attention_presets import resample, valid_keys
from inpaint_kernels.portable import contextual_attention as portable
from tests.compare import assert_close_to_reference

BACKENDS = [
    name for name in explain("contextual_attention", *[torch.zeros(1, 1, 8, 8)] * 2).usable if name != "reference"
]
WITH_REFERENCE = [*BACKENDS, "reference"]
ODD_SIZES = [name for name, preset in PRESETS.items() if preset.odd_sizes and preset.grid != "none"]

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
for_every_preset = pytest.mark.parametrize("preset", PRESETS)


def make_inputs(
    preset: str | ContextualAttentionPreset = "nipponjo",
    f_size: tuple[int, int] = (12, 16),
    b_size: tuple[int, int] | None = None,
    batch: int = 2,
    channels: int = 3,
    mask: str = "partial",
    dtype: torch.dtype = torch.float64,
    amplitude: float = 0.4,
) -> dict[str, Any]:
    """Arguments of one call. Sizes are those of f and b at feature resolution; ``mask``: none, partial or all."""
    settings = PRESETS[preset] if isinstance(preset, str) else preset
    b_size = b_size or f_size
    arguments: dict[str, Any] = {"preset": preset}
    value_size = b_size
    if settings.grid == "none":
        value_size = (settings.rate * b_size[0], settings.rate * b_size[1])
        arguments["value"] = torch.randn(batch, 2, *value_size, dtype=dtype)
    arguments["f"] = amplitude * torch.randn(batch, channels, *f_size, dtype=dtype)
    arguments["b"] = amplitude * torch.randn(batch, channels, *b_size, dtype=dtype)
    if mask != "none":
        hole = torch.zeros(batch, 1, *b_size)
        hole[:, :, b_size[0] // 3 : b_size[0] // 3 + 3, : b_size[1] // 2] = 1
        hole[batch - 1, :, -2:, -3:] = 1  # samples differ
        arguments["mask"] = torch.ones_like(hole) if mask == "all" else hole
    return arguments


def in_dtype(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    maps = ("f", "b", "value")
    return {name: x.to(dtype) if name in maps else x for name, x in arguments.items()}


def assert_equals_reference(arguments: dict[str, Any], backend: str) -> None:
    """Output, offsets and maxima of a backend are those of the float64 reference, as closely as its dtype allows."""
    got = contextual_attention(**arguments, return_offsets=True, backend=backend)
    eager = contextual_attention(**arguments, return_offsets=True, backend="reference")
    judge = contextual_attention(**in_dtype(arguments, torch.float64), return_offsets=True, backend="reference")
    assert got.output.dtype == arguments["f"].dtype
    assert_close_to_reference(got.output, judge.output, eager.output)
    assert_close_to_reference(got.maximum, judge.maximum, eager.maximum)
    if arguments["f"].dtype == torch.float64:
        assert torch.equal(got.offsets, judge.offsets)


# Presets, sizes, masks ------------------------------------------------------------------------------------------------


@on_every_backend
@for_every_preset
@pytest.mark.parametrize("mask", ["none", "partial", "all"])
def test_every_preset_equals_the_reference(backend, preset, mask):
    assert_equals_reference(make_inputs(preset, mask=mask), backend)


@on_every_backend
@pytest.mark.parametrize(
    ("f_size", "b_size", "batch"),
    [((16, 16), None, 1), ((6, 22), None, 3), ((22, 6), (8, 14), 1), ((4, 6), (18, 12), 2), ((2, 8), (8, 2), 1)],
)
@pytest.mark.parametrize("preset", ["nipponjo", "mmagic", "selflein", "hifill"])
def test_sizes_of_f_and_b(backend, f_size, b_size, batch, preset):
    assert_equals_reference(make_inputs(preset, f_size, b_size, batch), backend)


@on_every_backend
@pytest.mark.parametrize("preset", ODD_SIZES)
def test_odd_sizes_are_cropped_to_whole_cells(backend, preset):
    arguments = make_inputs(preset, (11, 15), (13, 9))
    assert contextual_attention(**arguments, backend=backend).shape[2:] == (10, 14)
    assert_equals_reference(arguments, backend)


@on_every_backend
@pytest.mark.parametrize(
    "overrides",
    [
        {"rate": 1, "paste_size": 1, "pad_cut": 0, "pad_put": 0, "divisor": 1.0},
        {"rate": 1, "paste_size": 3, "divisor": 0.0},
        {"rate": 2, "paste_size": 2, "pad_cut": 0, "pad_put": 0},
        {"rate": 2, "paste_size": 5, "pad_cut": 1, "pad_put": 2},
        {"rate": 3, "paste_size": 4, "pad_cut": 1, "pad_put": 0, "divisor": 0.0},
        {"rate": 3, "paste_size": 9, "pad_cut": 3, "pad_put": 3, "divisor": 9.0},
        {"rate": 4, "paste_size": 8, "pad_cut": 2, "pad_put": 2, "divisor": 0.0},
        {"patch": 1},
        {"patch": 2},
        {"patch": 5},
        {"fuse": 0},
        {"fuse": 5},
        {"fuse": 5, "patch": 4, "masking": "inf"},
        {"norm": "add", "eps": 0.5},
        {"norm": "none"},
        {"floor": 1e-2},
        {"masking": "fill", "fill": -0.1},
    ],
    ids=str,
)
def test_general_parameters(backend, overrides):
    arguments = make_inputs("nipponjo", (24, 12))
    assert_equals_reference({**arguments, **overrides}, backend)


@on_every_backend
@pytest.mark.parametrize("masking", ["multiply", "inf"])
def test_nothing_valid_gives_zero(backend, masking):
    arguments = make_inputs(mask="all")
    result = contextual_attention(**arguments, masking=masking, return_offsets=True, backend=backend)
    assert torch.equal(result.output, torch.zeros_like(result.output))
    assert torch.equal(result.maximum, torch.zeros_like(result.maximum))


@on_every_backend
def test_first_mask_serves_the_batch_only_where_the_preset_says_so(backend):
    arguments = make_inputs("nipponjo")
    first = {**arguments, "mask": arguments["mask"][:1]}
    outputs = [contextual_attention(**case, backend=backend) for case in (arguments, first)]
    assert torch.equal(*outputs)
    each = [contextual_attention(**case, mask_batch="each", backend=backend) for case in (arguments, first)]
    assert torch.equal(each[0][0], each[1][0])
    assert not torch.allclose(each[0][1], each[1][1])


@on_every_backend
def test_scale_and_bias_per_key(backend):
    arguments = make_inputs(f_size=(12, 16), b_size=(10, 14))
    assert_equals_reference(
        {**arguments, "key_scale": torch.rand(1, 5, 7) + 0.5, "key_bias": torch.randn(2, 5, 7)}, backend
    )


# Restricted queries ---------------------------------------------------------------------------------------------------


@on_every_backend
@for_every_preset
@pytest.mark.parametrize("kind", ["box", "scattered", "border", "none"])
def test_queries_equal_the_full_call(backend, preset, kind):
    arguments = make_inputs(preset, (20, 24) if PRESETS[preset].grid != "none" else (10, 12), (16, 12))
    full = contextual_attention(**arguments, return_offsets=True, backend=backend)
    height, width = full.maximum.shape[1:]
    wanted = torch.zeros(height, width, dtype=torch.bool)
    queries: Any = wanted
    if kind == "box":
        queries = (2, 3, 6, 9)
        wanted[2:6, 3:9] = True
    elif kind == "scattered":
        wanted[torch.rand(height, width) < 0.2] = True
    elif kind == "border":  # both ends of rows and columns: the fuse wraps
        wanted[0, :2] = wanted[-1, -2:] = wanted[4, 0] = wanted[5, -1] = True
    result = contextual_attention(**arguments, queries=queries, return_offsets=True, backend=backend)
    cells = wanted.repeat_interleave(2, 0).repeat_interleave(2, 1)
    torch.testing.assert_close(result.output, full.output.where(cells, 0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.maximum, full.maximum.where(wanted, 0), rtol=1e-12, atol=1e-12)
    assert torch.equal(result.offsets, full.offsets.where(wanted, 0))


def test_portable_result_does_not_depend_on_the_tiles(monkeypatch):
    arguments = make_inputs("hifill", (12, 16), batch=1)
    whole = contextual_attention(**arguments, return_offsets=True, backend="portable")
    for queries in (1, 7, 20):
        monkeypatch.setattr(portable, "LARGEST_TILE", queries)
        tiled = contextual_attention(**arguments, return_offsets=True, backend="portable")
        torch.testing.assert_close(tiled.output, whole.output, rtol=1e-12, atol=1e-12)
        assert torch.equal(tiled.offsets, whole.offsets)


# Dtypes and layouts ---------------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("preset", ["nipponjo", "mmagic", "hifill", "pennet"])
def test_dtypes(backend, dtype, preset):
    assert_equals_reference(in_dtype(make_inputs(preset, channels=8), dtype), backend)


@on_every_backend
def test_float32_error_at_1024_keys(backend):
    f = torch.randn(1, 64, 64, 64)
    mask = torch.zeros(1, 1, 64, 64)
    mask[:, :, 20:40, 10:30] = 1
    judge = contextual_attention(f.double(), f.double(), mask, backend="reference")
    out = contextual_attention(f, f, mask, backend=backend)
    assert (out - judge).abs().max() <= 3e-5 * judge.abs().max()


def _strided(x: Tensor) -> Tensor:
    return F.pad(x, (1, 2, 1, 2)).repeat_interleave(2, 3)[:, :, 1:-2, 2:-4:2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": _strided,
    "permuted": lambda x: x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
}


@on_every_backend
def test_float32_error_of_means_over_62500_keys(backend):
    f, b = torch.rand(1, 2, 8, 8), torch.rand(1, 2, 500, 500)
    expected = contextual_attention(f.double(), b.double(), scale=0.1, backend="reference")
    output = contextual_attention(f, b, scale=0.1, backend=backend)
    assert float((output - expected).abs().max() / expected.abs().max()) < 3e-6


@on_every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("preset", ["nipponjo", "pennet"])
def test_layouts_give_the_same_bits(backend, layout, preset):
    arguments = make_inputs(preset, dtype=torch.float32)
    expected = contextual_attention(**arguments, backend=backend)
    moved: dict[str, Any] = {
        k: LAYOUTS[layout](x) if k in ("f", "b", "value", "mask") else x for k, x in arguments.items()
    }
    assert not moved["f"].is_contiguous()
    assert torch.equal(contextual_attention(**moved, backend=backend), expected)


@on_every_backend
def test_tensors_are_left_as_they_were(backend):
    arguments = make_inputs()
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    contextual_attention(**arguments, backend=backend)
    for name, x in before.items():
        assert torch.equal(arguments[name], x), name


# Oracles that share nothing with the reference ------------------------------------------------------------------------


def published_attention(f: Tensor, b: Tensor, mask: Tensor, norm: str, fuse: bool) -> Tensor:
    """Contextual attention as the published networks compute it: unfold, convolve, fuse by eye(3), transposed conv."""
    down_f, down_b = f[:, :, ::2, ::2], b[:, :, ::2, ::2]
    (hq, wq), (hk, wk) = down_f.shape[2:], down_b.shape[2:]
    hole = F.avg_pool2d(mask[:1, :, ::2, ::2], 3, stride=1, padding=1)
    valid = (hole == 0).to(f.dtype).view(1, hk * wk, 1, 1)
    eye = torch.eye(3, dtype=f.dtype)[None, None]
    outputs = []
    for sample in range(f.shape[0]):
        kernels = F.unfold(down_b[sample : sample + 1], 3, padding=1)[0].t().unflatten(1, (-1, 3, 3))
        squares = kernels.square().sum((1, 2, 3), keepdim=True)
        elements = kernels[0].numel()
        divisor = (
            squares.sqrt().clamp(min=1e-4) if norm == "max" else (squares + PRESETS["daa233"].eps * elements).sqrt()
        )
        scores = F.conv2d(down_f[sample : sample + 1], kernels / divisor, padding=1)
        if fuse:
            scores = scores.permute(0, 2, 3, 1).reshape(1, 1, hq * wq, hk * wk)
            scores = F.conv2d(scores, eye, padding=1).view(1, hq, wq, hk, wk)
            scores = scores.permute(0, 2, 1, 4, 3).reshape(1, 1, hq * wq, hk * wk)
            scores = F.conv2d(scores, eye, padding=1).view(1, wq, hq, wk, hk)
            scores = scores.permute(0, 4, 3, 2, 1).reshape(1, hk * wk, hq, wq)
        weights = (scores * valid * 10).softmax(1) * valid
        raw = F.unfold(b[sample : sample + 1], 4, stride=2, padding=1)[0].t().unflatten(1, (-1, 4, 4))
        outputs.append(F.conv_transpose2d(weights, raw, stride=2, padding=1) / 4)
    return torch.cat(outputs)


@pytest.mark.parametrize("backend", WITH_REFERENCE)
@pytest.mark.parametrize(("preset", "norm"), [("nipponjo", "max"), ("daa233", "sum")])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("sizes", [((12, 20), (12, 20)), ((10, 6), (14, 8))], ids=str)
def test_equals_the_published_computation(backend, preset, norm, fuse, sizes):
    arguments = make_inputs(preset, *sizes)
    expected = published_attention(arguments["f"], arguments["b"], arguments["mask"].double(), norm, fuse)
    out = contextual_attention(**arguments, fuse=3 if fuse else 0, backend=backend)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", WITH_REFERENCE)
def test_one_bright_pixel_is_copied_from_its_only_match(backend):
    f = torch.zeros(1, 2, 12, 12, dtype=torch.float64)
    f[0, :, 4, 6] = torch.tensor([30.0, -30.0])  # matching-grid position (2, 3)
    b = torch.zeros(1, 2, 12, 16, dtype=torch.float64)
    b[0, :, 8, 10] = torch.tensor([30.0, -30.0])  # matching-grid position (4, 5)
    result = contextual_attention(f, b, patch=1, fuse=0, return_offsets=True, backend=backend)
    assert result.offsets[0, :, 2, 3].tolist() == [2, 2]
    assert result.maximum[0, 2, 3].item() == pytest.approx(1)
    # Four patches overlap there: that of (2, 3) brings the pixel, the others the mean over their 48 equal keys.
    assert result.output[0, 0, 4, 6].item() == pytest.approx((30 + 3 * 30 / 48) / 4)


@pytest.mark.parametrize("backend", WITH_REFERENCE)
def test_equal_probabilities_choose_the_lowest_valid_key(backend):
    x = torch.ones(1, 4, 8, 8)
    options = {"patch": 1, "fuse": 0, "return_offsets": True, "backend": backend}
    result = contextual_attention(x, x, **options)
    assert result.offsets[0, :, 3, 2].tolist() == [-3, -2]
    mask = torch.zeros(1, 1, 8, 8)
    mask[:, :, 0] = mask[:, :, 2, :4] = 1  # row 0 and the first two keys of row 1 of the matching grid
    result = contextual_attention(x, x, mask, **options)
    assert result.offsets[0, :, 3, 2].tolist() == [1 - 3, 2 - 2]
    assert result.maximum[0, 3, 2].item() == pytest.approx(1 / (10 + 6 * torch.exp(torch.tensor(-20.0)).item()))


def test_sampling_grids():
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    columns = {
        grid: resample(ramp, (32, 32), grid, 2)[0, 0, 0] for grid in ("floor", "corners", "linspace", "halfpixel")
    }
    even = torch.arange(0.0, 64.0, 2)
    assert torch.equal(columns["floor"], even)
    assert torch.equal(columns["corners"], torch.where(even < 32, even, even + 1))
    assert torch.equal(columns["linspace"], columns["corners"])
    assert torch.equal(columns["halfpixel"], even + 1)


def test_mask_at_image_and_at_feature_resolution_and_both_reductions():
    feature = torch.zeros(1, 1, 16, 16)
    feature[:, :, 6, 8] = 1  # matching-grid position (3, 4), on the floor grid
    image = feature.repeat_interleave(4, 2).repeat_interleave(4, 3)
    expected = torch.ones(1, 8, 8, dtype=torch.bool)
    expected[:, 2:5, 3:6] = False
    for mask in (feature, image, 255 * image.to(torch.uint8), image.bool()):
        assert torch.equal(valid_keys(mask, (16, 16), (8, 8), PRESETS["nipponjo"]), expected)
    missed = torch.zeros(1, 1, 16, 16)
    missed[:, :, 7, 9] = 1  # between the pixels that the floor grid reads
    assert valid_keys(missed, (16, 16), (8, 8), PRESETS["nipponjo"]).all()
    assert torch.equal(valid_keys(missed, (16, 16), (8, 8), PRESETS["hifill"]), expected)


# NaN, reproducibility, threads ----------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("preset", ["nipponjo", "mmagic", "hifill"])
def test_nan_reaches_only_what_depends_on_it(backend, preset):
    arguments = make_inputs(preset, (32, 32), (12, 16), batch=2)
    clean = contextual_attention(**arguments, backend=backend)
    arguments["f"][0, 1, 16, 12] = float("nan")
    judge = contextual_attention(**arguments, backend="reference")
    out = contextual_attention(**arguments, backend=backend)
    touched = judge.isnan()
    assert 0 < touched.double().mean() < 0.15
    assert torch.equal(out.isnan(), touched)
    torch.testing.assert_close(out[~touched], clean[~touched], rtol=1e-12, atol=1e-12)


@on_every_backend
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(backend):
    arguments = make_inputs("nipponjo", (44, 52), channels=16, dtype=torch.float32)
    expected = contextual_attention(**arguments, return_offsets=True, backend=backend)
    for threads in (2, 1, 3):
        torch.set_num_threads(threads)
        result = contextual_attention(**arguments, return_offsets=True, backend=backend)
        assert all(torch.equal(*pair) for pair in zip(result, expected, strict=True)), f"{threads} threads"


@on_every_backend
def test_two_python_threads_at_once(backend):
    cases = [make_inputs("nipponjo", (28, 36), dtype=torch.float32), make_inputs("mmagic", dtype=torch.float32)]
    expected = [contextual_attention(**case, backend=backend) for case in cases]
    equal: list[bool] = []

    def work(number: int) -> None:
        results = [contextual_attention(**cases[number], backend=backend) for _ in range(5)]
        equal.extend(torch.equal(result, expected[number]) for result in results)

    workers = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(equal) == 10
    assert all(equal)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@on_every_backend
def test_works_after_fork(backend):
    arguments = make_inputs(dtype=torch.float32)
    torch.set_num_threads(1)  # OpenMP's own workers do not survive a fork
    expected = contextual_attention(**arguments, backend=backend)
    child = os.fork()
    if child == 0:
        same = torch.equal(contextual_attention(**arguments, backend=backend), expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@on_every_backend
def test_uninitialised_memory_is_never_read(backend, poisoned_memory):
    for preset in ("nipponjo", "hifill", "pennet"):
        assert_equals_reference(make_inputs(preset), backend)


@pytest.mark.parametrize("backend", WITH_REFERENCE)
def test_batch_of_zero(backend):
    x = torch.zeros(0, 3, 8, 12)
    result = contextual_attention(x, x, return_offsets=True, backend=backend)
    assert [list(y.shape) for y in result] == [[0, 3, 8, 12], [0, 2, 4, 6], [0, 4, 6]]


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no CPU kernel")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_little_memory_is_kept_between_calls():
    code = """
import ctypes, torch, inpaint_kernels as ik
def resident():
    ctypes.CDLL(None).malloc_trim(0)
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS:")) / 1024
def call(size):
    ik.contextual_attention(torch.zeros(1, 4, size, size), torch.zeros(1, 4, size, size))
call(16)
before = resident()
for size in (96, 128, 160, 112, 144, 128, 96):
    call(size)
print(resident() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 64 + 16  # MiB; kMostKept in csrc/cpu/memory.h, and what torch itself keeps
