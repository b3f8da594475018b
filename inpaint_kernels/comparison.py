"""A quick, honest comparison of an op's backends on this machine: correct first, then time, then memory.

Every backend runs in a process of its own, so that its peak memory is its own; the processes take turns, so that a
busy moment of the machine hits all of them. A backend whose result is not that of the float64 reference is not timed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

import inpaint_kernels

OPS = ("contextual_attention",)
PROVIDERS = {"naive PyTorch (dense)": "reference", "portable": "portable", "native kernel": "cpu"}
TOLERANCE = 3e-5
"""Largest difference to the float64 reference, relative to its largest magnitude."""
LARGEST_SIZE = 128
"""Above it the dense op needs several gigabytes."""

_SHORTEST_ROUND = 0.05
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Case:
    """Self-attention over one smooth feature map ``[1, channels, size, size]`` with a square hole in its middle."""

    size: int = 64
    channels: int = 128
    threads: int = 0  # 0: as many as torch takes by default

    def __post_init__(self) -> None:
        if self.size % 2 or not 16 <= self.size <= LARGEST_SIZE:
            raise ValueError(f"size: expected an even number from 16 to {LARGEST_SIZE}, got {self.size}")
        if self.channels < 1:
            raise ValueError(f"channels: expected at least 1, got {self.channels}")

    def run(self, backend: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        """The op on this case's inputs, ready to be called."""
        features = self._features().to(dtype)
        mask = torch.zeros(1, 1, self.size, self.size, dtype=dtype)
        hole = slice(self.size * 3 // 8, self.size * 5 // 8)
        mask[..., hole, hole] = 1
        return lambda: inpaint_kernels.contextual_attention(features, features, mask, backend=backend)

    def _features(self) -> torch.Tensor:
        noise = torch.randn(1, self.channels, self.size + 4, self.size + 4, generator=torch.Generator().manual_seed(0))
        return torch.nn.functional.avg_pool2d(noise, 5, stride=1).mul(5).relu()


@dataclass(frozen=True)
class Measurement:
    """One row of the comparison; ``problem`` says why a row has no figures, ``wrong`` that its result is not right."""

    name: str
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_bytes: int | None = None
    difference: float | None = None
    problem: str | None = None
    wrong: bool = False


@dataclass(frozen=True)
class _FirstCall:
    output: NDArray[Any]
    peak_bytes: int | None


@dataclass(frozen=True)
class _Timing:
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class _Failure:
    message: str


def compare(case: Case, *, rounds: int = 5, progress: Progress | None = None) -> list[Measurement]:
    """Measure every provider on ``case``.

    Args:
        case: the inputs.
        rounds: how often the providers take turns; the median counts.
        progress: called with the share of the work that is done (0 to 1) and the name of the stage.

    Returns:
        One measurement per provider, in the order of :data:`PROVIDERS`.
    """
    report = progress or (lambda fraction, stage: None)
    report(0.0, "float64 reference")
    judge = _Worker(case, "reference", torch.float64)
    expected = judge.first_call()
    judge.stop()
    if isinstance(expected, _Failure):
        raise RuntimeError(f"the float64 reference failed: {expected.message}")
    workers: dict[str, _Worker] = {}
    rows: dict[str, Measurement] = {}
    try:
        for index, (name, backend) in enumerate(PROVIDERS.items()):
            report(0.2 + 0.4 * index / len(PROVIDERS), f"checking {name}")
            workers[name] = _Worker(case, backend, torch.float32)
            rows[name] = _checked(name, workers[name].first_call(), expected.output)
        correct = {name: workers[name] for name, row in rows.items() if row.problem is None}
        timings: dict[str, list[_Timing]] = {name: [] for name in correct}
        for turn in range(rounds):
            for name, worker in correct.items():
                report(0.6 + 0.4 * turn / rounds, f"timing {name}")
                timings[name].append(worker.time_one_round())
    finally:
        for worker in workers.values():
            worker.stop()
    report(1.0, "done")
    return [_with_timings(row, timings.get(name, [])) for name, row in rows.items()]


def comparison_table(case: Case, measurements: Sequence[Measurement]) -> Table:
    """The measurements as a table for the terminal."""
    keys = (case.size // 2) ** 2
    table = Table(
        title=f"contextual_attention, {case.channels} x {case.size} x {case.size} features ({keys:,} keys), float32",
        caption="\n".join(
            [
                "each in its own process; difference: largest, to the float64 reference, over its largest magnitude",
                *(f"{row.name}: {escape(row.problem)}" for row in measurements if row.problem),
            ]
        ),
        caption_justify="left",
    )
    table.add_column("provider")
    for heading in ("time", "CPU time", "peak memory", "max difference", "faster", "smaller"):
        table.add_column(heading, justify="right")
    naive = measurements[0]
    for row in measurements:
        if row.problem:
            table.add_row(row.name, "[red]wrong[/red]" if row.wrong else "cannot run")
            continue
        table.add_row(
            row.name,
            _milliseconds(row.seconds),
            _milliseconds(row.cpu_seconds),
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f} MiB",
            f"{row.difference:.1e}",
            _ratio(naive.seconds, row.seconds),
            _ratio(naive.peak_bytes, row.peak_bytes),
        )
    return table


def _checked(name: str, first: _FirstCall | _Failure, expected: NDArray[Any]) -> Measurement:
    if isinstance(first, _Failure):
        return Measurement(name, problem=first.message)
    difference = float(np.abs(first.output - expected).max() / np.abs(expected).max())
    if not difference <= TOLERANCE:  # also when it is NaN
        return Measurement(name, problem=f"differs by {difference:.1e}, at most {TOLERANCE:.0e} is allowed", wrong=True)
    return Measurement(name, peak_bytes=first.peak_bytes, difference=difference)


def _with_timings(row: Measurement, timings: Sequence[_Timing]) -> Measurement:
    if not timings:
        return row
    return Measurement(
        row.name,
        statistics.median(timing.seconds for timing in timings),
        statistics.median(timing.cpu_seconds for timing in timings),
        row.peak_bytes,
        row.difference,
    )


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"


def _ratio(naive: float | None, ours: float | None) -> str:
    return f"{naive / ours:.1f}x" if naive and ours else "-"


# --- the processes -------------------------------------------------------------------------------------------------


class _Worker:
    """A process that holds one provider and runs it when told to."""

    def __init__(self, case: Case, backend: str, dtype: torch.dtype) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, case, backend, dtype), daemon=True)
        self._process.start()
        theirs.close()

    def first_call(self) -> _FirstCall | _Failure:
        try:
            answer: _FirstCall | _Failure = self._connection.recv()
        except EOFError:
            self._process.join()
            return _Failure(f"its process ended with exit code {self._process.exitcode}")
        return answer

    def time_one_round(self) -> _Timing:
        self._connection.send("run")
        answer: _Timing = self._connection.recv()
        return answer

    def stop(self) -> None:
        self._connection.close()  # the process ends when it finds its pipe closed
        self._process.join()


def _serve(connection: Connection, case: Case, backend: str, dtype: torch.dtype) -> None:
    """Body of a worker: answer with the first call's output and peak memory, then time a round per message."""
    try:
        if case.threads:
            torch.set_num_threads(case.threads)
        Case(size=16, channels=case.channels).run(backend, dtype)()  # one-time initialisation is not the op's memory
        run = case.run(backend, dtype)
        output, peak = _with_peak_memory(run)
        connection.send(_FirstCall(output.to(torch.float64).numpy(), peak))
    except Exception as error:  # whatever it is, the process that compares has to hear of it
        connection.send(_Failure((str(error) or type(error).__name__).splitlines()[0]))
        return
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        connection.send(_time(run))


def _time(run: Callable[[], torch.Tensor]) -> _Timing:
    calls = 0
    started, cpu_started = time.perf_counter(), time.process_time()
    while calls == 0 or time.perf_counter() - started < _SHORTEST_ROUND:
        run()
        calls += 1
    return _Timing((time.perf_counter() - started) / calls, (time.process_time() - cpu_started) / calls)


def _with_peak_memory(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int | None]:
    """Run once; also how many bytes the process grew at its peak (None where the system does not tell)."""
    _reset_peak()
    before = _resident_bytes()
    output = run()
    peak = _peak_bytes()
    return output, None if before is None or peak is None else max(0, peak - before)


def _reset_peak() -> None:
    """Linux counts peaks from here on; where that is not allowed the peak since the process began has to do."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _resident_bytes() -> int | None:
    if platform.system() == "Linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return _peak_bytes()


def _peak_bytes() -> int | None:
    if platform.system() == "Linux":
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    if platform.system() == "Darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
