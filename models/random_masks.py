"""Masks made while a network trains: boxes, brush strokes, random walks, masks of a folder; crops around a hole.

What is random is drawn on the CPU, from a generator that the caller seeds, and drawn into the masks on any device in
integers: one seed gives the same masks everywhere. Masks are bool [B, 1, H, W], True in the hole; several kinds are
joined by ``|``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from inpaint_kernels.models._boxes import Box, bounding_box
from torch import Tensor

from inpaint_kernels._checks import check_pair, check_range, check_shape

Size = int | tuple[int, int]
"""Height and width, or both in one."""
Device = torch.device | str | None

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# Boxes ----------------------------------------------------------------------------------------------------------------


def random_boxes(
    count: int,
    image_size: Size,
    box_size: Size,
    *,
    margin: Size = 0,
    generator: torch.Generator,
) -> list[Box]:
    """Boxes of one size at places that are uniformly random.

    Args:
        count: number of boxes; 1 for all images of a batch, as DeepFill's trainers do.
        image_size: H and W.
        box_size: of the boxes; DeepFill v1: 128 of 256, EdgeConnect: half of the image.
        margin: pixels that stay free at the image's borders.
        generator: on the CPU.

    References:
        Yu et al., CVPR 2018, section 5. daa233/generative-inpainting-pytorch, ``random_bbox``; there and in its
        original the last place, at the bottom and at the right, is never drawn.
    """
    height, width = check_pair("image_size", image_size, 1)
    rows, columns = check_pair("margin", margin, 0)
    free = Box(rows, columns, height - rows, width - columns)
    sides = check_pair("box_size", box_size, 1)
    _check_fits("box_size", sides, free)
    return [_placed(sides, free, generator) for _ in range(_checked_count(count))]


def random_boxes_within(
    windows: Sequence[Box], smallest: Size, largest: Size, *, generator: torch.Generator
) -> list[Box]:
    """A box inside each window: its sides, then its place, are uniformly random.

    GLCIC's holes: :func:`random_boxes` gives the windows of 128, which the local discriminator sees, and this function
    their holes, with sides of 96 to 128.

    Args:
        windows: one per box.
        smallest: least height and width.
        largest: greatest ones, that still fit the windows.
        generator: on the CPU.

    References:
        Iizuka et al., SIGGRAPH 2017, section 4. otenim/GLCIC-PyTorch, ``gen_hole_area`` and ``gen_input_mask``.
    """
    least, most = check_pair("smallest", smallest, 1), check_pair("largest", largest, 1)
    if least[0] > most[0] or least[1] > most[1]:
        raise ValueError(f"smallest: expected no more than largest, {most}, got {least}")
    boxes = []
    for window in windows:
        _check_fits("largest", most, window)
        sides = (_integer(least[0], most[0], generator), _integer(least[1], most[1], generator))
        boxes.append(_placed(sides, window, generator))
    return boxes


def _check_fits(name: str, sides: tuple[int, int], window: Box) -> None:
    height, width = window.size
    if sides[0] > height or sides[1] > width:
        raise ValueError(f"{name}: expected boxes that fit {height} x {width} pixels, got {sides[0]} x {sides[1]}")


def _placed(sides: tuple[int, int], window: Box, generator: torch.Generator) -> Box:
    top = _integer(window.top, window.bottom - sides[0], generator)
    left = _integer(window.left, window.right - sides[1], generator)
    return Box(top, left, top + sides[0], left + sides[1])


def shrink_boxes(boxes: Sequence[Box], most: Size, *, generator: torch.Generator) -> list[Box]:
    """Each box less a random number of pixels at its top and bottom, and another one at its left and right.

    Args:
        boxes: at least 1 pixel larger than twice ``most``.
        most: greatest number, itself included; DeepFill v1: 16, its ``max_delta`` of 32 halved.
        generator: on the CPU.

    References:
        daa233/generative-inpainting-pytorch, ``bbox2mask``.
    """
    limits = check_pair("most", most, 0)
    shrunk = []
    for box in boxes:
        if any(side <= 2 * limit for side, limit in zip(box.size, limits, strict=True)):
            raise ValueError(f"most: expected less than half of a box of {box.size[0]} x {box.size[1]}, got {limits}")
        rows, columns = (_integer(0, limit, generator) for limit in limits)
        shrunk.append(Box(box.top + rows, box.left + columns, box.bottom - rows, box.right - columns))
    return shrunk


def box_masks(boxes: Sequence[Box], image_size: Size, *, device: Device = None) -> Tensor:
    """A mask per box: bool [B, 1, H, W]."""
    height, width = check_pair("image_size", image_size, 1)
    if not boxes:
        raise ValueError("boxes: expected at least one, got none")
    edges = torch.tensor(boxes, dtype=torch.int64).view(-1, 4, 1, 1, 1).to(device)
    top, left, bottom, right = edges.unbind(1)
    rows, columns = _grid(height, width, device)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


# Crops around a hole --------------------------------------------------------------------------------------------------


def window_around(hole: Tensor, size: Size) -> Box:
    """The box of that size around a hole's middle, moved into the image: what GLCIC's local discriminator sees.

    Args:
        hole: bool [H, W]; of an empty one the window is that around the image's middle.
        size: height and width, no larger than the image.

    References:
        Iizuka et al., SIGGRAPH 2017, section 3.3.
    """
    sizes = check_shape("hole", hole, "H W")
    image = Box(0, 0, sizes["H"], sizes["W"])
    height, width = check_pair("size", size, 1)
    if height > image.bottom or width > image.right:
        raise ValueError(f"size: expected no more than the hole's {image.size}, got {(height, width)}")
    around = bounding_box(hole) or image
    top = min(max((around.top + around.bottom - height) // 2, 0), image.bottom - height)
    left = min(max((around.left + around.right - width) // 2, 0), image.right - width)
    return Box(top, left, top + height, left + width)


def crop_boxes(x: Tensor, boxes: Sequence[Box]) -> Tensor:
    """Each image's part: [B, C, H, W] and boxes of one size, one for each image or one for all -> [B, C, h, w].

    References:
        daa233/generative-inpainting-pytorch, ``local_patch``; otenim/GLCIC-PyTorch, ``crop``.
    """
    sizes = check_shape("x", x, "B C H W")
    if len(boxes) not in (1, sizes["B"]):
        raise ValueError(f"boxes: expected 1 or {sizes['B']}, got {len(boxes)}")
    if len({box.size for box in boxes}) > 1:
        raise ValueError(f"boxes: expected one size, got {sorted({box.size for box in boxes})}")
    for box in boxes:
        if min(box.top, box.left) < 0 or box.bottom > sizes["H"] or box.right > sizes["W"]:
            raise ValueError(f"boxes: expected them inside {sizes['H']} x {sizes['W']} pixels, got {tuple(box)}")
    if len(boxes) == 1:
        return boxes[0].of(x)
    return torch.cat([box.of(x[i : i + 1]) for i, box in enumerate(boxes)])


# Strokes --------------------------------------------------------------------------------------------------------------


class _Stroke(NamedTuple):
    """The way of a brush, in points (row, column), and the brush's diameter."""

    points: list[tuple[int, int]]
    width: int


def free_form_masks(
    count: int,
    image_size: Size,
    *,
    strokes: tuple[int, int] = (1, 3),
    vertices: tuple[int, int] = (4, 11),
    width: tuple[int, int] = (12, 39),
    generator: torch.Generator,
    device: Device = None,
) -> Tensor:
    """Brush strokes that turn sharply to and fro: DeepFill v2's masks, bool [B, 1, H, W].

    A stroke starts anywhere. Each of its pieces has a length from a normal distribution with the mean of an eighth of
    the image's diagonal and half of that, rounded down, as deviation, cut off at 0 and at twice the mean; its direction
    is 72 degrees, less and more by up to 24, above and below the horizontal in turn. The brush is round. On the mean
    15 % of 256 x 256 pixels are hole, 3.7 % to 29 % in nine masks of ten.

    Args:
        count: B.
        image_size: H and W.
        strokes: least and greatest number of strokes of a mask, as the next two.
        vertices: of pieces of a stroke.
        width: of the brush's diameter in pixels.
        generator: on the CPU.
        device: of the masks.

    Deviation from the published code, which takes H for W and W for H where an image is not square, and draws with
    Pillow: edges differ by up to a pixel.

    References:
        Yu et al., Free-Form Image Inpainting with Gated Convolution, ICCV 2019, algorithm 1.
        nipponjo/deepfillv2-pytorch, ``brush_stroke_mask``; its trainer takes one mask for a batch, and a box into it.
    """
    size = check_pair("image_size", image_size, 1)
    for name, bounds in (("strokes", strokes), ("vertices", vertices), ("width", width)):
        _check_bounds(name, bounds)
    masks = [
        [
            _Stroke(_turning_way(_integer(*vertices, generator), size, generator), _integer(*width, generator))
            for _ in range(_integer(*strokes, generator))
        ]
        for _ in range(_checked_count(count))
    ]
    return torch.stack([_draw(mask, size, device) for mask in masks])


def _turning_way(pieces: int, size: tuple[int, int], generator: torch.Generator) -> list[tuple[int, int]]:
    mean_angle, spread = 2 * math.pi / 5, 2 * math.pi / 15
    height, width = size
    mean_length = math.hypot(height, width) / 8
    least = mean_angle - spread * _uniform(generator)
    greatest = mean_angle + spread * _uniform(generator)
    row, column = _integer(0, height - 1, generator), _integer(0, width - 1, generator)
    points = [(row, column)]
    for piece in range(pieces):
        angle = least + (greatest - least) * _uniform(generator)
        angle = -angle if piece % 2 == 0 else angle
        length = mean_length + (mean_length // 2) * float(torch.randn((), generator=generator))
        length = min(max(length, 0.0), 2 * mean_length)
        row = int(min(max(row + length * math.sin(angle), 0), height))
        column = int(min(max(column + length * math.cos(angle), 0), width))
        points.append((row, column))
    return points


def _draw(strokes: Sequence[_Stroke], size: tuple[int, int], device: Device) -> Tensor:
    """A mask [1, H, W], True where a pixel is no farther than half a brush from a piece of a stroke."""
    mask = torch.zeros(1, *size, dtype=torch.bool, device=device)
    for stroke in strokes:
        for start, end in itertools.pairwise(stroke.points):
            box = _box_of_piece(start, end, stroke.width // 2 + 1)
            part = box.of(mask[None])[0]
            rows, columns = _grid(part.shape[1], part.shape[2], device)
            part |= _near_segment(
                rows + (box.top - start[0]), columns + (box.left - start[1]), start, end, stroke.width
            )
    return mask


def _box_of_piece(start: tuple[int, int], end: tuple[int, int], reach: int) -> Box:
    """No pixel outside of it is near to the segment; it may reach over the image's lower and right edge."""
    (top, bottom), (left, right) = (sorted(pair) for pair in zip(start, end, strict=True))
    return Box(max(top - reach, 0), max(left - reach, 0), bottom + reach + 1, right + reach + 1)


def _near_segment(rows: Tensor, columns: Tensor, start: tuple[int, int], end: tuple[int, int], width: int) -> Tensor:
    """Whether a pixel, given relative to a segment's start, is within half a width of the segment; no rounding."""
    down, across = end[0] - start[0], end[1] - start[1]
    length_squared = down * down + across * across
    along = rows * down + columns * across
    beside = rows * across - columns * down
    to_start = rows * rows + columns * columns
    to_end = (rows - down) * (rows - down) + (columns - across) * (columns - across)
    near_line = (along > 0) & (along < length_squared) & (4 * beside * beside <= width * width * length_squared)
    return near_line | (4 * torch.minimum(to_start, to_end) <= width * width)


# Random walks ---------------------------------------------------------------------------------------------------------


def random_walk_masks(
    count: int,
    image_size: Size,
    *,
    steps: int | None = None,
    generator: torch.Generator,
    device: Device = None,
) -> Tensor:
    """What a random walk over the image's pixels visits: ragged blots, bool [B, 1, H, W].

    Each step goes one pixel up, down, left or right; one that would leave the image stays. The published masks have
    512 x 512 pixels and as many steps; on the mean 18 % of them are hole, and 20 % at 256 x 256.

    Args:
        count: B.
        image_size: H and W.
        steps: None: H W, as published.
        generator: on the CPU.
        device: of the masks.

    References:
        naoto0804/pytorch-inpainting-with-partial-conv, generate_data.py, ``random_walk``.
    """
    height, width = check_pair("image_size", image_size, 1)
    steps = height * width if steps is None else steps
    check_range("steps", steps, minimum=1, integer=True)
    masks = torch.zeros(_checked_count(count), height * width, dtype=torch.bool, device=device)
    for mask in masks:
        start = _integer(0, height - 1, generator), _integer(0, width - 1, generator)
        direction = torch.randint(4, (steps,), generator=generator).to(device)
        sign = 1 - 2 * (direction % 2)
        rows = _walk(sign * (direction < 2), height, start[0])
        columns = _walk(sign * (direction >= 2), width, start[1])
        mask[rows * width + columns] = True
    return masks.view(count, 1, height, width)


def _walk(steps: Tensor, size: int, start: int) -> Tensor:
    """Where a walk along one axis is after each step.

    A free walk, mirrored at the borders, takes the places that one takes which stays at them: it goes back as often as
    on, so that both are equally likely.
    """
    free = start + torch.cumsum(steps, 0)
    place = free % (2 * size)
    return torch.minimum(place, 2 * size - 1 - place)


# Masks of a folder ----------------------------------------------------------------------------------------------------


def pictures_in(folder: str | Path, suffixes: Sequence[str] = IMAGE_SUFFIXES, *, said: str) -> list[Path]:
    """The files of a folder, and of the folders in it, with these suffixes in lower case, sorted.

    Raises:
        ValueError: there is none; the message begins with ``said``.
    """
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in suffixes)
    if not paths:
        problem = "no such folder" if not Path(folder).is_dir() else f"no file that ends in {', '.join(suffixes)}"
        raise ValueError(f"{said} in {folder}, got {problem}")
    return paths


class MaskFolder(Sequence[Tensor]):
    """The masks of a folder, sorted by path, each read when it is asked for.

    Args:
        folder: is searched with its subfolders.
        read: path -> mask [H, W], bool or 0 and 1; 1 in the hole.
        suffixes: of the files that are masks, in lower case.

    Raises:
        ValueError: there is no such folder, or no mask in it.

    Example, for pictures that are bright in the hole::

        def read(path):
            return torch.from_numpy(masks.mask_from_brightness(images.read_photo(path).pixels))

        drawn_masks(MaskFolder("masks", read), 16, 256, generator=generator, device="cuda")
    """

    def __init__(
        self, folder: str | Path, read: Callable[[Path], Tensor], *, suffixes: Sequence[str] = IMAGE_SUFFIXES
    ) -> None:
        self.paths = pictures_in(folder, suffixes, said="folder: expected masks")
        self._read = read

    def __len__(self) -> int:
        """Number of masks."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        """One mask, bool [H, W]."""
        path = self.paths[index]
        mask = self._read(path)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{path}: expected a mask of shape [H, W] from read, got {got}")
        return mask > 0


def drawn_masks(
    masks: Sequence[Tensor], count: int, image_size: Size, *, generator: torch.Generator, device: Device = None
) -> Tensor:
    """Masks picked at random from a collection, with repetition, and brought to one size: bool [B, 1, H, W].

    A mask of another size is sampled at the middle of each pixel, so that it stays one of 0 and 1.

    Args:
        masks: a :class:`MaskFolder`, or tensors [H, W] of bool or of 0 and 1.
        count: B.
        image_size: H and W.
        generator: on the CPU.
        device: of the masks.
    """
    size = check_pair("image_size", image_size, 1)
    if not len(masks):
        raise ValueError("masks: expected at least one, got none")
    picked = [masks[_integer(0, len(masks) - 1, generator)] for _ in range(_checked_count(count))]
    return torch.stack([_resampled(mask, size).to(device) for mask in picked])[:, None]


def _resampled(mask: Tensor, size: tuple[int, int]) -> Tensor:
    check_shape("masks", mask, "H W")
    rows, columns = (
        (2 * torch.arange(wanted, device=mask.device) + 1) * given // (2 * wanted)
        for wanted, given in zip(size, mask.shape, strict=True)
    )
    return mask[rows[:, None], columns] > 0


# Random numbers and grids ---------------------------------------------------------------------------------------------


def _integer(least: int, greatest: int, generator: torch.Generator) -> int:
    """Uniformly random, both ends included."""
    _check_generator(generator)
    return int(torch.randint(least, greatest + 1, (), generator=generator))


def _uniform(generator: torch.Generator) -> float:
    """In [0, 1)."""
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def _check_generator(generator: torch.Generator) -> None:
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    if generator.device.type != "cpu":
        raise ValueError(
            f"generator: expected one on the CPU, for the same masks on every device, got {generator.device}"
        )


def _checked_count(count: int) -> int:
    check_range("count", count, minimum=1, integer=True)
    return count


def _check_bounds(name: str, bounds: tuple[int, int]) -> None:
    if not isinstance(bounds, tuple) or len(bounds) != 2:
        raise ValueError(f"{name}: expected (least, greatest), got {bounds!r}")
    least, greatest = bounds
    check_range(name, least, minimum=1, integer=True)
    check_range(name, greatest, minimum=least, integer=True)


def _grid(height: int, width: int, device: Device) -> tuple[Tensor, Tensor]:
    """Numbers of rows [H, 1] and of columns [W]."""
    return torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
