"""Photos of a folder as images to train on: scaled, cut and mirrored at random, by worker processes.

What is random depends on the seed and the number of the image alone, so that a run goes on where it was interrupted,
and several processes share its images, without a change.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from inpaint_kernels.fillers import read_rgb
from inpaint_kernels.models.random_masks import pictures_in

_ORDER, _CUT = 0, 1
"""What random numbers are for."""


class PhotoFolder(Dataset[Tensor]):
    """An endless sequence of images, each epoch's photos in another order.

    Args:
        folder: with photos of any name and size, and with folders of them; links to folders are not followed.
        image_size: side of the images.
        shortest: bounds of the random length that the shorter side is scaled to; None: only photos that are smaller
            than ``image_size`` are scaled, to it.
        flip: whether every second image is mirrored.
        seed: of the order, the scale, the place and the mirroring.

    Raises:
        ValueError: there is no such folder, or no photo in it.

    A photo that cannot be read is warned of, and the next one of the epoch's order is taken.
    """

    def __init__(
        self,
        folder: str | Path,
        image_size: int,
        *,
        shortest: tuple[int, int] | None = None,
        flip: bool = True,
        seed: int = 0,
    ) -> None:
        self.paths = photos_in(folder)
        self.image_size, self.shortest, self.flip, self.seed = image_size, shortest, flip, seed
        self._order = -1, np.arange(0)

    def __getitem__(self, number: int) -> Tensor:
        """The image of that number, from 0 on: uint8 [3, S, S]."""
        photo = self._readable(number)
        random = np.random.default_rng([self.seed, _CUT, number])
        scaled = self._scaled(photo, random)
        size = self.image_size
        top, left = (int(random.integers(side - size + 1)) for side in scaled.shape[:2])
        image = scaled[top : top + size, left : left + size]
        if self.flip and random.random() < 0.5:
            image = image[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))

    def _readable(self, number: int) -> NDArray[np.uint8]:
        epoch, place = divmod(number, len(self.paths))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, _ORDER, epoch]).permutation(len(self.paths))
        order = self._order[1]
        for beyond in range(len(order)):
            photo = _read_or_warn(self.paths[order[(place + beyond) % len(order)]])
            if photo is not None:
                return photo
        raise ValueError(f"photos: none of {len(self.paths)} can be read")

    def _scaled(self, photo: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:
        shorter = min(photo.shape[:2])
        if self.shortest is not None:
            wanted = int(random.integers(self.shortest[0], self.shortest[1] + 1))
        else:
            wanted = max(shorter, self.image_size)
        return resized(photo, wanted)


def _read_or_warn(path: Path) -> NDArray[np.uint8] | None:
    try:
        return read_rgb(path)
    except (ValueError, OSError) as error:
        warnings.warn(f"{path}: left out: {error}", stacklevel=2)
        return None


def photos_in(folder: str | Path) -> list[Path]:
    """The photos of a folder and of the folders in it, sorted; ValueError if there are none."""
    return pictures_in(folder, said="photos: expected photos")


def resized(photo: NDArray[np.uint8], shortest: int) -> NDArray[np.uint8]:
    """A photo ``[H, W, 3]`` with that length of the shorter side."""
    height, width = photo.shape[:2]
    if min(height, width) == shortest:
        return photo
    scale = shortest / min(height, width)
    size = max(shortest, round(width * scale)), max(shortest, round(height * scale))
    return np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS))


def middle(photo: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The middle square of a photo, scaled to ``[size, size, 3]``."""
    scaled = resized(photo, size)
    top, left = ((side - size) // 2 for side in scaled.shape[:2])
    return scaled[top : top + size, left : left + size]


class _Numbers:
    """Numbers of the images of each batch, from a step on."""

    def __init__(self, batches: Sequence[range], first: int, last: int, images_of_a_step: int) -> None:
        self._batches, self._steps, self._stride = batches, range(first, last), images_of_a_step

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            for numbers in self._batches:
                yield [step * self._stride + number for number in numbers]

    def __len__(self) -> int:
        return len(self._batches) * len(self._steps)


def image_batches(
    photos: PhotoFolder,
    batches: Sequence[range],
    *,
    first: int,
    last: int,
    images_of_a_step: int,
    workers: int,
    pin_memory: bool = False,
) -> Iterator[Tensor]:
    """The images of steps ``first`` to ``last - 1``, read ahead by ``workers`` processes.

    Args:
        photos: to take from.
        batches: which of a step's images each of its batches has.
        first: number of the first step.
        last: of the one behind the last.
        images_of_a_step: over all processes.
        workers: their number; 0: this process reads.
        pin_memory: for a faster way to a CUDA device.

    Yields:
        uint8 [B, 3, S, S], ``len(batches)`` for each step.
    """
    options: dict[str, Any] = {"prefetch_factor": 4} if workers else {}
    loader = DataLoader(
        photos,
        batch_sampler=_Numbers(batches, first, last, images_of_a_step),
        num_workers=workers,
        pin_memory=pin_memory,
        **options,
    )
    return iter(loader)
