"""hog: every backend against the float64 reference; layouts, sizes, tracing, errors."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from inpaint_kernels import HogResult, explain, hog, use_backend
from inpaint_kernels.nn import HOG
from inpaint_kernels.portable import hog as portable
from inpaint_kernels.reference import hog as reference
from tests.compare import assert_close_to_reference

BACKENDS = [name for name in explain("hog", torch.zeros(24, 24, dtype=torch.uint8)).usable if name != "reference"]
WITH_REFERENCE = [*BACKENDS, "reference"]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
with_the_reference_too = pytest.mark.parametrize("backend", WITH_REFERENCE)
NORMS = ("L1", "L1-sqrt", "L2", "L2-Hys")
DTYPES = [torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]


def images_of(dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype.is_floating_point:
        return torch.rand(shape, dtype=torch.float64).to(dtype)
    return torch.randint(0, 127 if dtype == torch.int8 else 255, shape).to(dtype)


def features_of(*args: Any, **options: Any) -> Tensor:
    features = hog(*args, **options)
    assert isinstance(features, Tensor)
    return features


def result_of(*args: Any, **options: Any) -> HogResult:
    result: Any = hog(*args, **{**options, "visualize": True})
    assert isinstance(result, HogResult)
    return result


# ---- Results ---------------------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_equals_the_float64_reference(backend, dtype, norm, poisoned_memory):
    for channels, cell, block, transform_sqrt in [(1, (8, 8), (3, 3), False), (3, (5, 7), (2, 1), True)]:
        images = images_of(dtype, 2, channels, 37, 50)
        options = {"pixels_per_cell": cell, "cells_per_block": block, "block_norm": norm}
        got = result_of(images, 9, transform_sqrt=transform_sqrt, feature_vector=False, **options, backend=backend)
        expected: Any = reference.hog(images, 9, cell, block, norm, transform_sqrt, False, True)
        assert got.features.dtype == got.image.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert got.features.is_contiguous()
        for ours, theirs in zip(got, expected, strict=True):
            assert_close_to_reference(ours, theirs, eager=theirs.to(ours.dtype))


@with_the_reference_too
def test_cells_are_what_blocks_are_made_of(backend):
    images = images_of(torch.uint8, 2, 3, 43, 50)
    cells = features_of(images, target="cells", feature_vector=False, backend=backend)
    assert cells.shape == (2, 5, 6, 9)
    blocks = features_of(images, block_norm="L1", feature_vector=False, backend=backend)
    assert blocks.shape == (2, 3, 4, 3, 3, 9)
    for y, x in [(0, 0), (2, 3), (1, 2)]:
        block = cells[:, y : y + 3, x : x + 3]
        expected = block / (block.sum((1, 2, 3), keepdim=True) + 1e-5)
        torch.testing.assert_close(blocks[:, y, x], expected)


@with_the_reference_too
def test_a_histogram_is_the_mean_of_the_magnitudes(backend):
    """A ramp of slope (1, 2) has the gradient (2, 4) everywhere: length sqrt(20), atan(1 / 2) = 26.6 degrees."""
    y, x = torch.meshgrid(torch.arange(24), torch.arange(32), indexing="ij")
    cells = features_of((y + 2 * x).to(torch.uint8), target="cells", feature_vector=False, backend=backend)
    inner = cells[1:-1, 1:-1]
    torch.testing.assert_close(inner[..., 1], torch.full_like(inner[..., 1], 20**0.5))
    assert (inner.sum(-1) == inner[..., 1]).all()
    left = cells[1, 0]  # 8 of 64 pixels have no left neighbour: (2, 0), 90 degrees
    torch.testing.assert_close(left[[1, 4]], torch.tensor([20**0.5 * 7 / 8, 2 / 8]))


@with_the_reference_too
def test_the_channel_of_the_largest_magnitude_counts(backend):
    flat, steep = images_of(torch.uint8, 1, 1, 24, 32) // 16, images_of(torch.uint8, 1, 1, 24, 32)
    expected = features_of(steep, backend=backend)
    got = features_of(torch.cat((flat // 16, steep, flat // 16), 1), backend=backend)
    assert torch.allclose(got, expected, atol=0.2)  # where steep happens to be flat the others count
    assert torch.equal(features_of(steep.expand(1, 3, 24, 32), backend=backend), expected)
    assert torch.equal(features_of(torch.cat((steep, 0 * steep), 1), backend=backend), expected)


@with_the_reference_too
def test_sizes_of_images_and_what_is_flattened(backend):
    images = images_of(torch.uint8, 2, 3, 40, 48)
    whole = result_of(images, backend=backend)
    assert (whole.features.shape, whole.image.shape) == ((2, 3 * 4 * 81), (2, 40, 48))
    one = result_of(images[1], backend=backend)
    assert torch.equal(one.features, whole.features[1])
    assert torch.equal(one.image, whole.image[1])
    gray = result_of(images[0, 1], backend=backend)
    assert torch.equal(gray.features, result_of(images[:1, 1:2], backend=backend).features[0])
    assert (gray.features.shape, gray.image.shape) == ((3 * 4 * 81,), (40, 48))
    assert features_of(images[0, 1], feature_vector=False, backend=backend).shape == (3, 4, 3, 3, 9)
    assert features_of(images[0], target="cells", feature_vector=False, backend=backend).shape == (5, 6, 9)
    assert features_of(images[0], target="cells", backend=backend).shape == (5 * 6 * 9,)


@with_the_reference_too
def test_pixels_outside_whole_cells_do_not_count(backend):
    images = images_of(torch.uint8, 1, 1, 47, 63)
    expected = result_of(images, backend=backend)
    images[:, :, 41:], images[:, :, :, 57:] = 0, 0  # row 40 and column 56 are neighbours of what counts
    got = result_of(images, backend=backend)
    assert torch.equal(got.features, expected.features)
    assert torch.equal(got.image, expected.image)
    assert (got.image[:, 40:] == 0).all()
    assert (got.image[:, :, 56:] == 0).all()


@with_the_reference_too
def test_constant_images_have_no_features(backend):
    for norm in NORMS:
        result = result_of(torch.full((1, 3, 30, 40), 0.3), block_norm=norm, backend=backend)
        assert (result.features == 0).all()
        assert (result.image == 0).all()


@with_the_reference_too
def test_empty_batch(backend):
    result = result_of(torch.zeros(0, 3, 40, 48), backend=backend)
    assert (result.features.shape, result.image.shape) == ((0, 972), (0, 40, 48))


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_give_the_same_bits(backend, dtype):
    images = images_of(dtype, 2, 3, 41, 52)
    expected = result_of(images, backend=backend)
    for moved in (
        images.contiguous(memory_format=torch.channels_last),
        images.repeat_interleave(2, 3)[..., ::2],
        images.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        torch.cat((images, images), 1)[:, 3:],
    ):
        assert not moved.is_contiguous()
        got = result_of(moved, backend=backend)
        assert torch.equal(got.features, expected.features)
        assert torch.equal(got.image, expected.image)
    gray = images[:, :1].expand(2, 3, 41, 52)
    assert torch.equal(features_of(gray, backend=backend), features_of(gray.contiguous(), backend=backend))


@on_every_backend
def test_same_bits_for_any_number_of_threads(backend):
    images = images_of(torch.uint8, 3, 3, 200, 150)
    expected = result_of(images, backend=backend)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        got = result_of(images, backend=backend)
        assert torch.equal(got.features, expected.features)
        assert torch.equal(got.image, expected.image)


@on_every_backend
def test_a_batch_is_its_images(backend):
    images = images_of(torch.float32, 4, 3, 60, 76)
    together = features_of(images, backend=backend)
    apart = torch.stack([features_of(image, backend=backend) for image in images])
    assert torch.equal(together, apart)


@on_every_backend
def test_wide_images_are_worked_on_in_pieces(backend):
    """More pixels in a row of cells than are worked on together, in cells that do and do not fill vectors."""
    images = images_of(torch.uint8, 1, 3, 27, 3001)
    for cell in ((8, 8), (9, 5), (27, 100), (1, 3)):
        options = {"pixels_per_cell": cell, "cells_per_block": (1, 2)}
        expected = features_of(images, **options, backend="reference")
        assert (features_of(images, **options, backend=backend) - expected).abs().max() < 1e-6


def test_bands_do_not_matter(monkeypatch):
    images = images_of(torch.float32, 2, 3, 83, 90).requires_grad_()
    weights = torch.randn(2, 8 * 9 * 81)
    whole = result_of(images, backend="portable")
    (grad,) = torch.autograd.grad((whole.features * weights).sum() + whole.image.sum(), images)
    monkeypatch.setattr(portable, "BAND_BYTES", 1)
    banded = result_of(images, backend="portable")
    (banded_grad,) = torch.autograd.grad((banded.features * weights).sum() + banded.image.sum(), images)
    assert torch.equal(banded.features, whole.features)
    assert torch.equal(banded.image, whole.image)
    torch.testing.assert_close(banded_grad, grad, rtol=1e-5, atol=1e-5 * float(grad.abs().max()))


# ---- Backends, tracing -----------------------------------------------------------------------------------------------


def test_explain():
    explanation = explain("hog", torch.zeros(2, 3, 64, 64))
    assert explanation.chosen == BACKENDS[0]
    assert "the tensors are on cpu, not on a CUDA device" in explanation.cannot["triton"]


def test_calls_that_need_no_graph_skip_the_dispatcher_and_others_do_not():
    images = images_of(torch.float32, 1, 24, 24)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        plain = features_of(images)
    assert "inpaint_kernels::hog" not in {event.name for event in profile.events()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        graph = features_of(images.clone().requires_grad_())
    assert "inpaint_kernels::hog" in {event.name for event in profile.events()}
    assert graph.requires_grad
    assert torch.equal(plain, graph)


SETTINGS = (9, (8, 8), (2, 2), "L2-Hys", False, False)


@with_the_reference_too
def test_opcheck(backend):
    op = torch.ops.inpaint_kernels.hog.default
    images = torch.rand(2, 3, 24, 33)
    torch.library.opcheck(op, (images.clone().requires_grad_(), *SETTINGS, True, backend))
    torch.library.opcheck(op, (images.clone().requires_grad_(), 8, (5, 4), (1, 2), "L1", True, True, False, backend))
    torch.library.opcheck(op, ((images * 255).byte(), *SETTINGS, False, backend))
    torch.library.opcheck(op, (images.transpose(2, 3), *SETTINGS, True, backend))


@on_every_backend
@pytest.mark.parametrize("visualize", [False, True])
def test_compiles_into_one_graph_for_all_sizes(backend, visualize):
    def call(images: Tensor) -> Any:
        return hog(images, visualize=visualize, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    for size in ((32, 40), (50, 47), (64, 31)):
        images = torch.rand(2, 3, *size)
        for got, expected in zip(compiled(images), call(images), strict=True):
            assert torch.equal(got, expected)


@on_every_backend
def test_export_with_dynamic_sizes(backend):
    module = HOG(8, pixels_per_cell=(6, 8), cells_per_block=(2, 2), feature_vector=False, backend=backend)
    sizes = {2: torch.export.Dim("h", min=24, max=640), 3: torch.export.Dim("w", min=24, max=640)}
    program = torch.export.export(module, (torch.rand(1, 3, 48, 56),), dynamic_shapes=(sizes,))
    assert str(program.graph).count("inpaint_kernels.hog") == 1
    images = torch.rand(1, 3, 77, 90)
    assert torch.equal(program.module()(images), module(images))


@on_every_backend
def test_autocast_changes_nothing(backend):
    images = torch.rand(1, 3, 32, 40)
    expected = result_of(images, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = result_of(images, backend=backend)
    assert torch.equal(got.features, expected.features)
    assert torch.equal(got.image, expected.image)


def test_the_module():
    images = images_of(torch.uint8, 2, 3, 40, 48)
    options: Any = {"pixels_per_cell": (6, 8), "cells_per_block": 2, "block_norm": "L1-sqrt", "transform_sqrt": True}
    module = HOG(8, **options, visualize=True)
    for got, expected in zip(module(images), result_of(images, 8, **options), strict=True):
        assert torch.equal(got, expected)
    assert not list(module.parameters())
    assert repr(module) == (
        "HOG(8, pixels_per_cell=(6, 8), cells_per_block=2, block_norm='L1-sqrt', visualize=True, transform_sqrt=True)"
    )
    assert repr(HOG()) == "HOG(9, pixels_per_cell=(8, 8), cells_per_block=(3, 3))"
    with use_backend("portable"):
        assert torch.allclose(HOG(target="cells")(images), features_of(images, target="cells", backend="reference"))
    with pytest.raises(ValueError, match="block_norm: expected one of"):
        HOG(block_norm="l2")


# ---- Errors ----------------------------------------------------------------------------------------------------------

IMAGES = torch.zeros(2, 3, 40, 48)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": None}, TypeError, "images: expected a torch.Tensor, got NoneType"),
        ({"images": IMAGES[0, 0, 0]}, ValueError, "images: expected shape [B, C, H, W], [C, H, W] or [H, W], got [48]"),
        (
            {"images": IMAGES[None]},
            ValueError,
            "images: expected shape [B, C, H, W], [C, H, W] or [H, W], got [1, 2, 3",
        ),
        ({"images": IMAGES.to(torch.complex64)}, TypeError, "images: expected torch.bool or torch.uint8 or"),
        ({"images": IMAGES[:, :0]}, ValueError, "images: expected at least one channel, got shape [2, 0, 40, 48]"),
        (
            {"images": IMAGES[:, :, :23]},
            ValueError,
            "images: expected at least 24 x 24 pixels for these cells and blocks, got shape [2, 3, 23, 48]",
        ),
        (
            {"images": IMAGES[0, 0, :, :7], "target": "cells"},
            ValueError,
            "images: expected at least 8 x 8 pixels for these cells and blocks, got shape [40, 7]",
        ),
        ({"orientations": 0}, ValueError, "orientations: expected a number >= 1, got 0"),
        ({"orientations": 9.0}, TypeError, "orientations: expected an integer, got float"),
        ({"pixels_per_cell": (8, 0)}, ValueError, "pixels_per_cell: expected a number >= 1, got 0"),
        ({"pixels_per_cell": (8,)}, ValueError, "pixels_per_cell: expected an integer or a pair (rows, columns), got"),
        ({"cells_per_block": -1}, ValueError, "cells_per_block: expected a number >= 1, got -1"),
        ({"cells_per_block": (2, 2.0)}, TypeError, "cells_per_block: expected an integer, got float"),
        ({"block_norm": "l2"}, ValueError, "block_norm: expected one of 'L1', 'L1-sqrt', 'L2', 'L2-Hys', got 'l2'"),
        ({"target": "pixels"}, ValueError, "target: expected one of 'blocks', 'cells', got 'pixels'"),
        (
            {"visualize": True, "pixels_per_cell": (1, 8)},
            ValueError,
            "pixels_per_cell: expected at least 2 x 2 with visualize, got 1 x 8",
        ),
        ({"backend": "cuda"}, RuntimeError, "hog has no cuda kernel"),
        ({"backend": "triton"}, RuntimeError, "hog: backend 'triton' was requested and cannot run"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of"),
    ],
    ids=lambda x: x.split(", got")[0] if isinstance(x, str) else "",
)
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        hog(**{"images": IMAGES, **change})


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native library has no CPU kernel")
def test_the_kernel_checks_what_it_reads():
    def kernel(images: Tensor = IMAGES, lines: Tensor | None = None, sizes: Any = (9, 8, 8, 3, 3), norm: str = "L2"):
        return torch.ops.inpaint_native.hog(images, lines, *sizes, norm, False, False)

    with pytest.raises(RuntimeError, match="images: expected 4 dimensions, got 3"):
        kernel(IMAGES[0])
    with pytest.raises(RuntimeError, match="images: expected at least one channel and one block"):
        kernel(IMAGES[:, :, :20])
    with pytest.raises(RuntimeError, match="images: expected a real dtype, got ComplexFloat"):
        kernel(IMAGES.to(torch.complex64))
    with pytest.raises(RuntimeError, match="hog: expected positive sizes"):
        kernel(sizes=(0, 8, 8, 3, 3))
    with pytest.raises(RuntimeError, match="block_norm: expected 'L1', 'L1-sqrt', 'L2' or 'L2-Hys', got 'L3'"):
        kernel(norm="L3")
    with pytest.raises(RuntimeError, match="lines: expected \\[ky, kx, orientations, cell rows, cell columns\\] bool"):
        kernel(lines=torch.zeros(1, 1, 9, 8, 7, dtype=torch.bool))
