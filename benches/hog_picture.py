"""Draws the README's picture of hog: a photo, the histograms of its gradients, and what they cost.

    python benches/hog_picture.py benches/results/hog.png

The bars are the committed times (``results/hog*.json``), on a logarithmic axis. The photo comes with scikit-image.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is run as a script

from benches import report
from benches.race_results import OURS, Races, load, seconds
from inpaint_kernels import hog

CASE = "512x512-rgb-uint8"
PICTURED = f"{CASE}-visualize"
# Of the two cases, which providers of them are drawn, with their names in the picture.
BARS = (
    (report.SKIMAGE, "scikit-image"),
    (report.EAGER, "PyTorch, eager"),
    (report.COMPILED, "torch.compile"),
    (report.OPENCV, "OpenCV 4, equal geometry"),
    (OURS, "ours"),
)
INK, MUTED, ACCENT, BACKGROUND = "#1f2933", "#9aa5b1", "#0b7285", "#ffffff"
WIDTH, HEIGHT, DPI = 12.0, 3.9, 100
BRIGHTEST = 0.2
"""Share of the picture's largest value that is drawn white: few cells have it."""


def load_photo() -> Any:
    """Eileen Collins, by NASA, in the public domain: [512, 512, 3] uint8."""
    from skimage import data

    return data.astronaut()


def draw(races: Races, path: Path) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    photo = load_photo()
    picture = hog(torch.from_numpy(photo).permute(2, 0, 1), visualize=True)[1].numpy()
    mpl.rcParams.update({"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "ytick.color": INK})
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(WIDTH, HEIGHT), width_ratios=(1, 1, 1.05), layout="constrained", facecolor=BACKGROUND
    )
    left.imshow(photo)
    left.set_title("photo, 512 x 512", fontsize=10)
    middle.imshow(picture, cmap="gray", vmax=BRIGHTEST * picture.max(), interpolation="antialiased")
    middle.set_title("inpaint_kernels.hog(photo, visualize=True)", fontsize=10)
    for axes in (left, middle):
        axes.axis("off")
    draw_bars(right, races)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw_bars(axes: Any, races: Races) -> None:
    """A bar for every provider that was timed, the slowest on top."""
    contenders = races[f"{report.HOG}, {CASE}"]
    pictured = races[f"{report.HOG}, {PICTURED}"]
    timed = [(name, contenders[provider]) for provider, name in BARS if provider in contenders]
    timed += [
        ("scikit-image, with picture", pictured[report.SKIMAGE]),
        ("ours, with picture", pictured[OURS]),
    ]
    timed.sort(key=lambda bar: bar[1].wall)
    for place, (_, contender) in enumerate(timed):
        is_ours = contender.name == OURS
        axes.barh(place, contender.wall * 1e3, color=ACCENT if is_ours else MUTED, height=0.62)
        axes.text(
            contender.wall * 1e3 * 1.12,
            place,
            seconds(contender.wall),
            va="center",
            weight="bold" if is_ours else "normal",
            color=ACCENT if is_ours else INK,
        )
    axes.set_yticks(range(len(timed)), [name for name, _ in timed])
    longest = max(contender.wall for _, contender in timed) * 1e3
    axes.set(xscale="log", xlim=(0.03, 6 * longest))
    ratios = [races_of[report.SKIMAGE].times_slower_than(races_of[OURS]) for races_of in (contenders, pictured)]
    axes.set_title("{:.0f}x scikit-image's speed, {:.0f}x with picture".format(*ratios), fontsize=10, loc="right")
    axes.set_xticks([])
    axes.minorticks_off()
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    facts = next(iter(contenders.values())).entries[0].facts["provenance"]
    axes.set_xlabel(f"logarithmic; {facts['cpu']}, {facts['threads']} threads", fontsize=8, color=MUTED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="PNG file to write")
    draw(load(sorted(report.RESULTS.glob("hog*.json"))), parser.parse_args().picture)


if __name__ == "__main__":
    main()
