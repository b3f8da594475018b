"""Masks from files, boxes, colours and alpha; growing and resizing them; what is said about them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

from inpaint_kernels import masks
from inpaint_kernels.masks import Box

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("text", "box"), [("1,2,3,4", (1, 2, 3, 4)), (" -5, 0,10,1", (-5, 0, 10, 1))])
def test_boxes_are_read(text: str, box: tuple[int, ...]) -> None:
    assert masks.parse_box(text) == box


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "1,2,3,x", "1.5,2,3,4", "1,2,0,4", "1,2,3,-4"])
def test_wrong_boxes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="box: expected"):
        masks.parse_box(text)


@pytest.mark.parametrize("text", ["#ff00ff", "ff00ff", "#F0F", "f0f"])
def test_colours_are_read(text: str) -> None:
    assert masks.parse_colour(text) == (255, 0, 255)


@pytest.mark.parametrize("text", ["", "#ff00f", "magenta", "#gg0000", "#ff00ff00"])
def test_wrong_colours_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="colour: expected #rrggbb"):
        masks.parse_colour(text)


def test_bright_is_hole_whatever_the_picture_is_made_of() -> None:
    gray = np.array([[0, 127, 128, 255]], np.uint8)
    expected = np.array([[False, False, True, True]])
    assert np.array_equal(masks.mask_from_brightness(gray), expected)
    assert np.array_equal(masks.mask_from_brightness(gray.astype(np.uint16) * 257), expected)
    assert np.array_equal(masks.mask_from_brightness(gray.astype(np.float32) / 255), expected)
    red = np.zeros((1, 4, 3), np.uint8)
    red[..., 0] = gray
    assert np.array_equal(masks.mask_from_brightness(red), expected)
    assert np.array_equal(masks.mask_from_brightness(gray, threshold=0.4), np.array([[False, True, True, True]]))


def test_black_is_never_hole_and_transparent_counts_as_black() -> None:
    assert not masks.mask_from_brightness(np.zeros((2, 2), np.uint8), threshold=0.0).any()
    white = np.full((1, 2, 4), 255, np.uint8)
    white[0, 1, 3] = 0
    assert np.array_equal(masks.mask_from_brightness(white), [[True, False]])


def test_boxes_are_joined_and_cut_at_the_border() -> None:
    mask = masks.mask_from_boxes(6, 8, [Box(1, 2, 3, 2), Box(7, -1, 5, 2)])
    expected = np.zeros((6, 8), bool)
    expected[2:4, 1:4] = True
    expected[0, 7] = True
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize("box", [Box(8, 0, 1, 1), Box(0, 6, 1, 1), Box(-3, 0, 3, 1)])
def test_a_box_outside_the_photo_is_refused(box: Box) -> None:
    with pytest.raises(ValueError, match="lies outside the photo of 8 x 6 pixels"):
        masks.mask_from_boxes(6, 8, [box])


def test_colour_is_found_within_its_tolerance_in_8_and_16_bits() -> None:
    pixels = np.array([[[255, 0, 255], [250, 10, 255], [200, 0, 255], [255, 255, 255]]], np.uint8)
    for picture in (pixels, pixels.astype(np.uint16) * 257, np.dstack([pixels, pixels[:, :, :1] * 0])):
        assert masks.mask_from_colour(picture, (255, 0, 255), 0).tolist() == [[True, False, False, False]]
        assert masks.mask_from_colour(picture, (255, 0, 255), 10).tolist() == [[True, True, False, False]]
        assert masks.mask_from_colour(picture, (255, 0, 255), 55).tolist() == [[True, True, True, False]]
    gray = np.array([[0, 128, 255]], np.uint8)
    assert masks.mask_from_colour(gray, (128, 128, 128), 5).tolist() == [[False, True, False]]


def test_colour_needs_integers_and_a_sensible_tolerance() -> None:
    with pytest.raises(ValueError, match="8-bit and 16-bit"):
        masks.mask_from_colour(np.zeros((2, 2), np.float32), (0, 0, 0))
    with pytest.raises(ValueError, match="tolerance: expected 0 to 255, got 256"):
        masks.mask_from_colour(np.zeros((2, 2), np.uint8), (0, 0, 0), 256)


def test_transparent_is_hole() -> None:
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = 0, 127, 128
    assert masks.mask_from_alpha(pixels).tolist() == [[True, True, False]]
    assert masks.mask_from_alpha(pixels[:, :, 2:]).tolist() == [[True, True, False]]
    assert masks.mask_from_alpha(pixels, 0.1).tolist() == [[True, False, False]]
    with pytest.raises(ValueError, match="no alpha channel"):
        masks.mask_from_alpha(pixels[:, :, :3])


@pytest.mark.parametrize("threshold", [-0.1, 1.1, 128, float("nan")])
def test_thresholds_are_shares(threshold: float) -> None:
    for source in (masks.mask_from_brightness, masks.mask_from_alpha):
        with pytest.raises(ValueError, match="threshold: expected a share"):
            source(np.zeros((2, 2, 4), np.uint8), threshold)


@pytest.mark.parametrize("radius", [0, 1, 2, 5, 13, 100])
@pytest.mark.parametrize("shape", [(40, 30), (1, 50), (50, 1)])
def test_growing_reaches_every_pixel_within_the_radius(radius: int, shape: tuple[int, int]) -> None:
    mask = RNG.random(shape) < 0.02
    mask[0, 0] = True
    distance = distance_transform_edt(~mask)
    assert np.array_equal(masks.grow_mask(mask, radius), distance <= radius)


def test_growing_nothing_and_growing_backwards() -> None:
    assert not masks.grow_mask(np.zeros((5, 5), bool), 3).any()
    with pytest.raises(ValueError, match="radius: expected 0 or more, got -1"):
        masks.grow_mask(np.zeros((5, 5), bool), -1)


def test_enlarging_is_nearest_and_reducing_loses_no_hole() -> None:
    mask = RNG.random((6, 9)) < 0.3
    assert np.array_equal(masks.resize_mask(mask, 12, 27), mask.repeat(2, 0).repeat(3, 1))
    assert np.array_equal(masks.resize_mask(mask, 3, 3), mask.reshape(3, 2, 3, 3).any((1, 3)))
    scratch = np.zeros((1000, 1000), bool)
    scratch[:, 501] = True
    assert masks.resize_mask(scratch, 37, 41).any(axis=1).all()


def test_suspicious_sizes_are_warned_of() -> None:
    mask = np.zeros((200, 200), bool)
    assert masks.hole_warning(mask) is None
    mask[0, :3] = True
    assert "less than 0.01%" in str(masks.hole_warning(mask))
    mask[0, :4] = True
    assert masks.hole_warning(mask) is None
    mask[:180] = True
    assert masks.hole_warning(mask) is None
    mask[180, 0] = True
    assert "36,001 of 40,000 pixels (90 %), more than 90%" in str(masks.hole_warning(mask))
