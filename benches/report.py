"""Turns benchmark JSON into tables and a plot.

    python benches/report.py                      all tables, as Markdown
    python benches/report.py --update README.md   the README's tables, between marker lines in that file
    python benches/report.py --plot times.png     seconds over number of keys

Reads ``benches/results/*.json`` as pytest-benchmark wrote them (``--benchmark-json``); of a case that several files
hold, the newest race counts. Public ports run in both memory layouts: the better figure of each kind is shown. Ratios
are medians over the rounds of one race. Convolutions are summed over the network that they are layers of.

The GPU tables are made of ``results/gpu_evidence.json`` (evidence.py) and of the runs in ``results/<gpu>/`` (gpu.py): a
figure that was measured on a GPU is shown only where such a run is committed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
GPU_BEGIN, GPU_END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
HOG_BEGIN, HOG_END = "<!-- hog: begin -->", "<!-- hog: end -->"
ACCELERATE_BEGIN, ACCELERATE_END = "<!-- accelerate: begin -->", "<!-- accelerate: end -->"
MODELS_BEGIN, MODELS_END = "<!-- models: begin -->", "<!-- models: end -->"
PHOTOS_BEGIN, PHOTOS_END = "<!-- photos: begin -->", "<!-- photos: end -->"
NOT_YET = "not yet"
OURS, NAIVE, LAYOUT = "ours", "naive", " channels_last"
EAGER, COMPILED = "eager", "torch.compile"
PORTABLE = "portable"
OWN = (OURS, PORTABLE, NAIVE, "naive compiled")
YARDSTICK = "GEMMs alone"
SUMMARY_OP, SUMMARY_FAMILY = "contextual_attention", "peaked"
COHERENT_OP = "coherent_semantic_attention"
ACCELERATE, PUBLISHED = "accelerate", "published"
MODELS, HOLE_ONLY = "models", "ours, hole only"
PHOTO, WHOLE_MAPS, STRIPS, HOLE_ALONE = "photo", "whole maps", "strips of 128 MiB", "the hole alone"
HOG, SKIMAGE, OPENCV, COPY = "hog", "scikit-image", "OpenCV 4", "copy of the bytes"
# Bytes and dense operations per second that the vendor states for an H200: what a floor is made of before one was
# measured. A tf32 or bf16 product runs on the matrix units.
H200_DATASHEET: dict[str, Any] = {
    "copy_bytes_per_second": 4.8e12,
    "flops_per_second": {"float32": 67e12, "tf32": 494e12, "bfloat16": 989e12},
}


@dataclass(frozen=True)
class Entry:
    """One provider in one race."""

    provider: str
    wall: Sequence[float]
    cpu: Sequence[float]
    peak_mib: float | None
    facts: dict[str, Any]

    @property
    def wall_median(self) -> float:
        return statistics.median(self.wall)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu)


@dataclass(frozen=True)
class Contender:
    """A provider as it is shown: its entries in one race, one per memory layout."""

    name: str
    entries: Sequence[Entry]

    @property
    def wall(self) -> float:
        return min(entry.wall_median for entry in self.entries)

    @property
    def cpu(self) -> float:
        return min(entry.cpu_median for entry in self.entries)

    @property
    def peak_mib(self) -> float | None:
        peaks = [entry.peak_mib for entry in self.entries if entry.peak_mib is not None]
        return min(peaks) if peaks else None

    @property
    def is_port(self) -> bool:
        return self.name not in OWN and not self.name.startswith(YARDSTICK)

    def times_slower_than(self, other: Contender) -> float:
        """Median over the rounds; the better layout of each."""
        quicker = min(other.entries, key=lambda entry: entry.wall_median)
        return min(
            statistics.median(mine / theirs for mine, theirs in zip(entry.wall, quicker.wall, strict=True))
            for entry in self.entries
        )


Races = dict[str, dict[str, Contender]]


def load(paths: Iterable[Path]) -> Races:
    """Contenders by race ("op, case") and name, from pytest-benchmark's JSON files."""
    races: Races = {}
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    races_only = [document for document in documents if "benchmarks" in document]
    for document in sorted(races_only, key=lambda document: document["datetime"]):
        entries: dict[str, dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
        for benchmark in document["benchmarks"]:
            info = benchmark["extra_info"]
            if info.get("figure") == "seconds":
                wall, cpu = benchmark["stats"]["data"], info["cpu_seconds"]
                entry = Entry(info["provider"], wall, cpu, info["peak_extra_mib"], info)
                entries[f"{info['op']}, {info['case']}"][entry.provider.removesuffix(LAYOUT)].append(entry)
        for case, providers in entries.items():
            races[case] = {name: Contender(name, layouts) for name, layouts in providers.items()}
    return races


# Tables --------------------------------------------------------------------------------------------------------------


def full_tables(races: Races) -> str:
    """One table per race; those of a network's layers in one table."""
    parts = []
    for layers in networks(races):
        parts += [f"### {_network_title(layers)}", "", _layer_table(layers), ""]
    for case, contenders in races.items():
        if _is_layer(contenders):
            continue
        facts = _facts(contenders)
        ours = contenders.get(OURS)
        rows = [
            (
                contender.name,
                _seconds(contender.wall),
                _seconds(contender.cpu),
                _mebibytes(contender.peak_mib),
                _largest_error(contender),
                "" if ours is None or contender is ours else f"{contender.times_slower_than(ours):.2f}x",
            )
            for contender in sorted(contenders.values(), key=lambda contender: contender.wall)
        ]
        noise = "" if facts["noise"] is None else f"; noise {facts['noise']:.0%}"
        parts += [
            f"### {case}",
            "",
            f"{_size(facts)}{noise}.",
            "",
            _table(("provider", "wall", "CPU", "extra memory", "error", "time / ours"), rows),
            "",
        ]
    return "\n".join([*parts, provenance_line(races)])


def _size(facts: dict[str, Any]) -> str:
    if facts["op"] == HOG:
        return f"{facts['batch']} x {facts['size']} x {facts['size']} pixels, {facts['channels']} channels"
    if facts["op"] == ACCELERATE:
        return f"{facts['size']} x {facts['size']} pixels"
    return f"{facts['keys']:,} keys, {facts['queries']:,} queries, {facts['channels']} channels"


def summary(races: Races) -> str:
    """The tables for the README: attention, and the convolutions of whole networks."""
    layers = {case: contenders for case, contenders in races.items() if _is_layer(contenders)}
    attention = {
        case: contenders for case, contenders in races.items() if _facts(contenders)["op"] in (SUMMARY_OP, COHERENT_OP)
    }
    parts = [_attention_summary(attention)] if attention or not layers else []
    return "\n\n".join([*parts, _network_summary(layers)] if layers else parts)


def _attention_summary(races: Races) -> str:
    """The larger cases, and the comparison that comes out worst for us."""
    chosen = [contenders for contenders in races.values() if OURS in contenders and _is_shown(_facts(contenders))]
    chosen.sort(
        key=lambda contenders: (
            _facts(contenders)["op"] == COHERENT_OP,
            _facts(contenders)["keys"],
            _facts(contenders)["direction"],
        )
    )
    header = (
        "contextual attention, and CSA's",
        "naive PyTorch",
        "best public port",
        "ours",
        "speed-up over them",
        "extra memory of the three",
    )
    rows = [*(_summary_row(contenders) for contenders in chosen), _worst_row(races)]
    return "\n".join([_table(header, rows), "", provenance_line(races)])


def _is_shown(facts: dict[str, Any]) -> bool:
    if facts["op"] == COHERENT_OP:
        return bool(facts["direction"] == "forward")
    return bool(facts["family"] == SUMMARY_FAMILY and facts["keys"] >= 4096)


def _summary_row(contenders: dict[str, Contender]) -> tuple[str, ...]:
    ours, naive, port = contenders[OURS], contenders.get(NAIVE), _best_port(contenders)
    rivals = [rival for rival in (naive, port) if rival is not None]
    speed_ups = [f"{rival.times_slower_than(ours):.1f}x" for rival in rivals]
    memory = " / ".join(_mebibytes(contender.peak_mib) for contender in (*rivals, ours))
    return (
        _title(_facts(contenders)),
        "not run" if naive is None else _seconds(naive.wall),
        "not run" if port is None else _seconds(port.wall),
        f"**{_seconds(ours.wall)}**",
        " / ".join(speed_ups) or "-",
        memory,
    )


def _worst_row(races: Races) -> tuple[str, ...]:
    """Where another implementation comes closest to ours, or is ahead of it."""
    comparisons = [
        (contender.times_slower_than(contenders[OURS]), contender, contenders)
        for contenders in races.values()
        if OURS in contenders
        for contender in contenders.values()
        if contender.name != OURS
    ]
    if not comparisons:
        raise ValueError("results: expected a race of ours against something")
    ratio, rival, contenders = min(comparisons, key=lambda comparison: comparison[0])
    ours = contenders[OURS]
    memory = f"{_mebibytes(rival.peak_mib)} / {_mebibytes(ours.peak_mib)}"
    verdict = "where we lose" if ratio < 1 else "where we gain least"
    what = f"{verdict}: {_title(_facts(contenders))} against {rival.name} ({_seconds(rival.wall)})"
    return (what, "", "", f"**{_seconds(ours.wall)}**", f"{ratio:.2g}x", memory)


def _best_port(contenders: dict[str, Contender]) -> Contender | None:
    return min((c for c in contenders.values() if c.is_port), key=lambda contender: contender.wall, default=None)


def _title(facts: dict[str, Any]) -> str:
    side = facts.get("pixels_per_position", 4) * facts["size"]
    if facts["op"] == COHERENT_OP:
        return f"CSA, {side}x{side} image, {facts['size'] ** 2:,} positions, {facts['direction']}"
    restricted = "" if facts["queries"] == facts["keys"] else f", {facts['queries']:,} queries"
    return f"{side}x{side} image, {facts['keys']:,} keys{restricted}, {facts['direction']}"


def provenance_line(races: Races) -> str:
    """What machine, software and commit the figures come from."""
    sources = [_facts(contenders)["provenance"] for contenders in races.values()]
    lines = {
        f"{s['cpu']}, {s['threads']} threads, torch {s['torch']}, commit {s['commit']}, {s['date'].split()[0]}"
        for s in sources
    }
    precisions = " and ".join(sorted({_facts(contenders).get("precision", "float32") for contenders in races.values()}))
    return "Measured on " + "; ".join(sorted(lines)) + f". Median wall times of interleaved rounds, {precisions}."


def _facts(contenders: dict[str, Contender]) -> dict[str, Any]:
    return next(iter(contenders.values())).entries[0].facts


def _largest_error(contender: Contender) -> str:
    errors = [entry.facts["largest_relative_error"] for entry in contender.entries]
    return "-" if None in errors else f"{max(errors):.0e}"


def _seconds(value: float) -> str:
    if value < 1e-3:
        return f"{value * 1e6:.3g} us"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def _mebibytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1024:.2f} GiB" if value >= 1024 else f"{value:.0f} MiB"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---"] + ["--:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def update_between_markers(document: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """``document`` with ``text`` between its two marker lines."""
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise ValueError(f"document: expected one line {begin!r} and after it one line {end!r}")
    head, rest = document.split(begin)
    tail = rest.split(end)[1]
    return f"{head}{begin}\n{text}\n{end}{tail}"


# Networks ------------------------------------------------------------------------------------------------------------

Layers = Sequence[dict[str, Contender]]


def networks(races: Races) -> list[Layers]:
    """The races of convolutions by network, size and precision, each a list of the network's distinct layers."""
    found: dict[tuple[str, int, str], list[dict[str, Contender]]] = defaultdict(list)
    for contenders in races.values():
        if _is_layer(contenders):
            facts = _facts(contenders)
            found[facts["network"], facts["size"], facts["precision"]].append(contenders)
    return [layers for _, layers in sorted(found.items(), key=lambda item: item[0][:2])]


def network_seconds(layers: Layers, provider: str) -> float | None:
    """Seconds for all convolutions in the better layout, the same one throughout; None if a layer has no time."""
    sums = [_seconds_in_layout(layers, provider + layout) for layout in ("", LAYOUT)]
    return min((total for total in sums if total is not None), default=None)


def _seconds_in_layout(layers: Layers, provider: str) -> float | None:
    entries = [_entry(contenders, provider) for contenders in layers]
    known = [entry for entry in entries if entry is not None]
    if len(known) < len(entries):
        return None
    return sum(entry.facts.get("count", 1) * entry.wall_median for entry in known)


def _entry(contenders: dict[str, Contender], provider: str) -> Entry | None:
    """The entry of a provider whose name has the layout in it."""
    entries = (entry for contender in contenders.values() for entry in contender.entries)
    return next((entry for entry in entries if entry.provider == provider), None)


def _is_layer(contenders: dict[str, Contender]) -> bool:
    return "network" in _facts(contenders)


def _network_title(layers: Layers) -> str:
    facts = _facts(layers[0])
    present, number = sum(_facts(contenders)["count"] for contenders in layers), facts["convolutions"]
    convolutions = f"{number} convolutions" if present == number else f"{present} of {number} convolutions"
    return f"{facts['network']}, {convolutions}, {facts['size']}x{facts['size']}, {facts['precision']}"


def _network_summary(races: Races) -> str:
    """A row per network, size and precision: sums over its convolutions, and the layer that comes out worst for us."""
    header = (
        "convolutions of a network",
        "published code",
        "the same by torch.compile",
        "ours",
        "speed-up over them",
        "on the worst layer over torch.compile",
        "most extra memory of the three",
    )
    rows = [_network_row(layers) for layers in networks(races)]
    note = (
        "Each distinct layer raced alone, times how often the network has it; all layers in NCHW or all in "
        "channels_last, whichever is the quicker of the two for each column."
    )
    return "\n".join([_table(header, rows), "", f"{provenance_line(races)} {note}"])


def _network_row(layers: Layers) -> tuple[str, ...]:
    ours = network_seconds(layers, OURS)
    rivals = [network_seconds(layers, name) for name in (EAGER, COMPILED)]
    return (
        _network_title(layers),
        *("-" if rival is None else _seconds(rival) for rival in rivals),
        "-" if ours is None else f"**{_seconds(ours)}**",
        " / ".join(_ratio(rival, ours) for rival in rivals),
        _worst_layer(layers),
        " / ".join(_mebibytes(_most_memory(layers, name)) for name in (EAGER, COMPILED, OURS)),
    )


def _worst_layer(layers: Layers) -> str:
    ratios = [
        (contenders[COMPILED].times_slower_than(contenders[OURS]), _facts(contenders)["layer"])
        for contenders in layers
        if COMPILED in contenders and OURS in contenders
    ]
    return "{:.2f}x ({})".format(*min(ratios)) if ratios else "-"


def _most_memory(layers: Layers, provider: str) -> float | None:
    peaks = [contenders[provider].peak_mib for contenders in layers if provider in contenders]
    return max((peak for peak in peaks if peak is not None), default=None)


def _layer_table(layers: Layers, ceilings: dict[str, Any] | None = None) -> str:
    """A row per distinct layer, and their sum; a column per provider and layout."""
    entries = (entry for contenders in layers for contender in contenders.values() for entry in contender.entries)
    providers = list(dict.fromkeys(entry.provider for entry in entries))
    header = (
        "layer",
        "times",
        *providers,
        f"{EAGER} / ours",
        f"{COMPILED} / ours",
        f"extra memory {EAGER} / {COMPILED} / ours",
        "error of ours",
        "noise",
        *(() if ceilings is None else ("ours / floor",)),
    )
    rows = [_layer_row(contenders, providers, ceilings) for contenders in layers]
    return _table(header, [*rows, _layer_sum(layers, providers, ceilings)])


def _layer_row(
    contenders: dict[str, Contender], providers: Sequence[str], ceilings: dict[str, Any] | None
) -> tuple[str, ...]:
    facts, ours = _facts(contenders), contenders.get(OURS)
    entries = [_entry(contenders, provider) for provider in providers]
    rivals = [contenders.get(name) for name in (EAGER, COMPILED)]
    return (
        facts["layer"],
        str(facts["count"]),
        *("-" if entry is None else _seconds(entry.wall_median) for entry in entries),
        *("-" if ours is None or rival is None else f"{rival.times_slower_than(ours):.2f}x" for rival in rivals),
        " / ".join("-" if contender is None else _mebibytes(contender.peak_mib) for contender in (*rivals, ours)),
        "-" if ours is None else _largest_error(ours),
        "" if facts["noise"] is None else f"{facts['noise']:.0%}",
        *(() if ceilings is None else (_ratio(None if ours is None else ours.wall, floor(facts, ceilings)),)),
    )


def _layer_sum(layers: Layers, providers: Sequence[str], ceilings: dict[str, Any] | None) -> tuple[str, ...]:
    sums = [_seconds_in_layout(layers, provider) for provider in providers]
    ours, *rivals = (network_seconds(layers, name) for name in (OURS, EAGER, COMPILED))
    facts = [_facts(contenders) for contenders in layers]
    least = None if ceilings is None else sum(of_layer["count"] * floor(of_layer, ceilings) for of_layer in facts)
    return (
        "all",
        str(sum(of_layer["count"] for of_layer in facts)),
        *("-" if seconds is None else _seconds(seconds) for seconds in sums),
        *(_ratio(rival, ours) for rival in rivals),
        *("", "", ""),
        *(() if least is None else (_ratio(ours, least),)),
    )


def _ratio(seconds: float | None, other: float | None) -> str:
    return "-" if seconds is None or other is None else f"{seconds / other:.2f}x"


# Histograms of oriented gradients ------------------------------------------------------------------------------------


def hog_summary(races: Races) -> str:
    """The README's table of hog: a row per case, quickest cases first; empty without a race."""
    hogs = {case: contenders for case, contenders in races.items() if _facts(contenders)["op"] == HOG}
    if not hogs:
        return ""
    header = (
        "hog",
        SKIMAGE,
        "PyTorch, eager",
        "the same by torch.compile",
        f"{OPENCV}, equal geometry",
        "portable",
        "ours",
        f"speed-up over {SKIMAGE} / torch.compile / OpenCV",
        "copy of the bytes",
    )
    chosen = sorted(hogs.values(), key=lambda contenders: contenders[OURS].wall)
    versions = sorted({_facts(contenders)["opencv"] for contenders in chosen} - {None})
    opencv = f"{OPENCV} is {' and '.join(versions)}" if versions else f"{OPENCV} was not installed"
    note = (
        f"9 orientations, cells of 8x8 pixels, blocks of 3x3. {opencv}: its HOGDescriptor computes other numbers, and "
        "has no picture of them. A copy of the bytes reads and writes as much as the images and their features have."
    )
    return f"{_table(header, map(_hog_row, chosen))}\n\n{provenance_line(hogs)} {note}"


def _hog_row(contenders: dict[str, Contender]) -> tuple[str, ...]:
    ours = contenders[OURS]
    rivals = [contenders.get(name) for name in (SKIMAGE, EAGER, COMPILED, OPENCV, PORTABLE)]
    ratios = (contenders.get(name) for name in (SKIMAGE, COMPILED, OPENCV))
    copy = contenders.get(COPY)
    return (
        _hog_title(_facts(contenders)),
        *("-" if rival is None else _seconds(rival.wall) for rival in rivals),
        f"**{_seconds(ours.wall)}**",
        " / ".join("-" if rival is None else f"{rival.times_slower_than(ours):.3g}x" for rival in ratios),
        "-" if copy is None else _seconds(copy.wall),
    )


def _hog_title(facts: dict[str, Any]) -> str:
    return facts["case"].replace("-", " ")


# Whole models --------------------------------------------------------------------------------------------------------


def acceleration_summary(races: Races) -> str:
    """The README's table of whole public models before and after ``accelerate``; empty without a race."""
    models = {case: c for case, c in races.items() if _facts(c)["op"] == ACCELERATE and OURS in c}
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
    chosen = sorted(models.values(), key=lambda contenders: (_facts(contenders)["direction"], contenders[OURS].wall))
    return f"{_table(header, map(_acceleration_row, chosen))}\n\n{provenance_line(models)} Batch 1, random weights."


def _acceleration_row(contenders: dict[str, Contender]) -> tuple[str, ...]:
    facts, ours, published = _facts(contenders), contenders[OURS], contenders[PUBLISHED]
    layouts = {entry.provider == PUBLISHED: entry for entry in published.entries}
    plain, last = layouts.get(True), layouts.get(False)
    seconds = ["-" if entry is None else _seconds(entry.wall_median) for entry in (plain, last)]
    ratios = [_layout_ratio(entry, ours) for entry in (plain, last)]
    memory = (plain or published.entries[0]).peak_mib
    return (
        f"{facts['repository']} (`{facts['model']}`), {facts['size']}x{facts['size']}, {facts['direction']}",
        *seconds,
        f"**{_seconds(ours.wall)}**",
        " / ".join(ratios),
        f"{_mebibytes(memory)}, {_mebibytes(ours.peak_mib)}",
    )


def _layout_ratio(entry: Entry | None, ours: Contender) -> str:
    if entry is None:
        return "-"
    pairs = zip(entry.wall, ours.entries[0].wall, strict=True)
    return f"{statistics.median(theirs / own for theirs, own in pairs):.2f}x"


def model_summary(races: Races) -> str:
    """The README's table of our models beside the public networks with the same weights; empty without a race."""
    models = {case: c for case, c in races.items() if _facts(c)["op"] == MODELS and OURS in c}
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
    chosen = sorted(models.values(), key=lambda c: (_facts(c)["model"], _facts(c)["batch"], _facts(c)["height"]))
    note = "Random weights, the hole a square in the middle."
    return f"{_table(header, map(_model_row, chosen))}\n\n{provenance_line(models)} {note}"


def _model_row(contenders: dict[str, Contender]) -> tuple[str, ...]:
    facts, ours, published = _facts(contenders), contenders[OURS], contenders[PUBLISHED]
    layouts = {entry.provider == PUBLISHED: entry for entry in published.entries}
    plain, last = layouts.get(True), layouts.get(False)
    hole = contenders.get(HOLE_ONLY)
    batch = f"{facts['batch']} x " if facts["batch"] > 1 else ""
    memory = [(plain or published.entries[0]).peak_mib, ours.peak_mib, *([hole.peak_mib] if hole else [])]
    return (
        f"`{facts['model']}`, {batch}{facts['height']}x{facts['width']}, {facts['hole']}x{facts['hole']}",
        *("-" if entry is None else _seconds(entry.wall_median) for entry in (plain, last)),
        f"**{_seconds(ours.wall)}**",
        " / ".join(_layout_ratio(entry, ours) for entry in (plain, last)),
        f"**{_seconds(hole.wall)}**" if hole else "-",
        ", ".join(map(_mebibytes, memory)),
    )


def photo_summary(races: Races) -> str:
    """The README's table of large photos: whole, in strips, and for a hole alone; empty without a race."""
    photos = {case: c for case, c in races.items() if _facts(c)["op"] == PHOTO}
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
    chosen = sorted(photos.values(), key=lambda c: (_facts(c)["model"], _facts(c)["height"]))
    note = (
        "Random weights; estimates are those of strips. Public networks whose tensors alone take more than 5 GiB were "
        "not run; what these take is computed."
    )
    return f"{_table(header, map(_photo_row, chosen))}\n\n{provenance_line(photos)} {note}"


def _photo_row(contenders: dict[str, Contender]) -> tuple[str, ...]:
    facts = _facts(contenders)
    ways = [contenders.get(name) for name in (PUBLISHED, WHOLE_MAPS, STRIPS, HOLE_ALONE)]
    memory = ["-" if way is None else _mebibytes(way.peak_mib) for way in ways]
    least = facts.get("published_least_mib")
    if least is not None:
        memory[0] = f"more than {least / 1024:.0f} GiB"
    estimates = (_mebibytes(facts["estimated_mib"].get(part)) for part in ("whole", "hole"))
    return (
        f"`{facts['model']}`, {facts['height']}x{facts['width']}, {facts['hole']}x{facts['hole']}",
        *("-" if way is None else _seconds(way.wall) for way in ways),
        ", ".join(memory),
        ", ".join(estimates),
    )


# GPU -----------------------------------------------------------------------------------------------------------------


def gpu_summary(results: Path = RESULTS) -> str:
    """The README's GPU part: times over their floors, and what is known of every kernel."""
    evidence = json.loads((results / "gpu_evidence.json").read_text(encoding="utf-8"))
    runs = sorted(path.parent for path in results.glob("*/run.json"))
    times = [_gpu_times(evidence["cases"], run) for run in runs] or [_gpu_times(evidence["cases"], None)]
    return "\n\n".join([*times, _kernel_table(evidence)])


def _gpu_times(cases: Sequence[dict[str, Any]], run: Path | None) -> str:
    """Ours at every GPU size: the floor, and what the run in a folder measured."""
    races = {} if run is None else load(sorted(run.glob("*.json")))
    ceilings = _ceilings(run) or H200_DATASHEET
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for facts in cases:
        groups[_gpu_group(facts)].append(facts)
    rows = []
    for title, group in groups.items():
        least = sum(facts.get("count", 1) * floor(facts, ceilings) for facts in group)
        predicted = sum(facts.get("count", 1) * prediction(facts, ceilings) for facts in group)
        raced = [races.get(f"{facts['op']}, {facts['case']}", {}) for facts in group]
        wall, measured = network_seconds(raced, OURS), (NOT_YET, "", "")
        if wall is not None:
            measured = (f"**{_seconds(wall)}**", f"{wall / least:.1f}x", _mebibytes(_most_memory(raced, OURS)))
        rows.append((title, _seconds(least), _seconds(predicted), *measured))
    header = ("ours on a GPU", "floor", "predicted", "measured", "measured / floor", "extra memory")
    if run is None or not races:
        source = "Not measured on a GPU yet; `make gpu` does. Floors are those of an H200's datasheet"
    else:
        source = f"{_gpu_provenance(run)} Floors are those of its measured ceilings"
    note = (
        f"{source}: the longer of operations over rate and bytes over bandwidth, nothing computed or moved twice. "
        "Predicted: what our tiles multiply over the rate plus what they move over the bandwidth, without launches, "
        "which decide the small cases."
    )
    return f"{_table(header, rows)}\n\n{note}"


def _gpu_group(facts: dict[str, Any]) -> str:
    """The row that a case belongs to: one of its own, or that of all layers of its network."""
    if "network" not in facts:
        return _gpu_title(facts)
    side, number = facts["size"], facts["convolutions"]
    return f"{facts['network']}, {number} convolutions, {side}x{side} image, {facts['precision']}"


def floor(facts: dict[str, Any], ceilings: dict[str, Any]) -> float:
    """Seconds that the hardware needs at least for a case."""
    arithmetic = facts["flops"] / _flops_per_second(facts, ceilings)
    return max(arithmetic, facts["bytes"] / ceilings["copy_bytes_per_second"])


def prediction(facts: dict[str, Any], ceilings: dict[str, Any]) -> float:
    """Seconds that our products and passes take one after the other if each runs at its ceiling."""
    return (
        facts["our_flops"] / _flops_per_second(facts, ceilings) + facts["our_bytes"] / ceilings["copy_bytes_per_second"]
    )


def _flops_per_second(facts: dict[str, Any], ceilings: dict[str, Any]) -> float:
    """In the precision of the maps or, where they differ, of their products."""
    rate: float = ceilings["flops_per_second"][facts.get("products", facts["precision"])]
    return rate


def _ceilings(run: Path | None) -> dict[str, Any] | None:
    path = None if run is None else run / "ceilings.json"
    return None if path is None or not path.is_file() else json.loads(path.read_text(encoding="utf-8"))


def _gpu_title(facts: dict[str, Any]) -> str:
    if facts["op"] == HOG:
        return f"hog, {_hog_title(facts)}"
    batch = "" if facts["batch"] == 1 else f", batch {facts['batch']}"
    return f"{_title(facts)}{batch}, {facts['precision']}"


def _kernel_table(evidence: dict[str, Any]) -> str:
    """A row per kernel: the worst of its template's instances."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in evidence["kernels"]:
        groups[entry["kernel"].partition("<")[0]].append(entry)
    architectures = sorted({arch for entry in evidence["kernels"] for arch in entry["architectures"]})
    header = (
        f"CUDA kernel, as nvcc {evidence['nvcc']} compiles it",
        "instances",
        f"registers ({' / '.join(architectures)})",
        "shared memory",
        "spills, stack",
        "emulated cases",
        "worst error",
        "measured on",
    )
    return _table(header, [_kernel_row(name, entries, architectures) for name, entries in sorted(groups.items())])


def _kernel_row(name: str, entries: Sequence[dict[str, Any]], architectures: Sequence[str]) -> tuple[str, ...]:
    usages = [usage for entry in entries for usage in entry["architectures"].values()]
    registers = (max(entry["architectures"][arch]["registers"] for entry in entries) for arch in architectures)
    static = max(usage["static_shared_bytes"] for usage in usages)
    local = max(usage["spill_bytes"] + usage["stack_bytes"] for usage in usages)
    emulated = [entry["emulated_cases"] for entry in entries if entry["emulated_cases"] != NOT_YET]
    errors = [entry["worst_error"] for entry in entries if entry["worst_error"] != NOT_YET]
    devices = {device for entry in entries if entry["measured_on"] != NOT_YET for device in entry["measured_on"]}
    return (
        f"`{name}`",
        str(len(entries)),
        " / ".join(map(str, registers)),
        _bytes(static + max(entry["dynamic_shared_bytes"] for entry in entries)),
        _bytes(local),
        str(min(emulated)) if len(emulated) == len(entries) else NOT_YET,
        f"{max(errors):.0e}" if len(errors) == len(entries) else NOT_YET,
        ", ".join(sorted(devices)) or NOT_YET,
    )


def _bytes(count: int) -> str:
    return "0" if count == 0 else f"{count} B" if count < 1024 else f"{count / 1024:.1f} KiB"


def gpu_page(run: Path) -> str:
    """One page on one run of ``make gpu``: its parts, tests, ceilings and times."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    parts = [(part["part"], part["result"], f"{part['seconds']:.0f} s", part["detail"]) for part in record["parts"]]
    sections = [
        f"# {record['provenance']['gpu']}",
        _gpu_provenance(run),
        _table(("part", "result", "took", "last words"), parts),
        _test_lines(record["tests"]),
    ]
    ceilings = _ceilings(run)
    if ceilings is not None:
        rates = [f"{rate / 1e12:.0f} TFLOP/s in {name} products" for name, rate in ceilings["flops_per_second"].items()]
        sections.append(
            f"Ceilings: {ceilings['copy_bytes_per_second'] / 1e12:.2f} TB/s copied, {', '.join(rates)}. A floor is the "
            "longer of a case's operations over that rate and its bytes over that bandwidth."
        )
    races = load(sorted(run.glob("*.json")))
    for layers in networks(races):
        sections += [f"## {_network_title(layers)}", _layer_table(layers, ceilings)]
    alone = [contenders for contenders in races.values() if not _is_layer(contenders)]
    rows = [row for contenders in alone for row in _gpu_rows(contenders, ceilings)]
    if rows:
        header = ("case", "provider", "time", "time / ours", "time / floor", "extra memory", "error", "noise")
        sections.append(_table(header, rows))
    failures = [failure for path in sorted(run.glob("*.json")) for failure in _failures(path)]
    sections += [f"- not timed: {failure}" for failure in failures]
    return "\n\n".join(sections) + "\n"


def _gpu_provenance(run: Path) -> str:
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))["provenance"]
    return (
        f"Measured on {facts['gpu']}, driver for CUDA {facts['driver_cuda']}, torch {facts['torch']}, Triton "
        f"{facts['triton']}, commit {facts['commit']}, {facts['date'].split()[0]}."
    )


def _test_lines(tests: dict[str, Any]) -> str:
    counts = f"Tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped."
    shown = list(tests["failures"].items())[:10]
    return "\n".join([counts, *(f"- `{test}`: {reason}" for test, reason in shown)])


def _gpu_rows(contenders: dict[str, Contender], ceilings: dict[str, Any] | None) -> list[tuple[str, ...]]:
    facts, ours = _facts(contenders), contenders.get(OURS)
    return [
        (
            _gpu_title(facts),
            contender.name,
            _seconds(contender.wall),
            "" if ours is None or contender is ours else f"{contender.times_slower_than(ours):.2f}x",
            "" if ceilings is None else f"{contender.wall / floor(facts, ceilings):.1f}x",
            _mebibytes(contender.peak_mib),
            _largest_error(contender),
            "" if facts["noise"] is None else f"{facts['noise']:.0%}",
        )
        for contender in sorted(contenders.values(), key=lambda contender: contender.wall)
    ]


def _failures(path: Path) -> list[str]:
    failures = json.loads(path.read_text(encoding="utf-8")).get("failures", ())
    return [f"{failure['case']}, {failure['provider']}: {failure['reason']}" for failure in failures]


# Plot ----------------------------------------------------------------------------------------------------------------


def plot(races: Races, path: Path) -> None:
    """Seconds over number of keys, forward over all queries; a line per provider."""
    import matplotlib.pyplot as plt

    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for contenders in races.values():
        facts = _facts(contenders)
        drawn = (facts["op"], facts.get("family"), facts.get("direction")) == (SUMMARY_OP, SUMMARY_FAMILY, "forward")
        if drawn and facts["queries"] == facts["keys"]:
            for contender in contenders.values():
                points[contender.name].append((facts["keys"], contender.wall))
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, line in points.items():
        axes.plot(*zip(*sorted(line), strict=True), marker="o", label=name, linewidth=2.5 if name == OURS else 1.2)
    axes.set(xscale="log", yscale="log", xlabel="keys", ylabel="seconds", title="contextual attention, forward")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Tables and a plot from benchmark results.")
    parser.add_argument("results", nargs="*", type=Path, help="JSON files (default: benches/results/*.json)")
    parser.add_argument("--update", type=Path, metavar="FILE", help="write the tables between the markers in FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times into FILE")
    options = parser.parse_args(arguments)
    paths = options.results or sorted(RESULTS.glob("*.json"))
    races = load(paths)
    if not races:
        sys.exit(f"no results in {', '.join(map(str, paths)) or RESULTS}; `make bench` makes some")
    if options.update:
        document = update_between_markers(options.update.read_text(encoding="utf-8"), summary(races))
        for table, begin, end in (
            (hog_summary(races), HOG_BEGIN, HOG_END),
            (acceleration_summary(races), ACCELERATE_BEGIN, ACCELERATE_END),
            (model_summary(races), MODELS_BEGIN, MODELS_END),
            (photo_summary(races), PHOTOS_BEGIN, PHOTOS_END),
            (gpu_summary(), GPU_BEGIN, GPU_END),
        ):
            if begin in document:
                document = update_between_markers(document, table, begin, end)
        options.update.write_text(document, encoding="utf-8")
    if options.plot:
        plot(races, options.plot)
    if not (options.update or options.plot):
        print(full_tables(races))


if __name__ == "__main__":
    main()
