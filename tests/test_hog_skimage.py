"""hog beside skimage.feature.hog: every feature within 1e-6, on photos, on noise and where ties abound."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from skimage import data
from skimage.feature import hog as skimage_hog

from inpaint_kernels import drop_in, explain, hog
from inpaint_kernels.reference.hog import line_masks

EXAMPLE = torch.zeros(1, 1, 24, 24, dtype=torch.uint8)
BACKENDS = explain("hog", EXAMPLE).usable
with_all_backends = pytest.mark.parametrize("backend", BACKENDS)
EXACT = [name for name in BACKENDS if name == "cpu"]  # where the last bit of an arc tangent or a hypotenuse decides
pytestmark = pytest.mark.usefixtures("angles_of_the_c_library")
needs_kernel = pytest.mark.skipif("cpu" not in BACKENDS, reason="the native library has no CPU kernel")
NORMS = ("L1", "L1-sqrt", "L2", "L2-Hys")
TOLERANCE = 1e-6


def channels_first(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image if image.ndim == 2 else np.moveaxis(image, -1, 0))


def assert_equals_skimage(image: np.ndarray, backends: Sequence[str] = BACKENDS, **options: Any) -> None:
    """All features, and the picture if there is one, whose values are not bounded by 1."""
    expected = skimage_hog(image, channel_axis=None if image.ndim == 2 else -1, **options)
    for backend in backends:
        got: Any = hog(channels_first(image), backend=backend, **options)
        pairs = zip(got, expected, strict=True) if options.get("visualize") else [(got, expected)]
        for ours, theirs in pairs:
            assert ours.shape == theirs.shape
            difference = np.abs(ours.numpy().astype(np.float64) - theirs) / max(1.0, np.abs(theirs).max())
            wrong = f"{backend}: {(difference > TOLERANCE).sum()} values differ, by up to {difference.max():.2g}"
            assert difference.max() <= TOLERANCE, wrong


def noise(shape: tuple[int, ...], levels: int = 256, seed: int = 0) -> np.ndarray:
    steps = np.random.default_rng(seed).integers(0, levels, shape)
    return (steps * (255 // (levels - 1))).astype(np.uint8)


def ramps(height: int, width: int) -> np.ndarray:
    """Gradients of exactly 0, 45, 90 and 135 degrees, in both directions, side by side."""
    y, x = np.mgrid[:height, :width]
    pieces = [2 * x, 2 * y, x + y, x - y + height, height - y, width - x, 3 * x + 3 * y]
    return np.concatenate([piece % 256 for piece in pieces], 1).astype(np.uint8)


# What is hard: few levels (ties at 45 and 90 degrees, equal channels), flat areas, and gray in three channels.
HARD = {
    "noise": noise((45, 50)),
    "noise in colour": noise((45, 50, 3)),
    "two levels": noise((45, 50), 2),
    "two levels in colour": noise((45, 50, 3), 2),
    "four levels in colour": noise((45, 50, 3), 4),
    "constant": np.full((45, 50), 77, np.uint8),
    "ramps": ramps(40, 9),
    "gray in colour": np.repeat(noise((45, 50, 1), 6), 3, 2),
    "four channels": noise((45, 50, 4), 3),
}
PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "retina", "immunohistochemistry", "hubble_deep_field")


def photo(name: str) -> np.ndarray:
    """An odd crop of a photo that scikit-image's package holds."""
    image = getattr(data, name)()
    top, left = image.shape[0] // 5, image.shape[1] // 5
    return np.ascontiguousarray(image[top : top + 131, left : left + 163])


# ---- Orientations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientations", range(1, 33))
def test_every_number_of_orientations(orientations):
    for name in ("noise in colour", "two levels", "four levels in colour", "ramps"):
        image = HARD[name]
        assert_equals_skimage(image, orientations=orientations)
        assert_equals_skimage((image / 255).astype(np.float32), orientations=orientations)


def published_bins(down: np.ndarray, right: np.ndarray, orientations: int) -> np.ndarray:
    angle = np.rad2deg(np.arctan2(down.astype(np.float64), right.astype(np.float64))) % 180
    width = 180.0 / orientations
    bins = np.full(angle.shape, -1)
    for i in range(orientations):
        bins[(angle >= width * i) & (angle < width * (i + 1))] = i
    return bins


def image_of_gradients(down: np.ndarray, right: np.ndarray, dtype: Any) -> np.ndarray:
    """An image whose pixels (3 i + 1, 3 j + 1) have the gradients [i, j]."""
    image = np.zeros((3 * down.shape[0], 3 * down.shape[1]), dtype)
    image[2::3, 1::3], image[0::3, 1::3] = np.maximum(down, 0), np.maximum(-down, 0)
    image[1::3, 2::3], image[1::3, 0::3] = np.maximum(right, 0), np.maximum(-right, 0)
    return image


def bins_of_pixels(image: np.ndarray, backend: str, orientations: int) -> np.ndarray:
    """Histograms of cells of one pixel tell its bin; -1 where there is no gradient, or no bin."""
    cells = hog(torch.from_numpy(image), orientations, 1, target="cells", feature_vector=False, backend=backend)
    assert isinstance(cells, torch.Tensor)
    cells = cells[1::3, 1::3]
    assert ((cells > 0).sum(-1) <= 1).all()
    return torch.where((cells > 0).any(-1), cells.argmax(-1), -1).numpy()


@needs_kernel
@pytest.mark.parametrize("orientations", [*range(1, 33), 36, 45, 60, 64, 90, 180])
def test_every_gradient_that_bytes_can_have(orientations):
    if orientations not in (8, 9, 12, 31, 32):  # the others: one row and one column of four, the largest among them
        down, right = np.mgrid[0:256:4, -255:256:4] + np.array([3, 0])[:, None, None]
    else:
        down, right = np.mgrid[0:256, -255:256]
    expected = np.where((down != 0) | (right != 0), published_bins(down, right, orientations), -1)
    image = image_of_gradients(down, right, np.uint8)
    assert (bins_of_pixels(image, "cpu", orientations) == expected).all()


@with_all_backends
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("orientations", [1, 2, 5, 8, 9, 12, 31, 32])
def test_gradients_next_to_the_borders(backend, dtype, orientations):
    """A few units in the last place on either side of every border, 0 and 180 degrees among them."""
    border = np.pi * np.arange(2 * orientations)[:, None] / orientations
    scale = np.random.default_rng(0).random((1, 64)) + 0.5
    down, right = (np.sin(border) * scale).astype(dtype), (np.cos(border) * scale).astype(dtype)
    down = (down * (1 + np.finfo(dtype).eps * np.random.default_rng(1).integers(-3, 4, down.shape))).astype(dtype)
    down[::3, ::7] = 0
    right[1::3, ::5] = 0
    down[2::4, ::3] = right[2::4, ::3]
    image = image_of_gradients(down, right, dtype)
    got = bins_of_pixels(image, backend, orientations)
    expected = np.where((down != 0) | (right != 0), published_bins(down, right, orientations), -1)
    if dtype == np.float64 and backend != "cpu":
        # The last bit of the angle decides, and torch's arc tangent is not numpy's.
        angle = np.rad2deg(np.arctan2(down, right)) % (180.0 / orientations)
        undecided = np.minimum(angle, 180.0 / orientations - angle) < 1e-12
        assert (got == expected)[~undecided].all()
    else:
        assert (got == expected).all()


# ---- Options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("transform_sqrt", [False, True])
@pytest.mark.parametrize(("cell", "block"), [((8, 8), (3, 3)), ((6, 7), (2, 3)), ((16, 5), (1, 1)), ((3, 20), (4, 2))])
def test_every_combination_of_options(norm, transform_sqrt, cell, block):
    options: Any = {
        "pixels_per_cell": cell,
        "cells_per_block": block,
        "block_norm": norm,
        "transform_sqrt": transform_sqrt,
    }
    for visualize, vector in itertools.product([False, True], repeat=2):
        for name in ("noise", "four levels in colour"):
            image = HARD[name]
            for converted in (image, (image / 255).astype(np.float32)):
                ties = transform_sqrt and converted.dtype == np.uint8 and name != "noise"
                backends = EXACT if ties else BACKENDS  # see test_square_roots_of_integers
                assert_equals_skimage(converted, backends, visualize=visualize, feature_vector=vector, **options)


@needs_kernel
def test_channels_of_equal_squares_and_different_gradients():
    """11453 = 67^2 + 106^2 = 77^2 + 74^2, whose hypotenuses the C library rounds to different numbers."""
    squares: dict[int, list[tuple[int, int]]] = {}
    for a, b in itertools.combinations_with_replacement(range(1, 256), 2):
        squares.setdefault(a * a + b * b, []).append((a, b))
    pairs = [pair for same in squares.values() for pair in itertools.permutations(same, 2)]
    first, second = (np.array([pair[i] for pair in pairs[:4096]]) for i in (0, 1))
    channels = [image_of_gradients(v[:, 0].reshape(64, -1), v[:, 1].reshape(64, -1), np.uint8) for v in (first, second)]
    image = np.stack(channels, -1)
    options: Any = {"pixels_per_cell": (3, 3), "cells_per_block": (1, 1), "orientations": 32}
    assert_equals_skimage(image, EXACT, **options)
    assert_equals_skimage(image.astype(np.uint16), EXACT, **options)


@needs_kernel
@pytest.mark.parametrize("orientations", [3, 6, 8, 9, 12, 18])
def test_square_roots_of_integers(orientations):
    """Their gradients are at exactly 30 and 60 degrees too: sqrt(12) - sqrt(3) = sqrt(3), sqrt(4) - sqrt(1) = 1."""
    for image in (*HARD.values(), noise((60, 70, 3), 20), noise((60, 70)) // 10):
        for dtype in (np.uint8, np.int16, np.int64):
            assert_equals_skimage(image.astype(dtype), EXACT, orientations=orientations, transform_sqrt=True)


@pytest.mark.parametrize("cell", [(1, 1), (1, 4), (2, 2), (3, 5), (5, 3), (17, 9), (24, 24), (40, 33)])
def test_cells_of_any_size(cell):
    image = noise((83, 97, 3), 5)
    for visualize in (False, True)[: min(cell)]:
        assert_equals_skimage(image, pixels_per_cell=cell, cells_per_block=(2, 2), visualize=visualize)


def test_blocks_of_any_size_and_images_of_a_single_one():
    for shape, cell, block in [((8, 8), 8, 1), ((9, 15, 3), 8, 1), ((24, 24), 8, 3), ((33, 12), 4, 3), ((1, 1), 1, 1)]:
        image = noise(shape)
        assert_equals_skimage(image, pixels_per_cell=(cell, cell), cells_per_block=(block, block))
    image = noise((50, 40))
    for cells in [(1, 1), (1, 3), (5, 2), (6, 5)]:
        for orientations in (1, 2, 9):
            assert_equals_skimage(image, cells_per_block=cells, orientations=orientations)


@pytest.mark.parametrize("orientations", [1, 2, 3, 6, 7, 9, 16])
def test_lines_of_the_picture(orientations):
    for cell in [(2, 2), (4, 4), (6, 6), (8, 8), (10, 16), (22, 22), (31, 31)]:
        image = noise((3 * cell[0] + 1, 2 * cell[1] + 3))
        options: Any = {"pixels_per_cell": cell, "cells_per_block": (1, 1), "orientations": orientations}
        assert_equals_skimage(image, visualize=True, **options)


def test_lines_are_rounded_where_they_lie():
    """As published: with some sizes the first cells of an image have other lines than all that follow."""
    assert [line_masks(9, size, size).shape[:2] for size in (6, 8, 16, 32)] == [(1, 3), (1, 1), (1, 1), (2, 1)]
    for orientations, size in itertools.product((1, 3, 9), (6, 32)):
        image = noise((5 * size, 4 * size))
        options: Any = {"orientations": orientations, "pixels_per_cell": (size, size), "cells_per_block": (1, 1)}
        assert_equals_skimage(image, visualize=True, **options)


# ---- Dtypes ----------------------------------------------------------------------------------------------------------

LARGEST = {np.bool_: 1, np.uint8: 255, np.int8: 127, np.int16: 32767, np.uint16: 65535, np.float16: 2048}


@pytest.mark.parametrize(
    "dtype",
    [*LARGEST, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64],
)
@pytest.mark.parametrize("orientations", [8, 9])
def test_every_dtype(dtype, orientations):
    generator = np.random.default_rng(0)
    largest = LARGEST.get(dtype, 2**31 - 1)
    for shape in ((40, 49), (40, 49, 3)):
        values = generator.integers(0, largest, shape, endpoint=True)
        if np.issubdtype(dtype, np.signedinteger):
            values = 2 * (values - largest // 2)
        assert_equals_skimage(values.astype(dtype), orientations=orientations, visualize=True)
        few = generator.integers(0, 3, shape).astype(dtype)
        assert_equals_skimage(few, orientations=orientations)


@with_all_backends
def test_bfloat16_is_computed_as_the_float32_that_it_is(backend):
    image = torch.rand(3, 40, 49).bfloat16()
    expected = skimage_hog(image.float().numpy(), channel_axis=0)
    got = hog(image, backend=backend)
    assert isinstance(got, torch.Tensor)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=TOLERANCE)


@with_all_backends
@pytest.mark.parametrize("norm", NORMS)
def test_nan_reaches_the_blocks_of_its_neighbours(backend, norm):
    image = noise((64, 64, 3)).astype(np.float32)
    image[30, 33, 1] = np.nan
    expected = skimage_hog(image, channel_axis=-1, block_norm=norm, feature_vector=False)
    got = hog(channels_first(image), block_norm=norm, feature_vector=False, backend=backend)
    assert isinstance(got, torch.Tensor)
    assert np.isnan(expected).any()
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=TOLERANCE)


def test_tiny_and_large_values():
    image = np.random.default_rng(0).random((40, 40, 3)).astype(np.float32)
    for scale in (1e-12, 1e-6, 1e-4, 1e6, 1e15):
        for norm in NORMS:
            assert_equals_skimage(image * np.float32(scale), block_norm=norm)


# ---- Photos ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PHOTOS)
def test_photos(name):
    image = photo(name)
    for colours in (image, image[..., 1]):
        for orientations in (8, 9):
            assert_equals_skimage(colours, orientations=orientations, visualize=orientations == 9)
            floats = (colours / 255).astype(np.float32)
            assert_equals_skimage(floats, orientations=orientations)
    assert_equals_skimage(image, block_norm="L1-sqrt", orientations=6)
    assert_equals_skimage((image / 255).astype(np.float32), transform_sqrt=True, orientations=12)


@needs_kernel
@pytest.mark.parametrize("name", PHOTOS)
def test_photos_of_square_roots_and_of_double_precision(name):
    image = photo(name)
    assert_equals_skimage(image, EXACT, transform_sqrt=True)
    assert_equals_skimage(image / 255, EXACT, orientations=8)
    assert_equals_skimage(image[..., 1] / 255, EXACT, orientations=12, transform_sqrt=True)
    gray = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    assert_equals_skimage(gray, EXACT)


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("orientations", [6, 8, 9, 12])
def test_whole_photos(name, orientations):
    image = getattr(data, name)()
    for colours in (image, image[..., 1]):
        assert_equals_skimage(colours, EXACT, orientations=orientations)
        assert_equals_skimage((colours / 255).astype(np.float32), EXACT, orientations=orientations)


@pytest.mark.parametrize("name", HARD)
def test_hard_images(name):
    image = HARD[name]
    for orientations, norm in itertools.product((4, 9), NORMS):
        assert_equals_skimage(image, orientations=orientations, block_norm=norm)
        floats = (image / 255).astype(np.float32)
        assert_equals_skimage(floats, orientations=orientations, block_norm=norm)
        assert_equals_skimage((image * 257.0).astype(np.uint16), orientations=orientations, block_norm=norm)


# ---- The drop-in -----------------------------------------------------------------------------------------------------


def same(ours: Any, theirs: Any) -> None:
    ours, theirs = (x if isinstance(x, tuple) else (x,) for x in (ours, theirs))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert isinstance(a, np.ndarray)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float16, np.float32, np.float64, np.bool_])
@pytest.mark.parametrize("visualize", [False, True])
def test_drop_in_returns_the_same_arrays(dtype, visualize):
    gray, colours = noise((41, 50)).astype(dtype), noise((41, 50, 3)).astype(dtype)
    same(drop_in.hog(gray, visualize=visualize), skimage_hog(gray, visualize=visualize))
    for axis in (2, -1, 0, 1):
        moved = np.ascontiguousarray(np.moveaxis(colours, -1, axis))
        options = {"channel_axis": axis, "visualize": visualize}
        same(drop_in.hog(moved, **options), skimage_hog(moved, **options))


def test_drop_in_takes_positional_arguments_as_published():
    image = noise((40, 40))
    arguments = (8, (5, 6), (2, 2), "L1", True, True, False)
    same(drop_in.hog(image, *arguments), skimage_hog(image, *arguments))


def test_drop_in_takes_any_array():
    image = noise((41, 50, 3))
    read_only = image.copy()
    read_only.flags.writeable = False
    packed = np.zeros((41, 50), np.dtype([("a", np.uint8), ("b", np.int16)]))
    packed["b"] = image[..., 0]
    big_endian = image.astype(">i4")
    for array in (image[::-1, ::-2, ::-1], read_only, big_endian, np.asfortranarray(image), image.transpose(1, 0, 2)):
        same(drop_in.hog(array, channel_axis=-1), skimage_hog(array, channel_axis=-1))
    same(drop_in.hog(packed["b"]), skimage_hog(packed["b"]))
    same(drop_in.hog(image[..., 0].tolist()), skimage_hog(image[..., 0].tolist()))


def test_drop_in_rejects_what_is_no_image():
    with pytest.raises(ValueError, match=r"image: expected two spatial .* \[40, 40, 3\] with channel_axis=None"):
        drop_in.hog(noise((40, 40, 3)))
    with pytest.raises(ValueError, match=r"image: expected two spatial .* \[40, 40\] with channel_axis=-1"):
        drop_in.hog(noise((40, 40)), channel_axis=-1)
    with pytest.raises(ValueError, match="images: expected at least 24 x 24 pixels"):
        drop_in.hog(noise((20, 40)))
