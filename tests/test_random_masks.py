"""Masks made at run time: seeded, distributed as published, and the crops around their holes."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from inpaint_kernels.models import random_masks
from inpaint_kernels.models._interface import Box
from inpaint_kernels.models.random_masks import (
    MaskFolder,
    box_masks,
    crop_boxes,
    drawn_masks,
    free_form_masks,
    random_boxes,
    random_boxes_within,
    random_walk_masks,
    shrink_boxes,
    window_around,
)
from torch import Tensor

from inpaint_kernels import images, masks


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shares(masks: Tensor) -> Tensor:
    return masks.float().mean((1, 2, 3))


KINDS = {
    "boxes": lambda generator, device=None: box_masks(
        shrink_boxes(random_boxes(3, 64, 32, generator=generator), 8, generator=generator), 64, device=device
    ),
    "strokes": lambda generator, device=None: free_form_masks(3, (64, 96), generator=generator, device=device),
    "walks": lambda generator, device=None: random_walk_masks(3, (64, 96), generator=generator, device=device),
    "drawn": lambda generator, device=None: drawn_masks(
        [torch.eye(20).roll(n, 0) for n in range(20)], 3, 16, generator=generator, device=device
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_masks_and_another_one_others(kind):
    make = KINDS[kind]
    masks = make(seeded())
    assert masks.dtype == torch.bool
    assert masks.shape[:2] == (3, 1)
    assert torch.equal(masks, make(seeded()))
    assert not torch.equal(masks, make(seeded(1)))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    make(seeded())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_makes_the_same_masks(kind):
    masks = KINDS[kind](seeded(), "cuda")
    assert masks.is_cuda
    assert torch.equal(masks.cpu(), KINDS[kind](seeded()))


# Boxes ----------------------------------------------------------------------------------------------------------------


def test_boxes_are_anywhere_inside_the_margin():
    boxes = random_boxes(2000, (10, 12), (4, 5), margin=(1, 2), generator=seeded())
    assert {box.size for box in boxes} == {(4, 5)}
    counts = Counter((box.top, box.left) for box in boxes)
    places = set(itertools.product(range(1, 6), range(2, 6)))
    assert set(counts) == places
    expected = 2000 / len(places)
    assert all(abs(count - expected) < 4 * math.sqrt(expected) for count in counts.values())


def test_a_box_as_large_as_the_image_is_the_image():
    assert random_boxes(1, 8, 8, generator=seeded()) == [Box(0, 0, 8, 8)]


def test_holes_lie_in_their_windows_with_sides_of_all_lengths():
    windows = random_boxes(500, 40, 20, generator=seeded())
    holes = random_boxes_within(windows, (12, 3), (16, 20), generator=seeded(1))
    for window, hole in zip(windows, holes, strict=True):
        assert window.top <= hole.top < hole.bottom <= window.bottom
        assert window.left <= hole.left < hole.right <= window.right
    assert {hole.size[0] for hole in holes} == set(range(12, 17))
    assert {hole.size[1] for hole in holes} == set(range(3, 21))


def test_shrunk_boxes_lose_as_much_at_opposite_sides():
    boxes = [Box(5, 7, 37, 47)] * 200
    shrunk = shrink_boxes(boxes, (4, 2), generator=seeded())
    rows, columns = {box.top - 5 for box in shrunk}, {box.left - 7 for box in shrunk}
    assert (rows, columns) == ({0, 1, 2, 3, 4}, {0, 1, 2})
    assert all(37 - box.bottom == box.top - 5 and 47 - box.right == box.left - 7 for box in shrunk)


def test_deepfills_holes_cover_as_much_as_published():
    boxes = random_boxes(1000, 256, 128, generator=seeded())
    share = float(shares(box_masks(shrink_boxes(boxes, 16, generator=seeded()), 256)).mean())
    assert share == pytest.approx((112 / 256) ** 2, rel=0.02)  # sides of 128 less twice 8 on the mean


def test_box_masks_are_true_in_the_boxes_alone():
    masks = box_masks([Box(1, 2, 3, 5), Box(0, 0, 4, 6)], (4, 6))
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[1:3, 2:5] = True
    assert torch.equal(masks[0, 0], expected)
    assert masks[1].all()


# Crops ----------------------------------------------------------------------------------------------------------------


def test_crops_are_each_images_own_part():
    x = torch.arange(2 * 3 * 6 * 8).view(2, 3, 6, 8)
    boxes = [Box(0, 1, 4, 3), Box(2, 6, 6, 8)]
    crops = crop_boxes(x, boxes)
    assert torch.equal(crops, torch.stack([x[0, :, 0:4, 1:3], x[1, :, 2:6, 6:8]]))
    assert torch.equal(crop_boxes(x, boxes[:1]), x[:, :, 0:4, 1:3])


@pytest.mark.parametrize(
    ("hole", "window"),
    [
        (Box(6, 8, 8, 12), Box(4, 7, 10, 13)),  # around its middle
        (Box(0, 0, 2, 2), Box(0, 0, 6, 6)),  # moved into the image
        (Box(11, 15, 12, 16), Box(6, 10, 12, 16)),
        (Box(0, 0, 12, 16), Box(3, 5, 9, 11)),  # larger than the window
    ],
)
def test_a_window_lies_around_the_hole_and_in_the_image(hole, window):
    mask = box_masks([hole], (12, 16))[0, 0]
    assert window_around(mask, 6) == window


def test_the_window_of_an_empty_hole_is_the_images_middle():
    assert window_around(torch.zeros(12, 16, dtype=torch.bool), (6, 4)) == Box(3, 6, 9, 10)


# Strokes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 12, 39])
@pytest.mark.parametrize(
    ("start", "end"), [((5, 9), (31, 50)), ((40, 3), (2, 60)), ((20, 0), (20, 64)), ((7, 7), (7, 7))]
)
def test_a_piece_is_what_is_near_to_its_segment(start, end, width):
    size = (48, 64)
    drawn = random_masks._draw([random_masks._Stroke([start, end], width)], size, None)[0]
    a, b = torch.tensor(start).double(), torch.tensor(end).double()
    pixels = torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij"), -1).double()
    length = ((b - a) ** 2).sum().clamp_min(1)
    along = (((pixels - a) * (b - a)).sum(-1, keepdim=True) / length).clamp(0, 1)
    distance = (pixels - a - along * (b - a)).norm(dim=-1)
    on_the_border = (distance - width / 2).abs() < 1e-9
    assert torch.equal(drawn | on_the_border, (distance < width / 2) | on_the_border)
    assert drawn[on_the_border].all()


def test_strokes_are_what_pillow_draws_but_for_their_border():
    draw = pytest.importorskip("PIL.ImageDraw")
    image = pytest.importorskip("PIL.Image")
    np = pytest.importorskip("numpy")
    points, width, size = [(20, 15), (70, 90), (30, 110), (90, 20)], 17, (96, 128)
    picture = image.new("L", size[::-1], 0)
    brush = draw.Draw(picture)
    brush.line([(x, y) for y, x in points], fill=1, width=width)
    for y, x in points:
        brush.ellipse((x - width // 2, y - width // 2, x + width // 2, y + width // 2), fill=1)
    pillow = torch.from_numpy(np.array(picture)) > 0
    thinner, thicker = (
        random_masks._draw([random_masks._Stroke(points, w)], size, None)[0] for w in (width - 3, width + 3)
    )
    assert not (thinner & ~pillow).any()
    assert not (pillow & ~thicker).any()


def test_large_images_do_not_overflow():
    size = (60, 30000)
    stroke = random_masks._Stroke([(20, 0), (40, 30000)], 39)
    drawn = random_masks._draw([stroke], size, None)[0]
    assert drawn.sum().item() == pytest.approx(39 * 30000, rel=0.01)


def test_strokes_cover_as_much_as_published():
    # 3,000 masks of nipponjo's brush_stroke_mask: mean 0.1503, deviation 0.0792; 5 % cover less than 0.037, 5 % more
    # than 0.291.
    found = shares(free_form_masks(250, 256, generator=seeded()))
    assert found.mean().item() == pytest.approx(0.1503, abs=3 * 0.0792 / math.sqrt(250))
    assert found.std().item() == pytest.approx(0.0792, rel=0.2)
    low, high = found.quantile(torch.tensor([0.05, 0.95])).tolist()
    assert low == pytest.approx(0.037, abs=0.015)
    assert high == pytest.approx(0.291, abs=0.04)


def test_strokes_follow_their_ranges():
    dot = free_form_masks(4, 64, strokes=(1, 1), vertices=(1, 1), width=(1, 1), generator=seeded())
    assert (dot.sum((1, 2, 3)) <= 64).all()
    thin, wide = (free_form_masks(30, 128, width=(w, w), generator=seeded()) for w in (6, 30))
    assert not (thin & ~wide).any()
    assert shares(wide).mean() > 2 * shares(thin).mean()
    assert free_form_masks(1, (40, 72), generator=seeded()).shape == (1, 1, 40, 72)


# Random walks ---------------------------------------------------------------------------------------------------------


def test_a_mirrored_walk_is_as_likely_as_one_that_stays_at_the_border():
    size, length = 3, 6
    mirrored: Counter[tuple[int, ...]] = Counter()
    staying: Counter[tuple[int, ...]] = Counter()
    for start in range(size):
        for steps in itertools.product((-1, 0, 1), repeat=length):
            mirrored[tuple(random_masks._walk(torch.tensor(steps), size, start).tolist())] += 1
            place, places = start, []
            for step in steps:
                place = min(max(place + step, 0), size - 1)
                places.append(place)
            staying[tuple(places)] += 1
    assert mirrored == staying


def test_a_walk_leaves_no_gap():
    from scipy import ndimage

    for mask in random_walk_masks(4, (40, 72), generator=seeded()):
        _, parts = ndimage.label(mask[0].numpy())  # neighbours up, down, left and right
        assert parts == 1


def test_walks_cover_as_much_as_published():
    # 40 walks of naoto0804's random_walk over 128 x 128 pixels: mean 0.228, deviation 0.040
    found = shares(random_walk_masks(120, 128, generator=seeded()))
    assert found.mean().item() == pytest.approx(0.228, abs=0.016)
    assert found.std().item() == pytest.approx(0.036, rel=0.3)


def test_walks_have_the_steps_asked_for():
    masks = random_walk_masks(20, 64, steps=5, generator=seeded())
    visited = masks.sum((1, 2, 3))
    assert (visited >= 1).all()
    assert (visited <= 5).all()
    assert (visited == 1).sum() < 5


# Masks of a folder ----------------------------------------------------------------------------------------------------


def test_a_folder_is_sorted_and_read_when_asked(tmp_path):
    for name in ("b.png", "a/c.JPG", "a/notes.txt", "a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    read: list[str] = []

    def reader(path: Path) -> Tensor:
        read.append(path.name)
        return torch.tensor([[0.0, 1.0]])

    folder = MaskFolder(tmp_path, reader)
    assert [path.relative_to(tmp_path).as_posix() for path in folder.paths] == ["a/c.JPG", "a.png", "b.png"]
    assert len(folder) == 3
    assert read == []
    assert torch.equal(folder[2], torch.tensor([[False, True]]))
    assert read == ["b.png"]


def test_mask_files_become_holes_of_the_wanted_size(tmp_path):
    image = pytest.importorskip("PIL.Image")
    picture = image.new("L", (12, 8), 0)
    picture.paste(255, (3, 2, 9, 4))
    picture.save(tmp_path / "mask.png")

    def read(path: Path) -> Tensor:
        return torch.from_numpy(masks.mask_from_brightness(images.read_photo(path).pixels))

    drawn = drawn_masks(MaskFolder(tmp_path, read), 2, (16, 24), generator=seeded())
    assert torch.equal(drawn, box_masks([Box(4, 6, 8, 18)], (16, 24)).expand(2, -1, -1, -1))


def test_masks_are_drawn_from_all_of_a_collection():
    masks = [torch.full((2, 2), n == 0) for n in range(4)]
    drawn = drawn_masks(masks, 2000, 2, generator=seeded())
    assert drawn.shape == (2000, 1, 2, 2)
    assert shares(drawn).mean().item() == pytest.approx(0.25, abs=0.04)


def test_resizing_takes_the_pixel_at_the_middle():
    mask = torch.tensor([[1, 0, 0], [0, 1, 1]])
    same, larger, smaller = (
        drawn_masks([mask], 1, size, generator=seeded())[0, 0] for size in ((2, 3), (4, 6), (1, 1))
    )
    assert torch.equal(same, mask.bool())
    assert torch.equal(larger, mask.bool().repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert torch.equal(smaller, mask.bool()[1:, 1:2])


# Errors ---------------------------------------------------------------------------------------------------------------

BOX = Box(0, 0, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_boxes(0, 8, 4, generator=seeded()), "count: expected a number >= 1, got 0"),
        (
            lambda: random_boxes(1, 8, 9, generator=seeded()),
            "box_size: expected boxes that fit 8 x 8 pixels, got 9 x 9",
        ),
        (lambda: random_boxes(1, 8, 4, margin=3, generator=seeded()), "box_size: expected boxes that fit 2 x 2 pixels"),
        (lambda: random_boxes(1, 8, 4, generator=7), "generator: expected a torch.Generator, got int"),
        (
            lambda: random_boxes_within([BOX], 3, 2, generator=seeded()),
            r"smallest: expected no more than largest, \(2, 2\)",
        ),
        (lambda: random_boxes_within([BOX], 1, 5, generator=seeded()), "largest: expected boxes that fit 4 x 4 pixels"),
        (lambda: shrink_boxes([BOX], 2, generator=seeded()), "most: expected less than half of a box of 4 x 4"),
        (lambda: box_masks([], 8), "boxes: expected at least one, got none"),
        (lambda: crop_boxes(torch.zeros(3, 1, 8, 8), [BOX] * 2), "boxes: expected 1 or 3, got 2"),
        (lambda: crop_boxes(torch.zeros(2, 1, 8, 8), [BOX, Box(0, 0, 4, 5)]), "boxes: expected one size, got"),
        (lambda: crop_boxes(torch.zeros(1, 1, 8, 8), [Box(5, 0, 9, 4)]), "boxes: expected them inside 8 x 8 pixels"),
        (lambda: window_around(torch.zeros(8, 8, dtype=torch.bool), 9), "size: expected no more than"),
        (lambda: window_around(torch.zeros(1, 8, 8), 4), r"hole: expected shape \[H, W\]"),
        (lambda: free_form_masks(1, 8, width=(3, 2), generator=seeded()), "width: expected a number >= 3, got 2"),
        (lambda: free_form_masks(1, 8, strokes=2, generator=seeded()), r"strokes: expected \(least, greatest\), got 2"),
        (lambda: random_walk_masks(1, 8, steps=0, generator=seeded()), "steps: expected a number >= 1, got 0"),
        (lambda: random_walk_masks(1, 8, generator=None), "generator: expected a torch.Generator, got NoneType"),
        (lambda: random_walk_masks(1, 0, generator=seeded()), "image_size: expected a number >= 1, got 0"),
        (lambda: drawn_masks([], 1, 8, generator=seeded()), "masks: expected at least one, got none"),
        (lambda: drawn_masks([torch.zeros(1, 2, 2)], 1, 8, generator=seeded()), r"masks: expected shape \[H, W\]"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_errors_of_folders(tmp_path):
    with pytest.raises(ValueError, match=r"folder: expected masks in .*, got no file that ends in \.bmp"):
        MaskFolder(tmp_path, torch.load)
    with pytest.raises(ValueError, match="got no such folder"):
        MaskFolder(tmp_path / "absent", torch.load)
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=r"a\.png: expected a mask of shape \[H, W\] from read, got \[1, 2, 2\]"):
        MaskFolder(tmp_path, lambda path: torch.zeros(1, 2, 2))[0]
