"""What a training run is told: one typed table per file, the published recipes among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from tomlkit.exceptions import TOMLKitError

from inpaint_kernels.fillers import MODELS

Count = Annotated[int, Field(ge=1)]
Number = Annotated[int, Field(ge=0)]
Bounds = tuple[Count, Count]
"""Least and greatest, both included."""

FREE = ("photos", "validation", "workers", "log_every", "save_every", "keep", "rows", "rows_every", "phases", "device")
"""What may be another when a run goes on: nothing that has been trained would have come out otherwise."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BoxHole(_Table):
    """A box; DeepFill v1 and EdgeConnect.

    Attributes:
        size: its side in pixels.
        margin: pixels that stay free at the image's borders.
        shrink: it loses up to so many at its top and bottom, and at its left and right.
    """

    kind: Literal["box"]
    size: Count
    margin: Number = 0
    shrink: Number = 0


class BoxInWindowHole(_Table):
    """A box of random sides inside a random ``window``; GLCIC.

    Attributes:
        smallest: its least side in pixels.
        largest: its greatest.
    """

    kind: Literal["box_in_window"]
    smallest: Count
    largest: Count


class StrokesHole(_Table):
    """Free-form brush strokes; DeepFill v2.

    Attributes:
        strokes: their number.
        vertices: pieces of a stroke.
        width: of the brush in pixels.
        with_box: side of a box that is hole too; 0: none.
    """

    kind: Literal["strokes"]
    strokes: Bounds = (1, 3)
    vertices: Bounds = (4, 11)
    width: Bounds = (12, 39)
    with_box: Number = 0


class WalkHole(_Table):
    """What a random walk visits; partial convolutions.

    Attributes:
        steps: of the walk; None: one for each pixel.
    """

    kind: Literal["walk"]
    steps: Count | None = None


class FolderHole(_Table):
    """Pictures of a folder, of any size.

    Attributes:
        folder: with them, and with folders of them.
        invert: whether the hole is black, not white.
    """

    kind: Literal["folder"]
    folder: Path
    invert: bool = False


Hole = Annotated[BoxHole | BoxInWindowHole | StrokesHole | WalkHole | FolderHole, Field(discriminator="kind")]


class Phase(_Table):
    """A part of the training.

    Attributes:
        name: one of the system's phases.
        steps: how many.
    """

    name: str = "training"
    steps: Count


class TrainingConfig(_Table):
    """A training run.

    Attributes:
        system: a name of ``inpaint_kernels.fillers.MODELS``.
        model: arguments of the model's class: ``dialect``, ...
        start: weights that ``load_pretrained`` reads, to train on from; None: random ones.
        settings: fields of the system's settings that differ from the published ones.
        vgg: torchvision's file of the VGG that the system's losses take, "download" (into torch.hub's folder) or
            "random" (for a trial); None: the system takes none.
        photos: folder of the photos to train on, with folders in it.
        validation: folder of photos for the sample rows; None: they show photos that are trained on.
        image_size: side of what is cut out of a photo, in pixels.
        shortest: photos are first scaled so that their shorter side has a random length out of these; None: only those
            that are too small are.
        flip: whether every second image is mirrored.
        holes: kinds of holes; of several each step takes one at random.
        window: side of the box around the hole that local discriminators see; DeepFill v1 and GLCIC.
        one_hole: whether all images of a step have the same.
        batch: images of one step, over all processes.
        accumulate: parts that a process takes its share in, in less memory; see ``TrainingSystem.step``.
        phases: trained one after another.
        rates: points (step, factor) between which the factor on the learning rates is interpolated; none: 1.
        precision: of the networks' convolutions; below float32 by ``torch.autocast``.
        ema: decay of the running mean of the weights, which is saved beside them; 0: none.
        seed: of everything random.
        device: "auto" takes each process's CUDA device where there is one.
        workers: processes that read photos, for each process that trains.
        log_every: steps between two entries of the losses.
        save_every: steps between two checkpoints.
        keep: number of checkpoints that are kept; 0: all.
        rows: images of the sample rows; 0: none are drawn.
        rows_every: steps between two of them.
    """

    system: Literal["deepfill_v1", "deepfill_v2", "glcic", "edge_connect", "csa", "guided_face", "partial_conv_unet"]
    model: dict[str, Any] = {}
    start: Path | None = None
    settings: dict[str, Any] = {}
    vgg: Path | Literal["download", "random"] | None = None

    photos: Path | None = None
    validation: Path | None = None
    image_size: Count = 256
    shortest: Bounds | None = None
    flip: bool = True

    holes: Annotated[list[Hole], Field(min_length=1)]
    window: Count | None = None
    one_hole: bool = False

    batch: Count
    accumulate: Count = 1
    phases: Annotated[list[Phase], Field(min_length=1)]
    rates: list[tuple[Number, Annotated[float, Field(ge=0)]]] = []
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: Number = 0
    device: str = "auto"

    workers: Number = 2
    log_every: Count = 100
    save_every: Count = 5000
    keep: Number = 2
    rows: Number = 4
    rows_every: Count = 1000

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(phase.steps for phase in self.phases)

    def phase_of(self, step: int) -> str:
        """The phase that the step of that number, from 0 on, belongs to."""
        for phase in self.phases:
            if step < phase.steps:
                return phase.name
            step -= phase.steps
        return self.phases[-1].name

    @model_validator(mode="after")
    def _check_together(self) -> TrainingConfig:
        known = MODELS[self.system]
        if self.image_size % known.size_multiple:
            raise ValueError(f"image_size: expected a multiple of {known.size_multiple}, got {self.image_size}")
        if self.shortest is not None and not self.image_size <= self.shortest[0] <= self.shortest[1]:
            raise ValueError(f"shortest: expected {self.image_size} <= least <= greatest, got {self.shortest}")
        if self.window is not None and self.window > self.image_size:
            raise ValueError(f"window: expected at most image_size, {self.image_size}, got {self.window}")
        if self.window is None and self.system in ("deepfill_v1", "glcic"):
            raise ValueError(f"window: expected the side of what {self.system}'s local discriminator sees, got none")
        for hole in self.holes:
            _check_hole(hole, self.image_size, self.window)
        if [step for step, _ in self.rates] != sorted({step for step, _ in self.rates}):
            raise ValueError(f"rates: expected steps that grow, got {[step for step, _ in self.rates]}")
        return self


def _check_hole(hole: Hole, image_size: int, window: int | None) -> None:
    if isinstance(hole, BoxHole):
        free = image_size - 2 * hole.margin
        if hole.size > free or 2 * hole.shrink >= hole.size:
            raise ValueError(f"holes: a box of {hole.size} less {2 * hole.shrink} does not fit {free} pixels")
        if window is not None and window != hole.size:
            raise ValueError(f"window: expected the box's size, {hole.size}, got {window}")
    if isinstance(hole, BoxInWindowHole):
        if window is None:
            raise ValueError("window: expected the side of the window that the box is in, got none")
        if not hole.smallest <= hole.largest <= window:
            raise ValueError(f"holes: expected smallest <= largest <= window, got {hole.smallest}, {hole.largest}")
    if isinstance(hole, StrokesHole) and hole.with_box > image_size:
        raise ValueError(f"holes: with_box: expected at most {image_size}, got {hole.with_box}")


# Files ----------------------------------------------------------------------------------------------------------------

_FOLDER = resources.files("inpaint_kernels.trainer") / "recipes"


def recipes() -> list[str]:
    """Names of the published recipes."""
    return sorted(file.name.removesuffix(".toml") for file in _FOLDER.iterdir() if file.name.endswith(".toml"))


def read_config(source: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainingConfig:
    """A run's configuration.

    Args:
        source: a TOML file, or the name of a published recipe.
        overrides: other values than the file's by name; of those in a table as ``"model.dialect"``.

    Raises:
        ValueError: no such file or recipe, not TOML, or something in it is unknown or out of range; each is named.
    """
    path = Path(source)
    if path.suffix != ".toml" and str(source) in recipes():
        text = (_FOLDER / f"{source}.toml").read_text(encoding="utf-8")
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        raise ValueError(f"config: expected a TOML file or one of {', '.join(recipes())}, got {str(source)!r}")
    try:
        table = tomlkit.parse(text).unwrap()
    except TOMLKitError as error:
        raise ValueError(f"{source}: {error}") from error
    for name, value in (overrides or {}).items():
        _put(table, name, value)
    try:
        return TrainingConfig.model_validate(table)
    except ValidationError as error:
        problems = "; ".join(_sentence(problem) for problem in error.errors())
        raise ValueError(f"{source}: {problems}") from error


def write_config(config: TrainingConfig) -> str:
    """A configuration as TOML that :func:`read_config` reads."""
    return tomlkit.dumps(config.model_dump(mode="json", exclude_none=True))


def first_difference(config: TrainingConfig, other: TrainingConfig) -> str | None:
    """The first name, but for the free ones, whose value differs; None if there is none."""
    for name in TrainingConfig.model_fields:
        if name not in FREE and getattr(config, name) != getattr(other, name):
            return name
    return None


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """``["batch=4", "model.dialect=official"]`` as values by name: TOML or, what is none, strings."""
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"set: expected NAME=VALUE, got {text!r}")
        try:
            values[name.strip()] = tomlkit.parse(f"value = {value}").unwrap()["value"]
        except TOMLKitError:
            values[name.strip()] = value.strip()
    return values


def _put(table: dict[str, Any], name: str, value: Any) -> None:
    *above, last = name.split(".")
    for part in above:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ValueError(f"{name}: expected a table at {part!r}, got {type(table).__name__}")
    table[last] = value


def _sentence(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {text}" if where else text
    got = "" if problem["type"] == "missing" else f", got {problem['input']!r}"
    return f"{where}: {text[:1].lower()}{text[1:]}{got}"
