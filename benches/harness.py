"""Fair timing of several implementations ("providers") of one computation.

What a race does, in this order:

1. *Gate.* Every provider's first result is compared with a float64 reference; a wrong provider is never timed.
2. *Memory.* That first call also yields the peak extra memory: growth of the resident set over its size before it.
   Free heap pages are returned first (``malloc_trim``), then Linux's high-water mark is reset
   (``/proc/self/clear_refs``). All in one process: a fresh one per provider would add its own start-up to the figure,
   and a fork after OpenMP threads have started is not safe. The output counts, the inputs do not. Linux only.
   On a GPU it is what torch's allocator held at most, over what it held before.
3. *Interleaved rounds.* All providers run once per round and the starting provider rotates, so that a busy moment of
   the machine hits all of them. Ratios are taken within a round. One provider (the quickest) runs twice per round;
   the difference between its two times is the noise that is reported. On a GPU the wall time is that between two
   events around the call, after something else has been written over the cache for longer than launches take: it is
   what the GPU needs, and the CPU time beside it is what the calls need that tell it what to do.

pytest-benchmark times one function after the other, which is the opposite of step 3. So the race takes the samples,
and each provider's benchmark hands them to ``benchmark.pedantic`` through a :class:`ReplayClock`; statistics, tables,
JSON and ``--benchmark-compare`` are pytest-benchmark's own. See the fixture ``race`` in conftest.py.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import gc
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

THREADS = 2
MIN_ROUNDS, MAX_ROUNDS = 3, 31
LEADS = 40  # of a GPU's own work before a call, each 256 MiB written, about 0.1 ms

Outputs = tuple[Tensor, ...]

FLOAT32, TF32, BFLOAT16 = "float32", "tf32", "bfloat16"
PRECISIONS = (BFLOAT16, TF32, FLOAT32)
"""Of a GPU's cases: float32 throughout, float32 whose products may use tf32, and bfloat16 maps."""


class WrongResultError(AssertionError):
    """A provider's result is not that of the reference, so there is nothing to time."""


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        name: how tables call it.
        run: compute the case once and return its outputs.
        expected: the float64 outputs that ``run`` must return; None for a yardstick that computes something else.
        select: the part of the outputs to compare with ``expected``; None: all of them.
        warm_up: called once before anything is measured (one-time initialisation, compilation).
        scale: factor on the measured seconds, for a provider that runs only a sample of its work.
        device: where it computes, "cpu" or "cuda".
    """

    name: str
    run: Callable[[], Outputs]
    expected: Callable[[], Outputs] | None
    select: Callable[[Outputs], Outputs] | None = None
    warm_up: Callable[[], object] | None = None
    scale: float = 1.0
    device: str = "cpu"


@dataclass
class Measurement:
    """What a race found out about one provider; seconds per round, in the order of the rounds."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak_extra_bytes: int | None = None
    error: float | None = None
    failure: Exception | None = None


class Case(Protocol):
    """What the fixture ``race`` needs to know of a case; cases are hashable and named by ``str``."""

    @property
    def baseline(self) -> str | None:
        """The provider to which ratios are taken, if there is one."""
        ...

    @property
    def tolerances(self) -> tuple[float, ...]:
        """Largest allowed difference of each output, relative to the largest magnitude of what is expected."""
        ...

    def provider(self, name: str) -> Provider:
        """The provider of that name, ready to run."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """What a report needs to know of the case."""
        ...


def relative_errors(outputs: Outputs, expected: Outputs) -> list[float]:
    """Largest absolute difference of each output over the largest magnitude expected; NaN if anything is NaN."""
    if len(outputs) != len(expected):
        raise ValueError(f"outputs: expected {len(expected)} tensors, got {len(outputs)}")
    return [
        ((out.double() - want.to(out.device).double()).abs().max() / want.double().abs().max().to(out.device)).item()
        for out, want in zip(outputs, expected, strict=True)
    ]


def run_race(
    providers: Sequence[Provider], tolerances: Sequence[float], *, seconds: float, rounds: int | None = None
) -> tuple[dict[str, Measurement], float | None]:
    """Gate, then time ``providers`` against each other.

    Args:
        providers: the field; names are unique.
        tolerances: see :attr:`Case.tolerances`.
        seconds: no further round begins after this time (but MIN_ROUNDS are run, and at most MAX_ROUNDS).
        rounds: their number, if it is not to follow from ``seconds``.

    Returns:
        The measurements by name, and the noise: median relative difference between two times of one provider in a
        round. A provider that failed or was wrong has its exception in ``failure`` and no times.
    """
    measurements = {provider.name: Measurement() for provider in providers}
    first_call_seconds: dict[str, float] = {}
    for provider in providers:
        measurement = measurements[provider.name]
        try:
            first_call_seconds[provider.name] = _first_call(provider, tolerances, measurement)
        except Exception as error:  # whatever it is, it belongs to this provider alone
            measurement.failure = error
    field = [provider for provider in providers if provider.name in first_call_seconds]
    if not field:
        return measurements, None
    quickest = min(field, key=lambda provider: first_call_seconds[provider.name])
    at_least, at_most = (MIN_ROUNDS, MAX_ROUNDS) if rounds is None else (rounds, rounds)
    again = Measurement()
    deadline = time.perf_counter() + seconds
    for turn in range(at_most):
        if turn >= at_least and time.perf_counter() > deadline:
            break
        start = turn % len(field)
        for provider in field[start:] + field[:start]:
            _time_once(provider, measurements[provider.name])
        _time_once(quickest, again)
    first = measurements[quickest.name].wall
    noise = statistics.median(abs(b - a) / min(a, b) for a, b in zip(first, again.wall, strict=True))
    return measurements, noise


def _first_call(provider: Provider, tolerances: Sequence[float], measurement: Measurement) -> float:
    """Gate the provider and take its peak memory; the seconds that its first call took."""
    if provider.warm_up is not None:
        provider.warm_up()
    elapsed = math.inf

    def timed_run() -> Outputs:
        nonlocal elapsed
        outputs, elapsed, _ = timed(provider.run, provider.device)
        return outputs

    peak_memory_of = with_peak_memory if provider.device == "cpu" else with_peak_gpu_memory
    outputs, measurement.peak_extra_bytes = peak_memory_of(timed_run)
    if provider.expected is None:
        return elapsed
    compared = outputs if provider.select is None else provider.select(outputs)
    errors = relative_errors(compared, provider.expected())
    measurement.error = max(errors)
    for error, tolerance in zip(errors, tolerances, strict=True):
        if not error <= tolerance:  # also when it is NaN
            raise WrongResultError(
                f"{provider.name}: not timed, its result is wrong: it differs from the float64 reference by "
                f"{error:.1e} of the largest magnitude, at most {tolerance:.0e} is allowed"
            )
    return elapsed


def _time_once(provider: Provider, measurement: Measurement) -> None:
    _, wall_seconds, cpu_seconds = timed(provider.run, provider.device)
    measurement.wall.append(wall_seconds * provider.scale)
    measurement.cpu.append(cpu_seconds * provider.scale)


def timed(run: Callable[[], Outputs], device: str) -> tuple[Outputs, float, float]:
    """What one call returns, and its wall and CPU seconds."""
    if device != "cpu":
        return _timed_on_gpu(run)
    wall, cpu = time.perf_counter(), time.process_time()
    outputs = run()
    cpu_seconds, wall_seconds = time.process_time() - cpu, time.perf_counter() - wall
    return outputs, wall_seconds, cpu_seconds


def _timed_on_gpu(run: Callable[[], Outputs]) -> tuple[Outputs, float, float]:
    """The wall seconds are those of the GPU, which has other work while the first launches are made.

    The calls before must be over, or the events would wait for them.
    """
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(LEADS):
        _overwritten_cache().zero_()
    cpu = time.process_time()
    start.record()
    outputs = run()
    end.record()
    cpu_seconds = time.process_time() - cpu  # waiting for the GPU is no work of the call
    end.synchronize()
    return outputs, start.elapsed_time(end) / 1e3, cpu_seconds


@functools.cache
def _overwritten_cache() -> Tensor:
    """Several times the largest cache of a GPU."""
    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Let float32 matrix products and convolutions use tf32, or not."""
    cudnn: Any = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == TF32 else "highest")
    cudnn.allow_tf32 = precision == TF32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32 = before[1]


# Memory --------------------------------------------------------------------------------------------------------------


def with_peak_memory(run: Callable[[], Outputs]) -> tuple[Outputs, int | None]:
    """Run once; also the bytes by which the resident set grew at its peak (None where that cannot be measured)."""
    gc.collect()
    _return_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from the present size
    except OSError:
        return run(), None
    before = _status_bytes("VmRSS")
    outputs = run()
    return outputs, max(0, _status_bytes("VmHWM") - before)


def with_peak_gpu_memory(run: Callable[[], Outputs]) -> tuple[Outputs, int]:
    """Run once; also the bytes by which torch's GPU allocations grew at their peak."""
    _overwritten_cache()  # allocated now, or it would count
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = run()
    torch.cuda.synchronize()
    return outputs, torch.cuda.max_memory_allocated() - before


def _return_free_memory() -> None:
    """Free heap pages still count as resident, and an allocation that reuses them would seem to cost nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


# Replay --------------------------------------------------------------------------------------------------------------


class ReplayClock:
    """A timer for pytest-benchmark (``@pytest.mark.benchmark(timer=clock)``) that shows recorded times.

    It stands still except while :meth:`replay` plays a sample, so the duration pytest-benchmark takes is that sample.
    """

    __name__ = "replayed samples of an interleaved race"

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def replay(self, benchmark: Any, samples: Sequence[float]) -> None:
        """Make ``samples`` the rounds of the fixture ``benchmark``."""
        remaining: Iterator[float] = iter(samples)

        def reset() -> None:
            self._now = 0.0

        def pass_one_sample() -> None:
            self._now = next(remaining)

        benchmark.pedantic(pass_one_sample, setup=reset, rounds=len(samples), iterations=1)


# Provenance ----------------------------------------------------------------------------------------------------------


def provenance() -> dict[str, Any]:
    """What a figure depends on, stored beside each of them."""
    return {
        "cpu": f"{_cpu_model()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


@functools.cache
def matrix_gflops() -> int:
    """Billions of float32 operations per second of torch's matrix product on the CPU, the quickest of some.

    It is what absolute seconds of convolutions and attention are to be judged by: those of two machines compare as
    these figures do.
    """
    side, products = 1536, 8
    a, b = torch.ones(side, side), torch.ones(side, side)
    out = torch.empty(side, side)
    quickest = math.inf
    for _ in range(products):
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        quickest = min(quickest, time.perf_counter() - begin)
    return round(2 * side**3 / quickest / 1e9)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str:
    """The checkout's commit, with ``+`` if files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unversioned"
    return done.stdout.strip()
