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
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this file is run as a script

from benches import model_report
from benches.race_results import (
    LAYOUT,
    NAIVE,
    OURS,
    PORTABLE,
    Contender,
    Entry,
    Races,
    facts_of,
    load,
    mebibytes,
    provenance_line,
    seconds,
    table,
)

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
GPU_BEGIN, GPU_END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
HOG_BEGIN, HOG_END = "<!-- hog: begin -->", "<!-- hog: end -->"
NOT_YET = "not yet"
NO_TIME = "no time was left"
EAGER, COMPILED = "eager", "torch.compile"
SUMMARY_OP, SUMMARY_FAMILY = "contextual_attention", "peaked"
COHERENT_OP = "coherent_semantic_attention"
HOG, SKIMAGE, OPENCV, COPY = "hog", "scikit-image", "OpenCV 4", "copy of the bytes"
# Bytes and dense operations per second that the vendor states for an H200: what a floor is made of before one was
# measured. A tf32 or bf16 product runs on the matrix units.
H200_DATASHEET: dict[str, Any] = {
    "copy_bytes_per_second": 4.8e12,
    "flops_per_second": {"float32": 67e12, "tf32": 494e12, "bfloat16": 989e12},
}


# Tables --------------------------------------------------------------------------------------------------------------


def full_tables(races: Races) -> str:
    """One table per race; those of a network's layers in one table."""
    parts = []
    for layers in networks(races):
        parts += [f"### {_network_title(layers)}", "", _layer_table(layers), ""]
    for case, contenders in races.items():
        if _is_layer(contenders):
            continue
        facts = facts_of(contenders)
        ours = contenders.get(OURS)
        rows = [
            (
                contender.name,
                seconds(contender.wall),
                seconds(contender.cpu),
                mebibytes(contender.peak_mib),
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
            table(("provider", "wall", "CPU", "extra memory", "error", "time / ours"), rows),
            "",
        ]
    return "\n".join([*parts, provenance_line(races)])


def _size(facts: dict[str, Any]) -> str:
    if facts["op"] == HOG:
        return f"{facts['batch']} x {facts['size']} x {facts['size']} pixels, {facts['channels']} channels"
    if "keys" in facts:
        return f"{facts['keys']:,} keys, {facts['queries']:,} queries, {facts['channels']} channels"
    height, width = (facts.get(side, facts.get("size")) for side in ("height", "width"))
    return f"{facts.get('batch', 1)} x {height} x {width} pixels"


def summary(races: Races) -> str:
    """The tables for the README: attention, and the convolutions of whole networks."""
    layers = {case: contenders for case, contenders in races.items() if _is_layer(contenders)}
    attention = {
        case: contenders
        for case, contenders in races.items()
        if facts_of(contenders)["op"] in (SUMMARY_OP, COHERENT_OP)
    }
    parts = [_attention_summary(attention)] if attention or not layers else []
    return "\n\n".join([*parts, _network_summary(layers)] if layers else parts)


def _attention_summary(races: Races) -> str:
    """The larger cases, and the comparison that comes out worst for us."""
    chosen = [contenders for contenders in races.values() if OURS in contenders and _is_shown(facts_of(contenders))]
    chosen.sort(
        key=lambda contenders: (
            facts_of(contenders)["op"] == COHERENT_OP,
            facts_of(contenders)["keys"],
            facts_of(contenders)["direction"],
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
    return "\n".join([table(header, rows), "", provenance_line(races)])


def _is_shown(facts: dict[str, Any]) -> bool:
    if facts["op"] == COHERENT_OP:
        return bool(facts["direction"] == "forward")
    return bool(facts["family"] == SUMMARY_FAMILY and facts["keys"] >= 4096)


def _summary_row(contenders: dict[str, Contender]) -> tuple[str, ...]:
    ours, naive, port = contenders[OURS], contenders.get(NAIVE), _best_port(contenders)
    rivals = [rival for rival in (naive, port) if rival is not None]
    speed_ups = [f"{rival.times_slower_than(ours):.1f}x" for rival in rivals]
    memory = " / ".join(mebibytes(contender.peak_mib) for contender in (*rivals, ours))
    return (
        _title(facts_of(contenders)),
        "not run" if naive is None else seconds(naive.wall),
        "not run" if port is None else seconds(port.wall),
        f"**{seconds(ours.wall)}**",
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
    memory = f"{mebibytes(rival.peak_mib)} / {mebibytes(ours.peak_mib)}"
    verdict = "where we lose" if ratio < 1 else "where we gain least"
    what = f"{verdict}: {_title(facts_of(contenders))} against {rival.name} ({seconds(rival.wall)})"
    return (what, "", "", f"**{seconds(ours.wall)}**", f"{ratio:.2g}x", memory)


def _best_port(contenders: dict[str, Contender]) -> Contender | None:
    return min((c for c in contenders.values() if c.is_port), key=lambda contender: contender.wall, default=None)


def _title(facts: dict[str, Any]) -> str:
    if "flops" not in facts and facts["op"] in ("photo", "training"):
        return facts["case"].removesuffix(f"-{facts['precision']}")  # the network, its sizes
    side = facts.get("pixels_per_position", 4) * facts["size"]
    if facts["op"] == COHERENT_OP:
        return f"CSA, {side}x{side} image, {facts['size'] ** 2:,} positions, {facts['direction']}"
    restricted = "" if facts["queries"] == facts["keys"] else f", {facts['queries']:,} queries"
    return f"{side}x{side} image, {facts['keys']:,} keys{restricted}, {facts['direction']}"


def _largest_error(contender: Contender) -> str:
    errors = [entry.facts["largest_relative_error"] for entry in contender.entries]
    return "-" if None in errors else f"{max(errors):.0e}"


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
            facts = facts_of(contenders)
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
    return "network" in facts_of(contenders)


def _network_title(layers: Layers) -> str:
    facts = facts_of(layers[0])
    present, number = sum(facts_of(contenders)["count"] for contenders in layers), facts["convolutions"]
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
    return "\n".join([table(header, rows), "", f"{provenance_line(races)} {note}"])


def _network_row(layers: Layers) -> tuple[str, ...]:
    ours = network_seconds(layers, OURS)
    rivals = [network_seconds(layers, name) for name in (EAGER, COMPILED)]
    return (
        _network_title(layers),
        *("-" if rival is None else seconds(rival) for rival in rivals),
        "-" if ours is None else f"**{seconds(ours)}**",
        " / ".join(_ratio(rival, ours) for rival in rivals),
        _worst_layer(layers),
        " / ".join(mebibytes(_most_memory(layers, name)) for name in (EAGER, COMPILED, OURS)),
    )


def _worst_layer(layers: Layers) -> str:
    ratios = [
        (contenders[COMPILED].times_slower_than(contenders[OURS]), facts_of(contenders)["layer"])
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
    return table(header, [*rows, _layer_sum(layers, providers, ceilings)])


def _layer_row(
    contenders: dict[str, Contender], providers: Sequence[str], ceilings: dict[str, Any] | None
) -> tuple[str, ...]:
    facts, ours = facts_of(contenders), contenders.get(OURS)
    entries = [_entry(contenders, provider) for provider in providers]
    rivals = [contenders.get(name) for name in (EAGER, COMPILED)]
    return (
        facts["layer"],
        str(facts["count"]),
        *("-" if entry is None else seconds(entry.wall_median) for entry in entries),
        *("-" if ours is None or rival is None else f"{rival.times_slower_than(ours):.2f}x" for rival in rivals),
        " / ".join("-" if contender is None else mebibytes(contender.peak_mib) for contender in (*rivals, ours)),
        "-" if ours is None else _largest_error(ours),
        "" if facts["noise"] is None else f"{facts['noise']:.0%}",
        *(() if ceilings is None else (_ratio(None if ours is None else ours.wall, floor(facts, ceilings)),)),
    )


def _layer_sum(layers: Layers, providers: Sequence[str], ceilings: dict[str, Any] | None) -> tuple[str, ...]:
    sums = [_seconds_in_layout(layers, provider) for provider in providers]
    ours, *rivals = (network_seconds(layers, name) for name in (OURS, EAGER, COMPILED))
    facts = [facts_of(contenders) for contenders in layers]
    least = None if ceilings is None else sum(of_layer["count"] * floor(of_layer, ceilings) for of_layer in facts)
    return (
        "all",
        str(sum(of_layer["count"] for of_layer in facts)),
        *("-" if total is None else seconds(total) for total in sums),
        *(_ratio(rival, ours) for rival in rivals),
        *("", "", ""),
        *(() if least is None else (_ratio(ours, least),)),
    )


def _ratio(time: float | None, other: float | None) -> str:
    return "-" if time is None or other is None else f"{time / other:.2f}x"


# Histograms of oriented gradients ------------------------------------------------------------------------------------


def hog_summary(races: Races) -> str:
    """The README's table of hog: a row per case, quickest cases first; empty without a race."""
    hogs = {case: contenders for case, contenders in races.items() if facts_of(contenders)["op"] == HOG}
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
    versions = sorted({facts_of(contenders)["opencv"] for contenders in chosen} - {None})
    opencv = f"{OPENCV} is {' and '.join(versions)}" if versions else f"{OPENCV} was not installed"
    note = (
        f"9 orientations, cells of 8x8 pixels, blocks of 3x3. {opencv}: its HOGDescriptor computes other numbers, and "
        "has no picture of them. A copy of the bytes reads and writes as much as the images and their features have."
    )
    return f"{table(header, map(_hog_row, chosen))}\n\n{provenance_line(hogs)} {note}"


def _hog_row(contenders: dict[str, Contender]) -> tuple[str, ...]:
    ours = contenders[OURS]
    rivals = [contenders.get(name) for name in (SKIMAGE, EAGER, COMPILED, OPENCV, PORTABLE)]
    ratios = (contenders.get(name) for name in (SKIMAGE, COMPILED, OPENCV))
    copy = contenders.get(COPY)
    return (
        _hog_title(facts_of(contenders)),
        *("-" if rival is None else seconds(rival.wall) for rival in rivals),
        f"**{seconds(ours.wall)}**",
        " / ".join("-" if rival is None else f"{rival.times_slower_than(ours):.3g}x" for rival in ratios),
        "-" if copy is None else seconds(copy.wall),
    )


def _hog_title(facts: dict[str, Any]) -> str:
    return facts["case"].replace("-", " ")


# GPU -----------------------------------------------------------------------------------------------------------------


def gpu_summary(results: Path = RESULTS) -> str:
    """The README's GPU part: times over their floors, and what is known of every kernel."""
    evidence = json.loads((results / "gpu_evidence.json").read_text(encoding="utf-8"))
    runs = sorted(path.parent for path in results.glob("*/run.json"))
    times = [part for run in runs for part in (_gpu_times(evidence["cases"], run), *_gpu_networks(run))]
    return "\n\n".join([*(times or [_gpu_times(evidence["cases"], None)]), _kernel_table(evidence)])


def _gpu_networks(run: Path) -> list[str]:
    """What became of a run's tests, and what it found of whole networks, and of the convolutions of some."""
    races = load(sorted(run.glob("*.json")))
    layers = {case: contenders for case, contenders in races.items() if _is_layer(contenders)}
    tests = json.loads((run / "run.json").read_text(encoding="utf-8")).get("tests")
    return [
        *([_test_counts(tests)] if tests else []),
        *([_network_summary(layers)] if layers else []),
        *model_report.gpu_summary(races),
    ]


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
        if wall is None and races:
            continue  # the run's time was over
        if wall is not None:
            measured = (f"**{seconds(wall)}**", f"{wall / least:.1f}x", mebibytes(_most_memory(raced, OURS)))
        rows.append((title, seconds(least), seconds(predicted), *measured))
    header = ("ours on a GPU", "floor", "predicted", "measured", "measured / floor", "extra memory")
    if run is None or not races:
        source = "Not measured on a GPU yet; `make gpu` does. Floors are those of an H200's datasheet"
    else:
        source = (
            f"{_gpu_provenance(run)} What it had no time for is left out. Floors are those of its measured ceilings"
        )
    note = (
        f"{source}: the longer of operations over rate and bytes over bandwidth, nothing computed or moved twice. "
        "Predicted: what our tiles multiply over the rate plus what they move over the bandwidth, without launches, "
        "which decide the small cases."
    )
    return f"{table(header, rows)}\n\n{note}"


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
    return table(header, [_kernel_row(name, entries, architectures) for name, entries in sorted(groups.items())])


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
        table(("part", "result", "took", "last words"), parts),
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
        sections.append(table(header, rows))
    failures = [failure for path in sorted(run.glob("*.json")) for failure in _failures(path)]
    sections += [f"- not timed: {failure}" for failure in _told(failures)]
    return "\n\n".join(sections) + "\n"


def _gpu_provenance(run: Path) -> str:
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))["provenance"]
    return (
        f"Measured on {facts['gpu']}, driver for CUDA {facts['driver_cuda']}, torch {facts['torch']}, Triton "
        f"{facts['triton']}, commit {facts['commit']}, {facts['date'].split()[0]}."
    )


def _test_counts(tests: dict[str, Any]) -> str:
    return f"Tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped."


def _test_lines(tests: dict[str, Any]) -> str:
    shown = list(tests["failures"].items())[:10]
    return "\n".join([_test_counts(tests), *(f"- `{test}`: {reason}" for test, reason in shown)])


def _gpu_rows(contenders: dict[str, Contender], ceilings: dict[str, Any] | None) -> list[tuple[str, ...]]:
    facts, ours = facts_of(contenders), contenders.get(OURS)
    return [
        (
            _gpu_title(facts),
            contender.name,
            seconds(contender.wall),
            "" if ours is None or contender is ours else f"{contender.times_slower_than(ours):.2f}x",
            "" if ceilings is None or "flops" not in facts else f"{contender.wall / floor(facts, ceilings):.1f}x",
            mebibytes(contender.peak_mib),
            _largest_error(contender),
            "" if facts["noise"] is None else f"{facts['noise']:.0%}",
        )
        for contender in sorted(contenders.values(), key=lambda contender: contender.wall)
    ]


def _failures(path: Path) -> list[dict[str, str]]:
    return list(json.loads(path.read_text(encoding="utf-8")).get("failures", ()))


def _told(failures: Sequence[Mapping[str, str]]) -> list[str]:
    """Each with its reason; those for which there was no time are counted."""
    told = [f"{x['case']}, {x['provider']}: {x['reason']}" for x in failures if x["reason"] != NO_TIME]
    late = len(failures) - len(told)
    return [*told, f"{late} cases: {NO_TIME}"] if late else told


# Plot ----------------------------------------------------------------------------------------------------------------


def plot(races: Races, path: Path) -> None:
    """Seconds over number of keys, forward over all queries; a line per provider."""
    import matplotlib.pyplot as plt

    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for contenders in races.values():
        facts = facts_of(contenders)
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
            (model_report.acceleration_summary(races), model_report.ACCELERATE_BEGIN, model_report.ACCELERATE_END),
            (model_report.model_summary(races), model_report.MODELS_BEGIN, model_report.MODELS_END),
            (model_report.photo_summary(races), model_report.PHOTOS_BEGIN, model_report.PHOTOS_END),
            (model_report.training_summary(races), model_report.TRAINING_BEGIN, model_report.TRAINING_END),
            (model_report.learning_summary(RESULTS), model_report.LEARNING_BEGIN, model_report.LEARNING_END),
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
