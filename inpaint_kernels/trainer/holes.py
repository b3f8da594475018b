"""The holes of each step, as a configuration wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from inpaint_kernels import images, masks
from inpaint_kernels.models import Box
from inpaint_kernels.models.random_masks import (
    MaskFolder,
    box_masks,
    drawn_masks,
    free_form_masks,
    random_boxes,
    random_boxes_within,
    random_walk_masks,
    shrink_boxes,
    window_around,
)
from inpaint_kernels.trainer.config import BoxHole, BoxInWindowHole, FolderHole, Hole, StrokesHole, TrainingConfig


class Holes(NamedTuple):
    """Of one step.

    Attributes:
        mask: bool [B or 1, 1, S, S].
        boxes: what local discriminators see, as many; None where there are none.
        real_boxes: the same of the images that they see as real; None: ``boxes``.
    """

    mask: Tensor
    boxes: list[Box] | None = None
    real_boxes: list[Box] | None = None

    def of(self, images: range) -> Holes:
        """Those of some of the images."""
        if len(self.mask) == 1:
            return self
        boxes, real = (None if b is None else [b[i] for i in images] for b in (self.boxes, self.real_boxes))
        return Holes(self.mask[images.start : images.stop : images.step], boxes, real)


class HoleMaker:
    """Makes the holes of every step, from its number and the seed alone.

    Args:
        config: of the run.
        device: of the masks.

    Raises:
        ValueError: a folder of masks is not there or has none.
    """

    def __init__(self, config: TrainingConfig, device: torch.device) -> None:
        self._device = device
        self._size, self._window, self._seed = config.image_size, config.window, config.seed
        self._count = 1 if config.one_hole else config.batch
        self._holes = config.holes
        self._folders = {
            hole: MaskFolder(hole.folder, _reader(hole.invert)) for hole in config.holes if isinstance(hole, FolderHole)
        }
        self._random_real_boxes = config.system == "glcic"

    def __call__(self, step: int) -> Holes:
        """The holes of a step; ``step`` may be negative, for images that are not trained on."""
        generator = seeded_generator(self._seed, step)
        kind = int(torch.randint(len(self._holes), (), generator=generator))
        mask, boxes = self._drawn(self._holes[kind], generator)
        if self._window is None:
            return Holes(mask)
        boxes = boxes or [window_around(hole[0], self._window) for hole in mask]
        if not self._random_real_boxes:
            return Holes(mask, boxes)
        return Holes(mask, boxes, random_boxes(len(boxes), self._size, self._window, generator=generator))

    def _drawn(self, hole: Hole, generator: torch.Generator) -> tuple[Tensor, list[Box] | None]:
        """The masks, and the windows that they were drawn in; None where there were none."""
        count, size = self._count, self._size
        if isinstance(hole, BoxHole):
            windows = random_boxes(count, size, hole.size, margin=hole.margin, generator=generator)
            return self._boxed(shrink_boxes(windows, hole.shrink, generator=generator)), windows
        if isinstance(hole, BoxInWindowHole):
            assert self._window is not None  # the configuration has seen to it
            windows = random_boxes(count, size, self._window, generator=generator)
            return self._boxed(random_boxes_within(windows, hole.smallest, hole.largest, generator=generator)), windows
        if isinstance(hole, FolderHole):
            return drawn_masks(self._folders[hole], count, size, generator=generator, device=self._device), None
        if isinstance(hole, StrokesHole):
            return self._strokes(hole, generator), None
        return random_walk_masks(count, size, steps=hole.steps, generator=generator, device=self._device), None

    def _boxed(self, boxes: Sequence[Box]) -> Tensor:
        return box_masks(boxes, self._size, device=self._device)

    def _strokes(self, hole: StrokesHole, generator: torch.Generator) -> Tensor:
        mask = free_form_masks(
            self._count,
            self._size,
            strokes=hole.strokes,
            vertices=hole.vertices,
            width=hole.width,
            generator=generator,
            device=self._device,
        )
        if not hole.with_box:
            return mask
        return mask | self._boxed(random_boxes(self._count, self._size, hole.with_box, generator=generator))


def seeded_generator(*numbers: int) -> torch.Generator:
    """A generator on the CPU whose seed is these numbers mixed; they may be negative."""
    entropy = [number & 0xFFFFFFFFFFFFFFFF for number in numbers]
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed >> 1)


def _reader(invert: bool) -> Callable[[Path], Tensor]:
    def read(path: Path) -> Tensor:
        hole = masks.mask_from_brightness(images.read_photo(path).pixels)
        return torch.from_numpy(~hole if invert else hole)

    return read


def shares(batch: int, parts: int, rank: int, size: int) -> Sequence[range]:
    """Which of a step's images each part of one process's share has."""
    own = range(rank, batch, size)
    length = len(own) // parts
    return [own[i * length : (i + 1) * length] for i in range(parts)]
