"""The README's tables of whole models: after ``accelerate``, ours, large photos, training steps; what was learnt."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from benches.race_results import OURS, Contender, Entry, Races, facts_of, mebibytes, provenance_line, seconds, table

ACCELERATE_BEGIN, ACCELERATE_END = "<!-- accelerate: begin -->", "<!-- accelerate: end -->"
MODELS_BEGIN, MODELS_END = "<!-- models: begin -->", "<!-- models: end -->"
PHOTOS_BEGIN, PHOTOS_END = "<!-- photos: begin -->", "<!-- photos: end -->"
TRAINING_BEGIN, TRAINING_END = "<!-- training: begin -->", "<!-- training: end -->"
LEARNING_BEGIN, LEARNING_END = "<!-- learning: begin -->", "<!-- learning: end -->"
ACCELERATE, PUBLISHED = "accelerate", "published"
MODELS, HOLE_ONLY = "models", "ours, hole only"
PHOTO, WHOLE_MAPS, STRIPS, HOLE_ALONE = "photo", "whole maps", "strips of 128 MiB", "the hole alone"
TRAINING = "training"


def acceleration_summary(races: Races) -> str:
    """The README's table of whole public models before and after ``accelerate``; empty without a race."""
    models = {case: c for case, c in races.items() if facts_of(c)["op"] == ACCELERATE and OURS in c}
    if not models:
        return ""
    header = (
        "generator, unmodified",
        "as published",
        "the same in channels_last",
        "after the one line",
        "speed-up over them",
        "extra memory, before and after",
    )
    chosen = sorted(models.values(), key=lambda contenders: (facts_of(contenders)["direction"], contenders[OURS].wall))
    return f"{table(header, map(_acceleration_row, chosen))}\n\n{provenance_line(models)} Batch 1, random weights."


def _acceleration_row(contenders: dict[str, Contender]) -> tuple[str, ...]:
    facts = facts_of(contenders)
    title = f"{facts['repository']} (`{facts['model']}`), {facts['size']}x{facts['size']}, {facts['direction']}"
    return (title, *_beside_published(contenders))


def _beside_published(contenders: dict[str, Contender]) -> tuple[str, ...]:
    """Seconds of the public network in both layouts and of ours, the speed-ups, memory of the first and of ours."""
    ours, published = contenders[OURS], contenders[PUBLISHED]
    layouts = {entry.provider == PUBLISHED: entry for entry in published.entries}
    plain, last = layouts.get(True), layouts.get(False)
    return (
        *("-" if entry is None else seconds(entry.wall_median) for entry in (plain, last)),
        f"**{seconds(ours.wall)}**",
        " / ".join(_layout_ratio(entry, ours) for entry in (plain, last)),
        f"{mebibytes((plain or published.entries[0]).peak_mib)}, {mebibytes(ours.peak_mib)}",
    )


def _layout_ratio(entry: Entry | None, ours: Contender) -> str:
    if entry is None:
        return "-"
    pairs = zip(entry.wall, ours.entries[0].wall, strict=True)
    return f"{statistics.median(theirs / own for theirs, own in pairs):.2f}x"


def model_summary(races: Races) -> str:
    """The README's table of our models beside the public networks with the same weights; empty without a race."""
    models = {case: c for case, c in races.items() if facts_of(c)["op"] == MODELS and OURS in c}
    if not models:
        return ""
    header = (
        "model, photo, hole",
        "public network",
        "the same in channels_last",
        "ours",
        "speed-up over them",
        "ours, hole only",
        "extra memory: public, ours, hole only",
    )
    chosen = sorted(models.values(), key=lambda c: (facts_of(c)["model"], facts_of(c)["batch"], facts_of(c)["height"]))
    note = "Random weights, the hole a square in the middle."
    return f"{table(header, map(_model_row, chosen))}\n\n{provenance_line(models)} {note}"


def _model_row(contenders: dict[str, Contender]) -> tuple[str, ...]:
    facts, hole = facts_of(contenders), contenders.get(HOLE_ONLY)
    batch = f"{facts['batch']} x " if facts["batch"] > 1 else ""
    *times, memory = _beside_published(contenders)
    return (
        f"`{facts['model']}`, {batch}{facts['height']}x{facts['width']}, {facts['hole']}x{facts['hole']}",
        *times,
        f"**{seconds(hole.wall)}**" if hole else "-",
        f"{memory}, {mebibytes(hole.peak_mib)}" if hole else memory,
    )


def photo_summary(races: Races) -> str:
    """The README's table of large photos: whole, in strips, and for a hole alone; empty without a race."""
    photos = {case: c for case, c in races.items() if facts_of(c)["op"] == PHOTO}
    if not photos:
        return ""
    header = (
        "model, photo, hole",
        "public network",
        "ours, whole maps",
        "in strips",
        "the hole alone",
        "extra memory of the four",
        "estimated: whole, hole",
    )
    chosen = sorted(photos.values(), key=lambda c: (facts_of(c)["model"], facts_of(c)["height"]))
    note = (
        "Random weights; estimates are those of strips. Public networks whose tensors alone take more than 5 GiB were "
        "not run; what these take is computed."
    )
    return f"{table(header, map(_photo_row, chosen))}\n\n{provenance_line(photos)} {note}"


def _photo_row(contenders: dict[str, Contender]) -> tuple[str, ...]:
    facts = facts_of(contenders)
    ways = [contenders.get(name) for name in (PUBLISHED, WHOLE_MAPS, STRIPS, HOLE_ALONE)]
    memory = ["-" if way is None else mebibytes(way.peak_mib) for way in ways]
    least = facts.get("published_least_mib")
    if least is not None:
        memory[0] = f"more than {least / 1024:.0f} GiB"
    estimates = (mebibytes(facts["estimated_mib"].get(part)) for part in ("whole", "hole"))
    return (
        f"`{facts['model']}`, {facts['height']}x{facts['width']}, {facts['hole']}x{facts['hole']}",
        *("-" if way is None else seconds(way.wall) for way in ways),
        ", ".join(memory),
        ", ".join(estimates),
    )


def gpu_summary(races: Races) -> list[str]:
    """Tables of whole networks on a GPU: large photos, and training steps; none without a race."""
    of_op = {op: [c for c in races.values() if facts_of(c)["op"] == op] for op in (PHOTO, TRAINING)}
    photos = (
        "photo on a GPU, hole",
        "public network",
        "ours, whole maps",
        "in strips",
        "the hole alone",
        "extra memory",
    )
    steps = ("on a GPU, batch", *_BESIDE_PUBLISHED)
    tables = []
    if of_op[PHOTO]:
        tables.append(table(photos, (_gpu_photo_row(contenders) for contenders in of_op[PHOTO])))
    if of_op[TRAINING]:
        tables.append(table(steps, (_gpu_training_row(contenders) for contenders in of_op[TRAINING])))
    return tables


def _gpu_photo_row(contenders: dict[str, Contender]) -> tuple[str, ...]:
    facts = facts_of(contenders)
    ways = [contenders.get(name) for name in (PUBLISHED, WHOLE_MAPS, STRIPS, HOLE_ALONE)]
    return (
        f"`{facts['model']}`, {facts['height']}x{facts['width']}, hole {facts['hole']}, {facts['precision']}",
        *("-" if way is None else seconds(way.wall) for way in ways),
        ", ".join("-" if way is None else mebibytes(way.peak_mib) for way in ways),
    )


def _gpu_training_row(contenders: dict[str, Contender]) -> tuple[str, ...]:
    facts = facts_of(contenders)
    what = f"{facts['direction']}, `{facts['model']}`, {facts['batch']}, {facts['precision']}"
    return (what, *_beside_published(contenders))


_BESIDE_PUBLISHED = (
    "public network",
    "the same in channels_last",
    "ours",
    "speed-up over them",
    "extra memory: public, ours",
)


def training_summary(races: Races) -> str:
    """The README's table of a generator's training step beside the public networks'; empty without a race."""
    steps = {case: c for case, c in races.items() if facts_of(c)["op"] == TRAINING and OURS in c}
    if not steps:
        return ""
    header = ("generator, batch", *_BESIDE_PUBLISHED)
    chosen = sorted(steps.values(), key=lambda c: (facts_of(c)["model"], facts_of(c)["batch"]))
    note = "256x256; forward, L1 loss, gradients of all parameters; random weights."
    return f"{table(header, map(_training_row, chosen))}\n\n{provenance_line(steps)} {note}"


def _training_row(contenders: dict[str, Contender]) -> tuple[str, ...]:
    facts = facts_of(contenders)
    *times, memory = _beside_published(contenders)
    return (f"`{facts['model']}`, {facts['batch']}", *times, memory)


def learning_summary(results: Path) -> str:
    """What ``python -m benches.learn`` found; empty without its file."""
    path = results / "learning.json"
    if not path.is_file():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    psnr, losses = dict(found["psnr"]), found["losses"]["mse"]
    mean, untrained = (psnr.pop(name) for name in ("mean fill", "untrained"))
    last, value = list(psnr.items())[-1]
    return (
        f"In {last} the mean square error falls from {losses[0]:.4f} to {losses[-1]:.4f}, and the PSNR in holes of "
        f"parts that were never trained on rises from {untrained:.1f} dB to **{value:.1f} dB**; the mean colour of "
        f"what is known has {mean:.1f} dB."
    )
