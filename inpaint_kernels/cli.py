"""The command line: ``info``, ``models``, ``fill``, ``mask``, ``compare``, ``convert``, ``train`` and ``bench``.

Results go to standard output; warnings, errors and progress bars to standard error. Exit codes: 0 done, 1 the work
cannot be done (one sentence says why), 2 the command line itself is wrong.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from rich.markup import escape
from rich.table import Table

from inpaint_kernels import catalogue, comparison, images, info, masks, panels, processes, terminal
from inpaint_kernels.fill_command import Pictures, fill_many, fill_one, load_quietly, read_photo
from inpaint_kernels.fillers import MODELS, Guide, make_fillers, read_rgb, sigma_variants
from inpaint_kernels.filling import Output, Task, find_tasks, is_many
from inpaint_kernels.mask_options import (
    AlphaOption,
    BoxOption,
    ColourOption,
    GrowOption,
    InvertOption,
    MaskArgument,
    RandomOption,
    ResizeOption,
    ThresholdOption,
    ToleranceOption,
    build_mask,
    mask_options,
)
from inpaint_kernels.photo import METHODS
from inpaint_kernels.pretrained import LicenceNotice, convert_checkpoint

app = typer.Typer(
    name="inpaint-kernels",
    help="Fill holes in photos, and look at the kernels that do it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_LIMITS = "Files"
_MODEL = "Learned models"
_PANELS = "Panels"

ImageArgument = Annotated[Path, typer.Argument(metavar="IMAGE", help="The photo: PNG, JPEG, TIFF or WebP.")]
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


# --- commands ------------------------------------------------------------------------------------------------------


@app.command()
def fill(
    image: Annotated[
        Path,
        typer.Argument(
            metavar="IMAGE", help="The photo: PNG, JPEG, TIFF or WebP; or a folder, or a pattern such as 'in/*.jpg'."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="PNG, TIFF and WebP are written without loss: known pixels stay identical. JPEG is lossy by nature: "
            "every pixel changes a little. Of a folder's photos the folder of the results.",
            show_default=False,
        ),
    ],
    mask: MaskArgument = None,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"One or several of {', '.join((*METHODS, *MODELS))}, separated by commas (several: --save-sheet). "
            "auto: diffusion for thin holes such as scratches, exemplar for all others (default: that of --weights, "
            "or auto).",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same picture, bit for bit.")] = 0,
    weights: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Published weights of a learned model, see inpaint-kernels models; repeatable, as --model has them.",
            show_default=False,
            rich_help_panel=_MODEL,
        ),
    ] = None,
    region: Annotated[
        Literal["hole", "full"],
        typer.Option(help="Compute only what the hole depends on, or the whole photo.", rich_help_panel=_MODEL),
    ] = "hole",
    fit: Annotated[
        Literal["pad", "crop", "resize"],
        typer.Option(
            help="The photo at its own size; what is around each hole alone; or the photo reduced to --max-side.",
            rich_help_panel=_MODEL,
        ),
    ] = "pad",
    max_side: Annotated[
        int | None,
        typer.Option(min=1, help="Of photo or crop as the model sees it.", show_default=False, rich_help_panel=_MODEL),
    ] = None,
    margin: Annotated[
        int | None,
        typer.Option(min=0, help="Pixels around the holes of --fit crop.", show_default=False, rich_help_panel=_MODEL),
    ] = None,
    detail: Annotated[
        Literal["none", "residual"],
        typer.Option(
            help="residual: where the photo was reduced, fine structure from what resembles the painting.",
            rich_help_panel=_MODEL,
        ),
    ] = "none",
    blend: Annotated[
        Literal["paste", "feather", "poisson"],
        typer.Option(help="How the painting meets the hole's border.", rich_help_panel=_MODEL),
    ] = "paste",
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, ...", show_default=False, rich_help_panel=_MODEL),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the computation.", rich_help_panel=_MODEL)
    ] = "float32",
    memory: Annotated[
        str | None,
        typer.Option(
            help="What the model may take beside its weights, as 4GiB: large maps are computed in strips.",
            show_default=False,
            rich_help_panel=_MODEL,
        ),
    ] = None,
    guide: Annotated[
        Path | None,
        typer.Option(
            help="A picture of the photo's size, bright on lines to paint along: EdgeConnect, guided DeepFill v2.",
            show_default=False,
            rich_help_panel=_MODEL,
        ),
    ] = None,
    edges_from: Annotated[
        Path | None,
        typer.Option(
            help="Another picture of the photo's size, whose edges are wanted in the hole: EdgeConnect.",
            show_default=False,
            rich_help_panel=_MODEL,
        ),
    ] = None,
    sigma: Annotated[
        str | None,
        typer.Option(
            help="Smoothing of EdgeConnect's edges, in pixels; several, as 0.5,1,2,4: --save-sheet.",
            show_default=False,
            rich_help_panel=_MODEL,
        ),
    ] = None,
    mask_box: BoxOption = None,
    mask_color: ColourOption = None,
    mask_tolerance: ToleranceOption = 32,
    mask_alpha: AlphaOption = False,
    mask_threshold: ThresholdOption = 0.5,
    invert_mask: InvertOption = False,
    mask_grow: GrowOption = 0,
    resize_mask: ResizeOption = False,
    mask_random: RandomOption = None,
    force: ForceOption = False,
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing",
            help="Leave out photos whose output is there: goes on where a run was interrupted.",
            rich_help_panel=_LIMITS,
        ),
    ] = False,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Photos in the folder's folders too.", rich_help_panel=_LIMITS)
    ] = False,
    batch: Annotated[
        int,
        typer.Option(min=1, help="Photos of one size that a model fills together.", rich_help_panel=_LIMITS),
    ] = 1,
    file_format: Annotated[
        Literal["png", "tiff", "webp", "jpeg"],
        typer.Option("--format", help="Of the results of a folder.", rich_help_panel=_LIMITS),
    ] = "png",
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEG output.", rich_help_panel=_LIMITS)] = 95,
    max_pixels: MaxPixelsOption = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object for each photo instead of sentences."),
    ] = False,
    save_row: Annotated[
        Path | None,
        typer.Option(help="Also write a row of panels here.", show_default=False, rich_help_panel=_PANELS),
    ] = None,
    panel_names: Annotated[
        str,
        typer.Option("--panels", help=f"Names out of {', '.join(panels.PANELS)}.", rich_help_panel=_PANELS),
    ] = ",".join(panels.DEFAULT_PANELS),
    save_sheet: Annotated[
        Path | None,
        typer.Option(
            help="Write the results of several models, or sigmas, side by side; with --truth and what they differ.",
            show_default=False,
            rich_help_panel=_PANELS,
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(help="The undamaged photo.", show_default=False, rich_help_panel=_PANELS),
    ] = None,
) -> None:
    """Fill the hole of a photo, or of all photos of a folder. Needs no weights and no download.

    The hole is the union of MASK, the boxes, the colour and the transparency. Known pixels are not touched. Of a folder
    MASK may be a folder whose pictures have the photos' names, with or without _mask behind them.

    Example: inpaint-kernels fill photo.jpg --mask-box 120,80,60,40 -o filled.png
    """
    options = mask_options(
        mask,
        mask_box or [],
        mask_color,
        mask_tolerance,
        mask_alpha,
        mask_threshold,
        invert_mask,
        mask_grow,
        resize_mask,
        mask_random,
        seed,
    )
    names = _model_names(model)
    sigmas = _numbers("--sigma", sigma)
    pictures = Pictures(save_row, panel_names, save_sheet, truth)
    written = Output(quality, force, skip_existing, options.erased_from_photo)
    painting: dict[str, Any] = {
        "region": region,
        "fit": fit,
        "max_side": max_side,
        "margin": margin,
        "detail": detail,
        "blend": blend,
    }
    if dtype != "float32":
        painting["dtype"] = getattr(torch, dtype)
    if memory is not None:
        painting["memory"] = memory
    with terminal.errors_as_sentences():
        pictures.check(image, mask, output, force)
        drawing = None if guide is None else masks.mask_from_brightness(read_photo(guide, max_pixels).pixels)
        edges = None if edges_from is None else read_rgb(edges_from, max_pixels)
        fillers = make_fillers(
            names,
            weights or [],
            seed=seed,
            guide=Guide(drawing, edges, sigmas[0] if sigmas else None),
            device=device,
            batch=batch,
            options=painting,
            load=load_quietly,
        )
        fillers = [variant for filler in fillers for variant in sigma_variants(filler, sigmas)]
        if len(fillers) > 1 and save_sheet is None:
            raise ValueError("several models or sigmas are shown side by side: give --save-sheet FILE")

        def read(task: Task) -> tuple[images.Photo, masks.Mask]:
            photo = read_photo(task.image, max_pixels)
            hole = build_mask(photo, replace(options, file=task.mask), task.image.name, max_pixels)
            terminal.warn(masks.hole_warning(hole))
            return photo, hole

        if is_many(image):
            pictures.check_single(image)
            tasks = find_tasks(image, mask, output, recursive=recursive, file_format=file_format)
            fill_many(tasks, fillers[0], read, replace(written, make_folders=True), as_json)
        else:
            fill_one(Task(image, mask, output), fillers, read, written, pictures, as_json, max_pixels)


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
    mask_random: RandomOption = None,
    force: ForceOption = False,
    max_pixels: MaxPixelsOption = None,
    seed: Annotated[int, typer.Option(help="Of --mask-random.")] = 0,
) -> None:
    """Write the mask that fill would use with the same options: white in the hole, black elsewhere."""
    options = mask_options(
        mask,
        mask_box or [],
        mask_color,
        mask_tolerance,
        mask_alpha,
        mask_threshold,
        invert_mask,
        mask_grow,
        resize_mask,
        mask_random,
        seed,
    )
    with terminal.errors_as_sentences():
        if images.format_of(output) == "JPEG":
            raise ValueError(f"{output}: JPEG would blur the mask; write PNG, TIFF or WebP")
        images.check_output(output, force=force, inputs=[path for path in (image, mask) if path is not None])
        photo = read_photo(image, max_pixels)
        hole = build_mask(photo, options, image.name, max_pixels)
        terminal.warn(masks.hole_warning(hole))
        images.write_photo(output, images.Photo(np.where(hole, 255, 0).astype(np.uint8), "PNG"))
        terminal.out.print(f"hole: {masks.describe_hole(hole)}: {escape(str(output))}")


@app.command()
def compare(
    picture: Annotated[Path, typer.Argument(metavar="PICTURE", help="A filled photo.", show_default=False)],
    truth: Annotated[Path, typer.Argument(metavar="TRUTH", help="The undamaged photo.", show_default=False)],
    mask: Annotated[
        Path | None, typer.Option(help="Picture of the same size, bright where the hole is.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    max_pixels: MaxPixelsOption = None,
) -> None:
    """Print PSNR, SSIM and L1 of a picture against the truth: overall, and in the hole."""
    from inpaint_kernels import metrics

    with terminal.errors_as_sentences():
        a, b = (read_photo(path, max_pixels).pixels for path in (picture, truth))
        hole = None if mask is None else masks.mask_from_brightness(read_photo(mask, max_pixels).pixels)
        found = metrics.compare(a, b, hole)
    if as_json:
        print(json.dumps({region: values._asdict() for region, values in found.items()}))
        return
    table = Table("region", "PSNR / dB", "SSIM", "L1")
    for region, values in found.items():
        table.add_row(region, *metrics.as_text(values))
    terminal.out.print(table)


@app.command("info")
def print_info() -> None:
    """Print versions, the state of the native library, devices, and which backend each op can run on."""
    for table in info.tables():
        terminal.out.print(table)


@app.command("models")
def print_models() -> None:
    """Print the learned models, their papers, and whose weights they load: where to get them, and their licence."""
    for table in catalogue.tables():
        terminal.out.print(table, "")


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
    with terminal.errors_as_sentences(), warnings.catch_warnings():
        warnings.simplefilter("ignore", LicenceNotice)  # it is printed below
        metadata = convert_checkpoint(source, target, dialect=dialect, force=force)
        dialect_of = f" ({metadata['dialect']})" if metadata["dialect"] else ""
        terminal.out.print(
            f"{metadata['model']}{dialect_of} of {metadata['repository']}: {escape(str(target))}\n"
            f"licence of the weights: {escape(metadata['licence'])}"
        )


@app.command()
def train(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A TOML file, or the name of a published recipe, see --list.")
    ] = "",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="RUN", help="The folder of the run.", show_default=False),
    ] = None,
    photos: Annotated[
        Path | None, typer.Option(help="The folder of the photos to train on.", show_default=False)
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Published weights to train on from, not random ones.", show_default=False),
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Another value than the file's, as batch=4 or settings.learning_rate=2e-4; repeatable.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in RUN, as if there had been no break.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Print the whole configuration as TOML, to be changed, and do nothing.")
    ] = False,
    list_recipes: Annotated[bool, typer.Option("--list", help="Print the names of the published recipes.")] = False,
) -> None:
    """Train a model on the photos of a folder; under torchrun on several GPUs.

    RUN gets checkpoints that fill --weights takes, sample rows, and logs for TensorBoard. Ctrl-C saves a checkpoint.

    Example: inpaint-kernels train deepfill_v2 --photos photos -o run --set batch=8
    """
    with terminal.errors_as_sentences():
        trainer = _import_trainer()
        if list_recipes:
            terminal.out.print("\n".join(trainer.recipes()))
            return
        given = {name: path for name, path in (("photos", photos), ("start", start)) if path is not None}
        wanted = trainer.read_config(config, given | trainer.parse_overrides(values or []))
        if show:
            print(trainer.write_config(wanted), end="")
            return
        if output is None:
            raise typer.BadParameter("--output: expected the folder of the run, got none")
        with terminal.steps_bar(wanted.steps) as bar:
            made = trainer.train(wanted, output, resume=resume, report=lambda step, losses: bar(step, _brief(losses)))
    if processes.rank() == 0:
        stopped = "" if made >= wanted.steps else f"; stopped, --resume makes the other {wanted.steps - made}"
        terminal.out.print(f"{made} steps: {escape(str(output))}{stopped}")


def _import_trainer() -> ModuleType:
    try:
        return importlib.import_module("inpaint_kernels.trainer")
    except ModuleNotFoundError as error:
        raise ValueError(f"training needs {error.name}: pip install 'inpaint-kernels[train]'") from error


def _brief(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {loss:.3g}" for name, loss in losses.items())


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
    with terminal.errors_as_sentences():
        case = comparison.Case(size=size, channels=channels, threads=threads)
        with terminal.progress_bar() as report_progress:
            rows = comparison.compare(case, rounds=rounds, progress=report_progress)
    terminal.out.print(comparison.comparison_table(case, rows))
    if any(row.wrong for row in rows):
        raise typer.Exit(1)


# --- helpers -------------------------------------------------------------------------------------------------------


def _model_names(text: str | None) -> list[str]:
    names = [] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in (*METHODS, *MODELS):
            raise typer.BadParameter(f"--model: expected one of {', '.join((*METHODS, *MODELS))}, got {name!r}")
    return names


def _numbers(option: str, text: str | None) -> list[float]:
    try:
        return [] if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{option}: expected numbers such as 0.5,1,2, got {text!r}") from error


def _run_suite(op: str) -> int:
    """Run ``benches/bench_<op>.py`` of the checkout that this package was imported from; pytest's exit code."""
    path = Path(__file__).resolve().parent.parent / "benches" / f"bench_{op}.py"
    if not path.is_file():
        terminal.fail(
            f"the suites are part of a checkout, not of an installed package ({path.parent} is not there); "
            f"the quick comparison is here: inpaint-kernels bench {op}"
        )
    return subprocess.run([sys.executable, "-m", "pytest", str(path)], cwd=path.parent.parent, check=False).returncode
