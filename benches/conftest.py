"""Options and fixtures of the benchmarks.

    pytest benches                                  everything, more than an hour on two cores
    pytest benches -m "not slow"                    about twenty minutes
    pytest benches -k "128x128-forward-peaked"      one race; the baseline always takes part
    pytest benches --peers DIR                      beside public ports, see peers.py
    pytest benches --benchmark-disable              only the gates: is every provider right?

Committed figures come from ``--benchmark-json=benches/results/NAME.json``, on a machine that does nothing else;
report.py makes tables of them.

Guarding against regressions: ``test_ratio_to_naive`` stores, instead of seconds, the time over the naive op's in the
same round, which depends little on the machine and on its load (the tables still call the unit seconds)::

    pytest benches -k "ratio and ours" --benchmark-save=before
    pytest benches -k "ratio and ours" --benchmark-compare=0001 --benchmark-compare-fail=median:15%

fails when a median ratio has grown by more than 15 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from benches import harness
from benches.harness import Case, Measurement, ReplayClock
from benches.peers import folder_in_environment

CLOCK = ReplayClock()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("inpaint-kernels benchmarks")
    group.addoption("--peers", metavar="DIR", help="folder with checkouts of public ports (default: $INPAINT_PEERS)")
    group.addoption(
        "--race-seconds", type=float, help="about how long one race may take (default: 30, a layer of a network 4)"
    )
    group.addoption("--race-rounds", type=int, help="rounds of every race, instead of --race-seconds")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(harness.THREADS)


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """Only what a figure depends on; pytest-benchmark's own adds the name of the host."""
    return {key: value for key, value in harness.provenance().items() if key not in ("commit", "date")}


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Leave out what the file need not say: a parameter's repr (its id says it) and constant options of the plugin."""
    for entry in output_json["benchmarks"]:
        del entry["params"], entry["options"]


def peers_folder(config: pytest.Config) -> Path | None:
    folder = config.getoption("--peers")
    return Path(folder) if folder else folder_in_environment()


class EnteredCase(Case, Protocol):
    """A case that knows who takes part, and whether its race is too long for a quick run."""

    @property
    def provider_names(self) -> Sequence[str]:
        """The field; without the baseline where there is none."""
        ...

    @property
    def slow(self) -> bool:
        """Whether it is marked so."""
        ...


def parametrize_races(metafunc: pytest.Metafunc, cases: Iterable[EnteredCase], ratio_test: Callable[..., None]) -> None:
    """Make a benchmark of every provider of every case; ``ratio_test`` takes those that have a baseline beside them."""
    needs_baseline = metafunc.function is ratio_test
    parameters = [
        pytest.param(case, name, id=f"{case}-{name}", marks=[pytest.mark.slow] if case.slow else [])
        for case in cases
        for name in case.provider_names
        if not needs_baseline or case.baseline not in (None, name)
    ]
    metafunc.parametrize(("case", "provider"), parameters)


@dataclass
class RaceResult:
    """A finished race, to be written into one benchmark per provider."""

    case: Case
    measurements: Mapping[str, Measurement]
    noise: float | None

    def replay_seconds(self, name: str, benchmark: Any) -> None:
        """Make the seconds of provider ``name`` the rounds of ``benchmark``."""
        measurement = self._entered(name)
        self._annotate(benchmark, name, measurement, "seconds")
        CLOCK.replay(benchmark, measurement.wall)

    def replay_ratio(self, name: str, benchmark: Any) -> None:
        """Make the seconds of provider ``name`` over the baseline's, round by round, the rounds of ``benchmark``."""
        assert self.case.baseline is not None
        measurement, baseline = self._entered(name), self._entered(self.case.baseline)
        self._annotate(benchmark, name, measurement, f"ratio to {self.case.baseline}")
        CLOCK.replay(benchmark, [own / other for own, other in zip(measurement.wall, baseline.wall, strict=True)])

    def _entered(self, name: str) -> Measurement:
        measurement = self.measurements[name]
        if measurement.failure is not None:
            raise measurement.failure
        return measurement

    def _annotate(self, benchmark: Any, name: str, measurement: Measurement, figure: str) -> None:
        benchmark.group = f"{self.case}: {figure}"
        peak = measurement.peak_extra_bytes
        benchmark.extra_info.update(
            provider=name,
            figure=figure,
            cpu_seconds=measurement.cpu,
            peak_extra_mib=None if peak is None else round(peak / 2**20, 1),
            largest_relative_error=measurement.error,
            noise=self.noise,
            **self.case.facts(),
            provenance={**harness.provenance(), "matrix_gflops": harness.matrix_gflops()},
        )


Race = Callable[[Case], RaceResult]


@pytest.fixture(scope="session")
def finished_races() -> dict[Case, RaceResult]:
    return {}


@pytest.fixture
def race(request: pytest.FixtureRequest, finished_races: dict[Case, RaceResult]) -> Race:
    """Runs the race of a case once per session, between all providers of it that were selected and the baseline."""

    def run(case: Case) -> RaceResult:
        if case not in finished_races:
            names = _selected_providers(request.session, case)
            config = request.config
            seconds = config.getoption("--race-seconds")
            gates_only = config.getoption("--benchmark-disable")
            measurements, noise = harness.run_race(
                [case.provider(name) for name in names],
                case.tolerances,
                seconds=getattr(case, "race_seconds", 30.0) if seconds is None else seconds,
                rounds=1 if gates_only else config.getoption("--race-rounds") or getattr(case, "rounds", None),
            )
            finished_races[case] = RaceResult(case, measurements, noise)
        return finished_races[case]

    return run


def _selected_providers(session: pytest.Session, case: Case) -> list[str]:
    parameters = [item.callspec.params for item in session.items if hasattr(item, "callspec")]
    names = [p["provider"] for p in parameters if p.get("case") == case]
    return list(dict.fromkeys(([case.baseline] if case.baseline else []) + names))
