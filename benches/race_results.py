"""Races as pytest-benchmark's JSON files hold them, and what every table of them needs."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS, PORTABLE, NAIVE, LAYOUT = "ours", "portable", "naive", " channels_last"
OWN = (OURS, PORTABLE, NAIVE, "naive compiled")
YARDSTICK = "GEMMs alone"


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


def provenance_line(races: Races) -> str:
    """What machine, software and commit the figures come from."""
    sources = [facts_of(contenders)["provenance"] for contenders in races.values()]
    lines = {
        f"{_processor(source)}, torch {source['torch']}, commit {source['commit']}, {source['date'].split()[0]}"
        for source in sources
    }
    precisions = " and ".join(
        sorted({facts_of(contenders).get("precision", "float32") for contenders in races.values()})
    )
    measured = f"Measured on {'; '.join(sorted(lines))}. Median wall times of interleaved rounds, {precisions}."
    return measured + _products(sources)


def _processor(source: dict[str, Any]) -> str:
    return source["gpu"] if "gpu" in source else f"{source['cpu']}, {source['threads']} threads"


def _products(sources: Sequence[dict[str, Any]]) -> str:
    """How quick the CPU was, where races tell."""
    rates = [source["matrix_gflops"] for source in sources if "matrix_gflops" in source and "gpu" not in source]
    if not rates:
        return ""
    least, most = min(rates), max(rates)
    return f" Torch's own matrix product made {least}{f' to {most}' if most > least else ''} GFLOP/s there."


def facts_of(contenders: dict[str, Contender]) -> dict[str, Any]:
    return next(iter(contenders.values())).entries[0].facts


def seconds(value: float) -> str:
    if value < 1e-3:
        return f"{value * 1e6:.3g} us"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def mebibytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1024:.2f} GiB" if value >= 1024 else f"{value:.0f} MiB"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---"] + ["--:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))
