"""Photo in, filled photo out: every kind of pixel, known pixels untouched, bad input named."""

from __future__ import annotations

import numpy as np
import pytest

from inpaint_kernels.photo import fill_photo

HEIGHT, WIDTH = 48, 64
MASK = np.zeros((HEIGHT, WIDTH), bool)
MASK[18:30, 24:40] = True


def smooth_pixels(channels: int, dtype: str) -> np.ndarray:
    """A slanted ramp with a little texture, different in each channel; alpha (even channel counts) is opaque."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    noise = np.random.default_rng(0).normal(scale=0.01, size=(HEIGHT, WIDTH)).astype(np.float32)
    planes = [0.2 + 0.5 * ((c + 1) * rows / HEIGHT + columns / WIDTH) / (c + 2) + noise for c in range(channels)]
    if channels % 2 == 0:
        planes[-1] = np.ones((HEIGHT, WIDTH), np.float32)
    pixels = np.dstack(planes)
    if dtype == "float32":
        pixels = (pixels * 500 - 100).astype(np.float32)
    else:
        pixels = np.rint(pixels * np.iinfo(dtype).max).astype(dtype)
    return pixels[:, :, 0] if channels == 1 else pixels


ALL_KINDS = [
    (1, "uint8"),
    (2, "uint8"),
    (3, "uint8"),
    (4, "uint8"),
    (1, "uint16"),
    (3, "uint16"),
    (4, "uint16"),
    (1, "float32"),
]


@pytest.mark.parametrize(
    ("channels", "dtype", "method"),
    [(*kind, "diffusion") for kind in ALL_KINDS] + [(*kind, "exemplar") for kind in ((1, "uint16"), (4, "uint8"))],
)
def test_every_kind_of_photo_is_filled_and_its_known_pixels_stay(channels: int, dtype: str, method: str) -> None:
    truth = smooth_pixels(channels, dtype)
    damaged = truth.copy()
    colours = slice(0, channels - 1 if channels % 2 == 0 else channels)
    damaged.reshape(HEIGHT, WIDTH, -1)[MASK, colours] = 0
    result = fill_photo(damaged, MASK, method=method)
    assert result.method == method
    assert result.pixels.dtype == truth.dtype
    assert result.pixels.shape == truth.shape
    assert np.array_equal(result.pixels[~MASK], damaged[~MASK])
    span = float(truth.max()) - float(truth.min())
    error = np.abs(result.pixels[MASK].astype(np.float64) - truth[MASK]).max()
    assert error < 0.35 * span  # black, as it came in, is off by up to 0.9
    assert (result.offsets is None) == (method == "diffusion")


def test_what_the_hole_holds_does_not_matter() -> None:
    truth = smooth_pixels(3, "uint8")
    painted = truth.copy()
    painted[MASK] = 255, 0, 255
    gray = smooth_pixels(1, "float32")
    missing = gray.copy()
    missing[MASK] = np.nan
    for one, other in ((truth, painted), (gray, missing)):
        filled, refilled = (fill_photo(pixels, MASK, method="diffusion").pixels for pixels in (one, other))
        assert np.array_equal(filled, refilled)


def test_same_seed_same_bits_and_input_is_not_written_to() -> None:
    truth = smooth_pixels(3, "uint8")
    before = truth.copy()
    assert np.array_equal(fill_photo(truth, MASK, seed=3).pixels, fill_photo(truth, MASK, seed=3).pixels)
    assert np.array_equal(truth, before)


def test_alpha_is_kept_or_made_opaque_in_an_erased_hole() -> None:
    pixels = smooth_pixels(4, "uint8")
    pixels[:, :, 3] = np.where(MASK, 0, 200)
    kept = fill_photo(pixels, MASK, method="diffusion").pixels
    assert np.array_equal(kept[:, :, 3], pixels[:, :, 3])
    opaque = fill_photo(pixels, MASK, method="diffusion", opaque_hole=True).pixels
    assert np.array_equal(opaque[:, :, 3], np.where(MASK, 255, 200))
    assert np.array_equal(opaque[~MASK], pixels[~MASK])


def test_nothing_is_copied_from_transparent_pixels() -> None:
    pixels = smooth_pixels(4, "uint8")
    pixels[:, 45:] = 255, 0, 255, 0
    filled = fill_photo(pixels, MASK).pixels
    assert not ((filled[MASK][:, :3] == (255, 0, 255)).all(1)).any()
    assert np.array_equal(filled[~MASK], pixels[~MASK])


def test_no_hole_returns_a_copy_of_the_input() -> None:
    pixels = smooth_pixels(3, "uint8")
    result = fill_photo(pixels, np.zeros_like(MASK))
    assert result.method == "none"
    assert np.array_equal(result.pixels, pixels)
    assert not np.shares_memory(result.pixels, pixels)


def test_progress_ends_at_one_and_never_goes_back() -> None:
    seen: list[float] = []
    fill_photo(smooth_pixels(3, "uint8"), MASK, progress=lambda fraction, stage: seen.append(fraction))
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.0)
    assert min(seen) >= 0


def test_a_constant_float_photo_is_filled_with_its_constant() -> None:
    pixels = np.full((HEIGHT, WIDTH), 7.5, np.float32)
    assert fill_photo(pixels, MASK, method="diffusion").pixels[MASK] == pytest.approx(7.5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_known_pixels_are_rejected_by_name(value: float) -> None:
    pixels = smooth_pixels(1, "float32")
    pixels[3, 5] = value
    with pytest.raises(
        ValueError, match=rf"pixels: 1 known pixels are NaN or Inf, the first is {value} in row 3, column 5"
    ):
        fill_photo(pixels, MASK)


@pytest.mark.parametrize(
    ("pixels", "mask", "error", "message"),
    [
        (
            np.zeros((4, 4), np.int32),
            np.zeros((4, 4), bool),
            TypeError,
            "pixels: expected uint8, uint16 or floating values",
        ),
        (np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8), TypeError, "mask: expected bool, got uint8"),
        (np.zeros((4, 4, 5), np.uint8), np.zeros((4, 4), bool), ValueError, r"pixels: expected shape .*\[4, 4, 5\]"),
        (np.zeros((0, 4), np.uint8), np.zeros((0, 4), bool), ValueError, r"pixels: expected shape .*\[0, 4\]"),
        (
            np.zeros((4, 4), np.uint8),
            np.zeros((4, 5), bool),
            ValueError,
            r"mask: expected shape .* H=4, W=4, got \[4, 5\]",
        ),
        (np.zeros((4, 4), np.uint8), np.ones((4, 4), bool), ValueError, "mask: every pixel is hole"),
        (
            np.zeros((4, 4, 4), np.uint8),
            np.eye(4, dtype=bool),
            ValueError,
            "every pixel that is not transparent is hole",
        ),
    ],
)
def test_bad_input_is_named(pixels: np.ndarray, mask: np.ndarray, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fill_photo(pixels, mask)


def test_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match="method: expected one of auto, exemplar, diffusion, got 'magic'"):
        fill_photo(smooth_pixels(3, "uint8"), MASK, method="magic")
