"""Filling many photos: which belong together, one after the other or in batches, and what became of each.

Output files appear whole or not at all, so that an interrupted run is resumed by skipping those that are there.
"""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from inpaint_kernels import images, masks
from inpaint_kernels.fillers import Filler
from inpaint_kernels.photo import FilledPhoto, Progress
from inpaint_kernels.terminal import sentence

SUFFIXES = {"png": ".png", "tiff": ".tif", "webp": ".webp", "jpeg": ".jpg"}
"""File formats of a folder's outputs."""


class Task(NamedTuple):
    """One photo to fill: its file, the file of its mask if it has one, and where it is written."""

    image: Path
    mask: Path | None
    output: Path


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Attributes:
        task: that it was.
        status: "filled", "unchanged" (it has no hole), "skipped" (its output is there) or "failed".
        error: why it failed.
        photo: as it was read.
        mask: the hole.
        filled: what was written.
        seconds: of filling, of a batch its share.
    """

    task: Task
    status: str
    error: str = ""
    photo: images.Photo | None = None
    mask: masks.Mask | None = None
    filled: FilledPhoto | None = None
    seconds: float = 0.0


# Which files ----------------------------------------------------------------------------------------------------------


def is_many(image: Path) -> bool:
    """Whether it stands for several files: a folder, or a pattern such as ``photos/*.jpg``."""
    return image.is_dir() or (glob.has_magic(str(image)) and not image.exists())


def find_tasks(image: Path, mask: Path | None, output: Path, *, recursive: bool, file_format: str) -> list[Task]:
    """The tasks of a folder or a pattern, sorted by name.

    Args:
        image: folder of photos, or a pattern.
        mask: folder whose pictures have the photos' stems (``a.png`` or ``a_mask.png`` for ``a.jpg``), one picture for
            all, or None.
        output: folder of the results; the photos' own folders stand in it.
        recursive: whether folders in the folder are searched too. Links to folders, and to files outside of the folder,
            are left out.
        file_format: a name in :data:`SUFFIXES`.

    Raises:
        ValueError: there is no photo, two photos would have one output, a photo lacks its mask.
    """
    root = image if image.is_dir() else _root_of(str(image))
    files = list(_pictures(image, root, recursive))
    if not files:
        raise ValueError(f"{image}: no picture that can be read: {', '.join(sorted(images.SUFFIXES))}")
    by_stem = _masks_by_stem(mask) if mask is not None and mask.is_dir() else None
    tasks, outputs = [], dict[Path, Path]()
    for file in files:
        relative = file.relative_to(root)
        target = output / relative.with_suffix(SUFFIXES[file_format])
        if target in outputs:
            raise ValueError(f"{file} and {outputs[target]} would both become {target}")
        outputs[target] = file
        tasks.append(Task(file, _mask_of(relative, mask, by_stem), target))
    return tasks


def _root_of(pattern: str) -> Path:
    parts = Path(pattern).parts
    plain = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:plain])


def _pictures(image: Path, root: Path, recursive: bool) -> Iterator[Path]:
    if image.is_dir():
        found: Iterable[Path] = _walk(image) if recursive else image.iterdir()
    else:
        found = (Path(name) for name in glob.iglob(str(image), recursive=True))
    home = root.resolve()
    for file in sorted(found):
        inside = not file.is_symlink() or file.resolve().is_relative_to(home)
        if file.suffix.lower() in _READABLE and file.is_file() and inside:
            yield file


_READABLE = {*images.SUFFIXES, ".bmp", ".gif"}


def _walk(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder, followlinks=False):
        yield from (Path(parent) / name for name in names)


def _masks_by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(_walk(folder)):
        if file.suffix.lower() in _READABLE:
            stem = file.relative_to(folder).with_suffix("").as_posix().removesuffix("_mask")
            if stem in found:
                raise ValueError(f"{file} and {found[stem]} are masks of the same name")
            found[stem] = file
    return found


def _mask_of(image: Path, mask: Path | None, by_stem: dict[str, Path] | None) -> Path | None:
    if by_stem is None:
        return mask
    stem = image.with_suffix("").as_posix()
    if stem not in by_stem:
        raise ValueError(f"{mask}: no mask for {image}: expected a picture named {stem} or {stem}_mask")
    return by_stem[stem]


# Filling --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """How results are written.

    Attributes:
        quality: of JPEG.
        force: whether existing files are replaced.
        skip_existing: whether tasks whose output is there are left out.
        opaque_hole: whether the holes become opaque.
        make_folders: whether folders that are missing are made.
    """

    quality: int = 95
    force: bool = False
    skip_existing: bool = False
    opaque_hole: bool = False
    make_folders: bool = False


Read = Callable[[Task], tuple[images.Photo, masks.Mask]]


class _Loaded(NamedTuple):
    task: Task
    photo: images.Photo
    mask: masks.Mask


def run(
    tasks: Iterable[Task], filler: Filler, read: Read, output: Output, progress: Progress | None = None
) -> Iterator[Outcome]:
    """Fill photos; the outcome of each as soon as it is written. One that fails stops no other.

    Args:
        tasks: see :class:`Task`.
        filler: that fills them, photos of one size ``filler.batch`` at a time.
        read: a task's photo and hole.
        output: how they are written.
        progress: of each photo or batch.
    """
    batch: list[_Loaded] = []
    for task in tasks:
        loaded = _load(task, read, output)
        if isinstance(loaded, Outcome):
            yield loaded
            continue
        if batch and (loaded.mask.shape != batch[0].mask.shape or len(batch) >= filler.batch):
            yield from _fill(batch, filler, output, progress)
            batch = []
        batch.append(loaded)
        if len(batch) >= filler.batch:
            yield from _fill(batch, filler, output, progress)
            batch = []
    if batch:
        yield from _fill(batch, filler, output, progress)


_FAILURES = (ValueError, TypeError, RuntimeError, MemoryError, OSError)


def _load(task: Task, read: Read, output: Output) -> _Loaded | Outcome:
    if output.skip_existing and task.output.exists():
        return Outcome(task, "skipped")
    try:
        if output.make_folders:
            task.output.parent.mkdir(parents=True, exist_ok=True)
        inputs = [path for path in (task.image, task.mask) if path is not None]
        images.check_output(task.output, force=output.force, inputs=inputs)
        photo, mask = read(task)
        images.check_encodable(task.output, photo.pixels)
        if not mask.any():
            _write_unchanged(task, photo, output)
            return Outcome(task, "unchanged", photo=photo, mask=mask)
        return _Loaded(task, photo, mask)
    except _FAILURES as error:
        return Outcome(task, "failed", sentence(error))


def _fill(batch: Sequence[_Loaded], filler: Filler, output: Output, progress: Progress | None) -> Iterator[Outcome]:
    started = time.perf_counter()
    try:
        jobs = [(loaded.photo.pixels, loaded.mask) for loaded in batch]
        results = filler.fill(jobs, output.opaque_hole, progress)
    except _FAILURES as error:
        if len(batch) > 1:  # the others need not fail with one
            for loaded in batch:
                yield from _fill([loaded], filler, output, progress)
        else:
            yield Outcome(batch[0].task, "failed", sentence(error), batch[0].photo, batch[0].mask)
        return
    seconds = (time.perf_counter() - started) / len(batch)
    for loaded, filled in zip(batch, results, strict=True):
        yield _written(loaded, filled, seconds, output)


def _written(loaded: _Loaded, filled: FilledPhoto, seconds: float, output: Output) -> Outcome:
    task, photo, mask = loaded
    try:
        result = images.Photo(filled.pixels, photo.format, photo.metadata)
        images.write_photo(task.output, result, quality=output.quality)
    except _FAILURES as error:
        return Outcome(task, "failed", sentence(error), photo, mask)
    return Outcome(task, "filled", "", photo, mask, filled, seconds)


def _write_unchanged(task: Task, photo: images.Photo, output: Output) -> None:
    """The very file where the format is the same, so that not even a JPEG changes; else the same pixels."""
    if images.format_of(task.output) == photo.format:
        images.copy_file(task.image, task.output)
    else:
        images.write_photo(task.output, photo, quality=output.quality)
