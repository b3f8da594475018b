"""How training learns: GLCIC's completion network on parts of four photos, judged on parts that it never saw.

    python -m benches.learn [--steps 500]        about nine minutes on two cores

It writes ``benches/results/learning.json`` (the loss, and PSNR in the held-out holes, step by step) and
``benches/results/learning.jpg``: truth, input, the hole in the mean colour of what is known, the untrained and the
trained network.

The published network, batch and schedule take weeks. Here the network, its loss and its optimiser are the published
ones, in their first phase; images have 64 x 64 pixels, eight at a time. The weights that are judged are a running mean
over the last steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is run as a script

from inpaint_kernels.models import GLCIC
from inpaint_kernels.models.random_masks import box_masks, random_boxes, shrink_boxes
from inpaint_kernels.models.training import Batch, GLCICTraining

from benches import harness

RESULTS = Path(__file__).parent / "results"
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
"""Of scikit-image: NASA, public domain; Stefan van der Walt, CC0; Rachel Michetti, CC0; SpaceX, public domain."""
HEIGHT = 192
"""Of the photos, before they are cut."""
SIDE, WINDOW, SHRINK, BATCH = 64, 32, 4, 8
DECAY = 0.97
"""Of the running mean of the weights."""
EVERY = 10
"""Steps between two points of the curve of losses; five times as many between two of PSNR."""


@dataclass
class Curve:
    """What was found.

    Attributes:
        psnr: of the held-out holes in dB: filled with the mean of what is known, by the untrained network, and by the
            trained one after so many steps.
        losses: by name, means over ten steps each.
    """

    psnr: dict[str, float] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)


def photos() -> list[Tensor]:
    """[3, HEIGHT, W] each, RGB in [0, 1]."""
    result = []
    for name in PHOTOS:
        path = metadata.distribution("scikit-image").locate_file(f"skimage/data/{name}")
        image = Image.open(str(path)).convert("RGB")
        width = round(image.width * HEIGHT / image.height)
        pixels = np.asarray(image.resize((width, HEIGHT), Image.Resampling.LANCZOS))
        result.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255)
    return result


def held_out(pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Images and holes that are not trained on: the right end of each photo, from top to bottom."""
    images = torch.stack([p[:, top : top + SIDE, -SIDE:] for p in pictures for top in range(0, HEIGHT, SIDE)])
    generator = torch.Generator().manual_seed(1)
    boxes = random_boxes(len(images), SIDE, WINDOW, generator=generator)
    return images, box_masks(shrink_boxes(boxes, SHRINK, generator=generator), SIDE)


def batches(pictures: list[Tensor], steps: int, seed: int = 0) -> Iterator[Batch]:
    """Random parts of the photos left of what is held out, half of them mirrored, with one window for all."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        images = torch.stack([_random_part(pictures, generator) for _ in range(BATCH)])
        boxes = random_boxes(1, SIDE, WINDOW, generator=generator)
        yield Batch(images, box_masks(shrink_boxes(boxes, SHRINK, generator=generator), SIDE), boxes)


def _random_part(pictures: list[Tensor], generator: torch.Generator) -> Tensor:
    picture = pictures[int(torch.randint(len(pictures), (), generator=generator))][..., :-SIDE]
    top, left = (int(torch.randint(size - SIDE + 1, (), generator=generator)) for size in picture.shape[1:])
    part = picture[:, top : top + SIDE, left : left + SIDE]
    return part.flip(2) if torch.rand((), generator=generator) < 0.5 else part


def hole_psnr(filled: Tensor, truth: Tensor, hole: Tensor) -> float:
    """Mean over images of the PSNR in their holes, in dB."""
    errors = ((filled - truth).square() * hole).sum((1, 2, 3)) / (3 * hole.sum((1, 2, 3)))
    return float((-10 * errors.log10()).mean())


def mean_fill(image: Tensor, hole: Tensor) -> Tensor:
    """The hole in the mean colour of what is known."""
    mean = image.masked_fill(hole, 0).sum((2, 3), keepdim=True) / (~hole).sum((2, 3), keepdim=True)
    return torch.where(hole, mean, image)


def fill(model: nn.Module, image: Tensor, hole: Tensor) -> Tensor:
    """What the network makes of images."""
    with torch.no_grad():
        completed: Tensor = model.eval()(image, hole).completed
    return completed


def learn(
    steps: int, seed: int = 0, report: Callable[[int, dict[str, float]], None] = lambda step, losses: None
) -> tuple[nn.Module, nn.Module, Curve]:
    """Train.

    Args:
        steps: their number.
        seed: of weights, parts and holes.
        report: called after every step.

    Returns:
        The untrained network, the trained one, and its way there.
    """
    pictures = photos()
    images, holes = held_out(pictures)
    torch.manual_seed(seed)
    model = GLCIC("otenim")
    untrained = copy.deepcopy(model)
    system = GLCICTraining(model, image_size=SIDE, box_size=WINDOW, seed=seed)
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    curve = Curve()
    curve.psnr["mean fill"] = hole_psnr(mean_fill(images, holes), images, holes)
    curve.psnr["untrained"] = hole_psnr(fill(untrained, images, holes), images, holes)
    recent: list[dict[str, float]] = []
    for step, batch in enumerate(batches(pictures, steps, seed), start=1):
        recent.append({name: float(loss) for name, loss in system.step(batch).items()})
        mean.update_parameters(model)
        report(step, recent[-1])
        if step % EVERY == 0:
            for name in recent[0]:
                curve.losses.setdefault(name, []).append(sum(one[name] for one in recent) / EVERY)
            recent.clear()
        if step % (5 * EVERY) == 0 or step == steps:
            curve.psnr[f"{step} steps"] = hole_psnr(fill(mean.module, images, holes), images, holes)
    return untrained, mean.module, curve


def draw(untrained: nn.Module, trained: nn.Module) -> NDArray[np.uint8]:
    """Held-out images in columns; from top to bottom: truth, input, mean, untrained, trained. Enlarged twice."""
    images, holes = held_out(photos())
    chosen = slice(None, None, 2)
    images, holes = images[chosen], holes[chosen]
    rows = [
        images,
        images.masked_fill(holes, 1),
        mean_fill(images, holes),
        fill(untrained, images, holes),
        fill(trained, images, holes),
    ]
    sheet = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    sheet = F.interpolate(sheet[None], scale_factor=2, mode="nearest")[0]
    return (sheet.permute(1, 2, 0) * 255).round().byte().numpy()


def main() -> None:
    """Train and write the files, see this module's docstring."""
    parser = argparse.ArgumentParser(description="Does GLCIC learn to fill holes?")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=arguments.steps)

        def report(step: int, losses: dict[str, float]) -> None:
            progress.update(task, completed=step, description=f"step {step}, mean square error {losses['mse']:.4f}")

        untrained, trained, curve = learn(arguments.steps, report=report)
    for name, psnr in curve.psnr.items():
        print(f"{name:12} {psnr:6.2f} dB in the held-out holes")
    facts: dict[str, Any] = {"steps": arguments.steps, "points every": EVERY, "provenance": harness.provenance()}
    rounded = {name: [round(value, 5) for value in values] for name, values in curve.losses.items()}
    curve = Curve({name: round(value, 3) for name, value in curve.psnr.items()}, rounded)
    (RESULTS / "learning.json").write_text(json.dumps({**facts, **asdict(curve)}, indent=1) + "\n", encoding="utf-8")
    Image.fromarray(draw(untrained, trained)).save(RESULTS / "learning.jpg", quality=85)


if __name__ == "__main__":
    main()
