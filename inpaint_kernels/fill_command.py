"""What ``fill`` does with one photo or a folder's: results, panels and sheets, sentences or JSON, and the exit code."""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer
from numpy.typing import NDArray
from rich.markup import escape

from inpaint_kernels import images, masks, panels, processes, terminal
from inpaint_kernels.fillers import Filler
from inpaint_kernels.filling import Outcome, Output, Read, Task, run
from inpaint_kernels.models import InpaintingModel
from inpaint_kernels.photo import FilledPhoto
from inpaint_kernels.pretrained import load_pretrained


@dataclass(frozen=True)
class Pictures:
    """What else a single photo's fill shows.

    Attributes:
        row: file of a row of panels, or None.
        panel_names: of the row, separated by commas.
        sheet: file of several results side by side, or None.
        truth: file of the undamaged photo, or None.
    """

    row: Path | None
    panel_names: str
    sheet: Path | None
    truth: Path | None

    def check(self, image: Path, mask: Path | None, output: Path, force: bool) -> None:
        """Raises ValueError where the files cannot be written, or a name is no panel's."""
        panels.parse_panels(self.panel_names)
        inputs = [path for path in (image, mask, self.truth) if path is not None]
        taken = {output.resolve(): "the output"}
        for kind, path in (("row", self.row), ("sheet", self.sheet)):
            if path is not None:
                images.check_output(path, force=force, inputs=inputs)
                if path.resolve() in taken:
                    raise ValueError(f"{path}: is {taken[path.resolve()]} already; the {kind} must be another file")
                taken[path.resolve()] = f"the {kind}"

    def check_single(self, image: Path) -> None:
        """Raises ValueError if anything is asked for that only one photo has."""
        for option, path in (("--save-row", self.row), ("--save-sheet", self.sheet), ("--truth", self.truth)):
            if path is not None:
                raise ValueError(f"{option}: is for one photo, and {image} stands for several")


def fill_one(
    task: Task,
    fillers: Sequence[Filler],
    read: Read,
    output: Output,
    pictures: Pictures,
    as_json: bool,
    max_pixels: int | None,
) -> None:
    """Fill one photo and say so; show what ``pictures`` wants. Fillers behind the first are for a sheet alone."""
    first, *others = fillers
    names = panels.parse_panels(pictures.panel_names)
    true_pixels: NDArray[Any] | None = None

    def read_and_check(task: Task) -> tuple[images.Photo, masks.Mask]:
        nonlocal true_pixels
        photo, hole = read(task)
        true_pixels = None if pictures.truth is None else read_photo(pictures.truth, max_pixels).pixels
        if pictures.row is not None:
            size = (photo.height, photo.width)
            panels.check_panels(names, method=first.name, provided=first.panels, size=size, truth=true_pixels)
        return photo, hole

    with terminal.progress_bar() as report:
        (outcome,) = run([task], first, read_and_check, output, report)
        if outcome.status == "failed":
            raise ValueError(outcome.error)
        results = [(first.name, outcome)]
        results += [(filler.name, _filled_again(outcome, filler, output, report)) for filler in others]
    _report_outcome(outcome, as_json)
    if outcome.filled is None or outcome.photo is None or outcome.mask is None:
        return
    if pictures.row is not None:
        row = panels.draw_row(_panel_sources(outcome.photo, outcome.mask, outcome.filled, true_pixels), names)
        images.write_photo(pictures.row, images.Photo(row, "PNG"))
        _say(as_json, f"panels {', '.join(names)}: {escape(str(pictures.row))}")
    if pictures.sheet is not None:
        sheet = panels.draw_sheet(_sheet_entries(results, outcome.photo, outcome.mask, true_pixels))
        images.write_photo(pictures.sheet, images.Photo(sheet, "PNG"))
        _say(as_json, f"sheet {', '.join(name for name, _ in results)}: {escape(str(pictures.sheet))}")
    if outcome.filled.advice:
        _say(as_json, escape(outcome.filled.advice))


def _filled_again(outcome: Outcome, filler: Filler, output: Output, report: terminal.BarReporter) -> Outcome:
    """The same photo by another filler; nothing is written."""
    if outcome.photo is None or outcome.mask is None or outcome.filled is None:
        return outcome
    started = time.perf_counter()
    (filled,) = filler.fill([(outcome.photo.pixels, outcome.mask)], output.opaque_hole, report)
    return replace(outcome, filled=filled, seconds=time.perf_counter() - started)


def _panel_sources(
    photo: images.Photo, mask: masks.Mask, filled: FilledPhoto, truth: NDArray[Any] | None
) -> panels.PanelSources:
    return panels.PanelSources(
        photo.pixels, mask, filled.pixels, filled.method, filled.offsets, truth, filled.edges, filled.hog
    )


def _sheet_entries(
    results: Sequence[tuple[str, Outcome]],
    photo: images.Photo,
    mask: masks.Mask,
    truth: NDArray[Any] | None,
) -> list[tuple[str, NDArray[Any]]]:
    """Caption and picture of the truth, or of the photo with its hole, and of each result."""
    damaged = photo.pixels.copy()
    damaged[mask] = 0
    entries = [("input", damaged) if truth is None else ("truth", truth)]
    for name, outcome in results:
        assert outcome.filled is not None
        lines = [name, f"{outcome.seconds:.1f} s"]
        if truth is not None:
            from inpaint_kernels import metrics

            in_hole = metrics.compare(outcome.filled.pixels, truth, mask)["hole"]
            psnr, ssim, l1 = metrics.as_text(in_hole)
            lines += [f"in the hole: {psnr} dB", f"SSIM {ssim}, L1 {l1}"]
        entries.append(("\n".join(lines), outcome.filled.pixels))
    return entries


def fill_many(tasks: Sequence[Task], filler: Filler, read: Read, output: Output, as_json: bool) -> None:
    """All photos of a folder, shared out between the processes of torchrun; failures are listed at the end."""
    counts = Counter[str]()
    failed: list[str] = []
    with processes.group() as group:
        share = group.share(tasks)
        with terminal.files_bar(len(share)) as advance:
            for outcome in run(share, filler, read, output):
                counts[outcome.status] += 1
                if outcome.status == "failed":
                    failed.append(f"{outcome.task.image}: {outcome.error.removeprefix(f'{outcome.task.image}: ')}")
                _report_outcome(outcome, as_json)
                advance()
        everywhere = group.gathered((dict(counts), failed))
    if everywhere is not None:  # else another process says it
        counts = sum((Counter(count) for count, _ in everywhere), Counter[str]())
        failed = [text for _, texts in everywhere for text in texts]
        kinds = ("filled", "unchanged", "skipped", "failed")
        _say(as_json, ", ".join(f"{counts[kind]} {kind}" for kind in kinds if counts[kind]))
        for text in failed:
            terminal.err.print(f"[red]failed:[/red] {escape(text)}")
    if failed:
        raise typer.Exit(1)


def _report_outcome(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_as_json(outcome)), flush=True)
        return
    target = escape(str(outcome.task.output))
    if outcome.status == "unchanged":
        terminal.out.print(f"no hole: {target} is the input, unchanged")
    elif outcome.filled is not None and outcome.mask is not None and outcome.photo is not None:
        size = f"{outcome.photo.width} x {outcome.photo.height}"
        terminal.out.print(
            f"filled {masks.describe_hole(outcome.mask)} of {size} by {outcome.filled.method} "
            f"in {outcome.seconds:.1f} s: {target}"
        )


def _as_json(outcome: Outcome) -> dict[str, Any]:
    task = outcome.task
    record: dict[str, Any] = {"image": str(task.image), "output": str(task.output), "status": outcome.status}
    if outcome.error:
        record["error"] = outcome.error
    if outcome.photo is not None and outcome.mask is not None:
        hole = {"pixels": int(outcome.mask.sum()), "share": float(outcome.mask.mean())}
        record |= {"width": outcome.photo.width, "height": outcome.photo.height, "hole": hole}
    if outcome.filled is not None:
        record |= {"method": outcome.filled.method, "seconds": round(outcome.seconds, 3)}
    return record


def _say(as_json: bool, text: str) -> None:
    """To standard output, or beside the JSON that stands there."""
    (terminal.err if as_json else terminal.out).print(text)


def load_quietly(path: Path) -> InpaintingModel:
    """A model; what is to be said of its licence without a line of code beside it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_pretrained(path)
    for warning in caught:
        terminal.err.print(f"note: {escape(str(warning.message))}")
    return model


def read_photo(path: Path, max_pixels: int | None) -> images.Photo:
    """A photo; what is to be said of it goes to standard error."""
    photo = images.read_photo(path, max_pixels=max_pixels)
    for note in photo.notes:
        terminal.err.print(f"note: {escape(note)}")
    return photo
