"""The command line: ``info``, ``models``, ``fill``, ``mask``, ``convert`` and ``bench``.

Results go to standard output; warnings, errors and progress bars to standard error. Exit codes: 0 done, 1 the work
cannot be done (one sentence says why), 2 the command line itself is wrong.
"""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from inpaint_kernels import catalogue, comparison, images, info, masks, panels
from inpaint_kernels.photo import FilledPhoto, fill_photo

app = typer.Typer(
    name="inpaint-kernels",
    help="Fill holes in photos, and look at the kernels that do it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Tables keep a sensible width where the output is no terminal.
_out = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 120)
_err = Console(stderr=True, soft_wrap=True, highlight=False)


class Method(str, Enum):
    """How ``fill`` fills."""

    auto = "auto"
    exemplar = "exemplar"
    diffusion = "diffusion"


# --- options that fill and mask share ------------------------------------------------------------------------------

_MASKS = "The hole"
_LIMITS = "Files"

ImageArgument = Annotated[Path, typer.Argument(metavar="IMAGE", help="The photo: PNG, JPEG, TIFF or WebP.")]
MaskArgument = Annotated[
    Path | None,
    typer.Argument(metavar="MASK", help="Picture of the same size, bright where the hole is.", show_default=False),
]
BoxOption = Annotated[
    list[str] | None,
    typer.Option(
        "--mask-box", metavar="X,Y,W,H", help="A rectangle of hole, in pixels; repeatable.", rich_help_panel=_MASKS
    ),
]
ColourOption = Annotated[
    str | None,
    typer.Option(
        "--mask-color",
        metavar="#RRGGBB",
        help="Hole where MASK (a copy of the photo painted over in any editor), or without MASK the photo itself, "
        "has this colour.",
        rich_help_panel=_MASKS,
    ),
]
ToleranceOption = Annotated[
    int,
    typer.Option(
        "--mask-tolerance",
        min=0,
        max=255,
        help="Largest difference to --mask-color in any channel.",
        rich_help_panel=_MASKS,
    ),
]
AlphaOption = Annotated[
    bool,
    typer.Option(
        "--mask-alpha",
        help="Hole where MASK, or without MASK the photo itself, is transparent. A photo's erased hole becomes opaque.",
        rich_help_panel=_MASKS,
    ),
]
ThresholdOption = Annotated[
    float,
    typer.Option(
        "--mask-threshold",
        min=0.0,
        max=1.0,
        help="Share of full brightness (of full opacity with --mask-alpha) that divides hole from known.",
        rich_help_panel=_MASKS,
    ),
]
InvertOption = Annotated[
    bool, typer.Option("--invert-mask", help="Swap hole and known, before growing.", rich_help_panel=_MASKS)
]
GrowOption = Annotated[
    int, typer.Option("--mask-grow", metavar="N", min=0, help="Grow the hole by N pixels.", rich_help_panel=_MASKS)
]
ResizeOption = Annotated[
    bool,
    typer.Option("--resize-mask", help="Bring a MASK of another size to the photo's.", rich_help_panel=_MASKS),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace existing output (never an input).", rich_help_panel=_LIMITS)
]
MaxPixelsOption = Annotated[
    int | None,
    typer.Option(
        "--max-pixels",
        min=1,
        help="Accept pictures of up to this many pixels instead of Pillow's 89 million.",
        show_default=False,
        rich_help_panel=_LIMITS,
    ),
]


@dataclass(frozen=True)
class MaskOptions:
    """Where the hole is, as the command line says it."""

    file: Path | None
    boxes: Sequence[masks.Box]
    colour: tuple[int, int, int] | None
    tolerance: int
    alpha: bool
    threshold: float
    invert: bool
    grow: int
    resize: bool

    @property
    def erased_from_photo(self) -> bool:
        """Whether the hole is the photo's own transparency."""
        return self.alpha and self.file is None


def _mask_options(
    file: Path | None,
    boxes: Sequence[str],
    colour: str | None,
    tolerance: int,
    alpha: bool,
    threshold: float,
    invert: bool,
    grow: int,
    resize: bool,
) -> MaskOptions:
    """The options in their own types; a wrong word is a wrong command line."""
    try:
        parsed_boxes = [masks.parse_box(box) for box in boxes]
        parsed_colour = None if colour is None else masks.parse_colour(colour)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if file is None and not parsed_boxes and parsed_colour is None and not alpha:
        raise typer.BadParameter("where is the hole? Give a MASK file, --mask-box, --mask-color or --mask-alpha")
    return MaskOptions(file, parsed_boxes, parsed_colour, tolerance, alpha, threshold, invert, grow, resize)


def _build_mask(photo: images.Photo, options: MaskOptions, max_pixels: int | None) -> masks.Mask:
    """Union of everything that the options call hole, then inverted and grown as they say."""
    source = photo
    if options.file is not None:
        source = images.read_photo(options.file, max_pixels=max_pixels)
    parts: list[masks.Mask] = []
    if options.colour is not None:
        parts.append(masks.mask_from_colour(source.pixels, options.colour, options.tolerance))
    if options.alpha:
        parts.append(masks.mask_from_alpha(source.pixels, options.threshold))
    if options.file is not None and not parts:
        parts.append(masks.mask_from_brightness(source.pixels, options.threshold))
    size = (photo.height, photo.width)
    if options.file is not None and source.pixels.shape[:2] != size:
        if not options.resize:
            raise ValueError(
                f"{options.file}: the mask is {source.width} x {source.height} pixels, the photo {photo.width} x "
                f"{photo.height}; --resize-mask brings it to size"
            )
        parts = [masks.resize_mask(part, *size) for part in parts]
    if options.boxes:
        parts.append(masks.mask_from_boxes(*size, options.boxes))
    mask = np.logical_or.reduce(parts)
    return masks.grow_mask(~mask if options.invert else mask, options.grow)


# --- commands ------------------------------------------------------------------------------------------------------


@app.command()
def fill(
    image: ImageArgument,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="PNG, TIFF and WebP are written without loss: known pixels stay identical. JPEG is lossy by nature: "
            "every pixel changes a little.",
            show_default=False,
        ),
    ],
    mask: MaskArgument = None,
    method: Annotated[
        Method, typer.Option(help="auto: diffusion for thin holes such as scratches, exemplar for all others.")
    ] = Method.auto,
    seed: Annotated[int, typer.Option(help="The same seed gives the same picture, bit for bit.")] = 0,
    mask_box: BoxOption = None,
    mask_color: ColourOption = None,
    mask_tolerance: ToleranceOption = 32,
    mask_alpha: AlphaOption = False,
    mask_threshold: ThresholdOption = 0.5,
    invert_mask: InvertOption = False,
    mask_grow: GrowOption = 0,
    resize_mask: ResizeOption = False,
    force: ForceOption = False,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEG output.", rich_help_panel=_LIMITS)] = 95,
    max_pixels: MaxPixelsOption = None,
    save_row: Annotated[
        Path | None,
        typer.Option(help="Also write a row of panels here.", show_default=False, rich_help_panel="Panels"),
    ] = None,
    panel_names: Annotated[
        str,
        typer.Option("--panels", help=f"Names out of {', '.join(panels.PANELS)}.", rich_help_panel="Panels"),
    ] = ",".join(panels.DEFAULT_PANELS),
    truth: Annotated[
        Path | None,
        typer.Option(help="The undamaged photo, for the panel truth.", show_default=False, rich_help_panel="Panels"),
    ] = None,
) -> None:
    """Fill the hole of a photo. Needs no weights and no download.

    The hole is the union of MASK, the boxes, the colour and the transparency. Known pixels are not touched.

    Example: inpaint-kernels fill photo.jpg --mask-box 120,80,60,40 -o filled.png
    """
    options = _mask_options(
        mask,
        mask_box or [],
        mask_color,
        mask_tolerance,
        mask_alpha,
        mask_threshold,
        invert_mask,
        mask_grow,
        resize_mask,
    )
    with _errors_as_sentences():
        row_panels = panels.parse_panels(panel_names)
        inputs = [path for path in (image, mask, truth) if path is not None]
        images.check_output(output, force=force, inputs=inputs)
        if save_row is not None:
            images.check_output(save_row, force=force, inputs=inputs)
            if save_row.resolve() == output.resolve():
                raise ValueError(f"{save_row}: is the output already; the row must be another file")
        photo = _read(image, max_pixels)
        images.check_encodable(output, photo.pixels)
        true_pixels = None if truth is None else _read(truth, max_pixels).pixels
        if save_row is not None:
            size = (photo.height, photo.width)
            panels.check_panels(row_panels, method=method.value, size=size, truth=true_pixels)
        hole = _build_mask(photo, options, max_pixels)
        _warn(masks.hole_warning(hole))
        if not hole.any():
            _write_unchanged(image, output, photo, quality)
            _out.print(f"no hole: {escape(str(output))} is the input, unchanged")
            return
        started = time.perf_counter()
        filled = _fill(photo, hole, method.value, seed, options.erased_from_photo)
        seconds = time.perf_counter() - started
        row = None
        if save_row is not None:
            sources = panels.PanelSources(photo.pixels, hole, filled.pixels, filled.method, filled.offsets, true_pixels)
            row = panels.draw_row(sources, row_panels)
        images.write_photo(output, images.Photo(filled.pixels, photo.format, photo.metadata), quality=quality)
        _out.print(
            f"filled {masks.describe_hole(hole)} of {photo.width} x {photo.height} by {filled.method} "
            f"in {seconds:.1f} s: {escape(str(output))}"
        )
        if save_row is not None and row is not None:
            images.write_photo(save_row, images.Photo(row, "PNG"))
            _out.print(f"panels {', '.join(row_panels)}: {escape(str(save_row))}")
        if filled.advice:
            _out.print(escape(filled.advice))


@app.command("mask")
def write_mask(
    image: ImageArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="PNG, TIFF or WebP.", show_default=False)
    ],
    mask: MaskArgument = None,
    mask_box: BoxOption = None,
    mask_color: ColourOption = None,
    mask_tolerance: ToleranceOption = 32,
    mask_alpha: AlphaOption = False,
    mask_threshold: ThresholdOption = 0.5,
    invert_mask: InvertOption = False,
    mask_grow: GrowOption = 0,
    resize_mask: ResizeOption = False,
    force: ForceOption = False,
    max_pixels: MaxPixelsOption = None,
) -> None:
    """Write the mask that fill would use with the same options: white in the hole, black elsewhere."""
    options = _mask_options(
        mask,
        mask_box or [],
        mask_color,
        mask_tolerance,
        mask_alpha,
        mask_threshold,
        invert_mask,
        mask_grow,
        resize_mask,
    )
    with _errors_as_sentences():
        if images.format_of(output) == "JPEG":
            raise ValueError(f"{output}: JPEG would blur the mask; write PNG, TIFF or WebP")
        images.check_output(output, force=force, inputs=[path for path in (image, mask) if path is not None])
        photo = _read(image, max_pixels)
        hole = _build_mask(photo, options, max_pixels)
        _warn(masks.hole_warning(hole))
        images.write_photo(output, images.Photo(np.where(hole, 255, 0).astype(np.uint8), "PNG"))
        _out.print(f"hole: {masks.describe_hole(hole)}: {escape(str(output))}")


@app.command("info")
def print_info() -> None:
    """Print versions, the state of the native library, devices, and which backend each op can run on."""
    for table in info.tables():
        _out.print(table)


@app.command("models")
def print_models() -> None:
    """Print the learned models, their papers, and whose weights they load: where to get them, and their licence."""
    for table in catalogue.tables():
        _out.print(table, "")


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="Weights as published: .pth, .pt, .p, .t7, .safetensors, or a TensorFlow checkpoint's .index or "
            "folder. Of EdgeConnect and CSA one of the two files, the other beside it.",
            show_default=False,
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="A file that ends in .safetensors.", show_default=False)
    ],
    dialect: Annotated[
        str | None,
        typer.Option(
            help="Run the weights as this implementation does, not as they were published.", show_default=False
        ),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Write published weights as one safetensors file: our names, RGB, with source, sha256, dialect and licence.

    Nothing in IN is run. The file loads with inpaint_kernels.load_pretrained, as IN does.

    Example: inpaint-kernels convert states_tf_places2.pth deepfill_v2.safetensors
    """
    from inpaint_kernels.pretrained import LicenceNotice, convert_checkpoint

    with _errors_as_sentences(), warnings.catch_warnings():
        warnings.simplefilter("ignore", LicenceNotice)  # it is printed below
        metadata = convert_checkpoint(source, target, dialect=dialect, force=force)
        dialect_of = f" ({metadata['dialect']})" if metadata["dialect"] else ""
        _out.print(
            f"{metadata['model']}{dialect_of} of {metadata['repository']}: {escape(str(target))}\n"
            f"licence of the weights: {escape(metadata['licence'])}"
        )


@app.command()
def bench(
    op: Annotated[str, typer.Argument(help=f"One of {', '.join(comparison.OPS)}.")] = comparison.OPS[0],
    size: Annotated[
        int, typer.Option(help=f"Side of the square feature map: even, 16 to {comparison.LARGEST_SIZE}.")
    ] = 64,
    channels: Annotated[int, typer.Option(help="Channels of the feature map.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="How often the providers take turns; the median counts.")] = 5,
    threads: Annotated[int, typer.Option(min=0, help="Threads of each; 0: torch's default.")] = 0,
    suite: Annotated[
        bool, typer.Option("--suite", help="Run the full pytest-benchmark suite of a checkout instead.")
    ] = False,
) -> None:
    """Compare an op's native kernel and portable backend with naive PyTorch, here and now.

    Every result is held against the float64 reference first; one that differs is not timed and ends with exit code 1.
    """
    if op not in comparison.OPS:
        raise typer.BadParameter(f"op: expected one of {', '.join(comparison.OPS)}, got {op!r}")
    if suite:
        raise typer.Exit(_run_suite(op))
    with _errors_as_sentences():
        case = comparison.Case(size=size, channels=channels, threads=threads)
        with _progress_bar() as report_progress:
            rows = comparison.compare(case, rounds=rounds, progress=report_progress)
    _out.print(comparison.comparison_table(case, rows))
    if any(row.wrong for row in rows):
        raise typer.Exit(1)


# --- helpers -------------------------------------------------------------------------------------------------------


def _run_suite(op: str) -> int:
    """Run ``benches/bench_<op>.py`` of the checkout that this package was imported from; pytest's exit code."""
    path = Path(__file__).resolve().parent.parent / "benches" / f"bench_{op}.py"
    if not path.is_file():
        _fail(
            f"the suites are part of a checkout, not of an installed package ({path.parent} is not there); "
            f"the quick comparison is here: inpaint-kernels bench {op}"
        )
    return subprocess.run([sys.executable, "-m", "pytest", str(path)], cwd=path.parent.parent, check=False).returncode


def _read(path: Path, max_pixels: int | None) -> images.Photo:
    photo = images.read_photo(path, max_pixels=max_pixels)
    for note in photo.notes:
        _err.print(f"note: {escape(note)}")
    return photo


def _fill(photo: images.Photo, hole: masks.Mask, method: str, seed: int, opaque_hole: bool) -> FilledPhoto:
    with _progress_bar() as report_progress:
        return fill_photo(
            photo.pixels, hole, method=method, seed=seed, opaque_hole=opaque_hole, progress=report_progress
        )


def _write_unchanged(image: Path, output: Path, photo: images.Photo, quality: int) -> None:
    """The very file where the format is the same, so that not even a JPEG changes; else the same pixels."""
    if images.format_of(output) == photo.format:
        images.copy_file(image, output)
    else:
        images.write_photo(output, photo, quality=quality)


class _BarReporter:
    """Moves a progress bar; called as (share done, stage)."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=1.0)

    def __call__(self, fraction: float, stage: str) -> None:
        self._progress.update(self._task, completed=fraction, description=escape(stage))


@contextmanager
def _progress_bar() -> Iterator[_BarReporter]:
    """A bar on standard error that goes away when the work is done; nothing where that is not a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_err, transient=True, disable=not _err.is_terminal) as progress:
        yield _BarReporter(progress)


@contextmanager
def _errors_as_sentences() -> Iterator[None]:
    """What the library says of bad input is said to the user as it is, without a traceback."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        _fail(str(error) or "not enough memory")


def _warn(sentence: str | None) -> None:
    if sentence:
        _err.print(f"[yellow]warning:[/yellow] {escape(sentence)}")


def _fail(sentence: str) -> NoReturn:
    _err.print(f"[red]error:[/red] {escape(sentence)}")
    raise typer.Exit(1)
