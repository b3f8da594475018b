"""PatchMatch: ours, portable and the reference, as the exemplar filler calls it (five channels, 7x7 patches).

The values are whole numbers, so distances are exact and every provider must find the same matches as the reference in
float64. ``photo`` is a square map of keys, ``hole`` the side of the square of queries in its middle.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest
import torch
from torch import Tensor

from benches.conftest import CLOCK, Race, parametrize_races
from benches.harness import Outputs, Provider
from benches.hole_case import BACKENDS, CHANNELS, NAIVE, HoleCase
from inpaint_kernels import patchmatch

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark(timer=CLOCK)

ITERATIONS: Final = 2
LARGEST_FOR_REFERENCE: Final = 256


@dataclass(frozen=True)
class PatchMatchCase(HoleCase):
    """One race: the queries of a hole against the keys of a photo, both square."""

    op = "patchmatch"

    @property
    def slow(self) -> bool:
        return self.photo > 1000

    @property
    def baseline(self) -> str | None:
        return NAIVE if self.photo <= LARGEST_FOR_REFERENCE else None

    @property
    def tolerances(self) -> tuple[float, ...]:
        return (0.0, 0.0)

    def provider(self, name: str) -> Provider:
        return Provider(
            name,
            run=functools.partial(_search, *_inputs(self), BACKENDS[name]),
            expected=functools.partial(_expected, self),
            warm_up=functools.partial(_search, *_inputs(PatchMatchCase(32, 16)), BACKENDS[name]),
        )


@functools.cache
def _inputs(case: PatchMatchCase) -> tuple[Tensor, Tensor]:
    """Query and key; a smooth pattern with noise, so that some matches propagate and some do not."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 200, (1, CHANNELS, case.photo // 8, case.photo // 8), generator=generator).float()
    noise = torch.randint(0, 20, (1, CHANNELS, case.photo, case.photo), generator=generator).float()
    key = torch.nn.functional.interpolate(coarse, size=(case.photo, case.photo), mode="bilinear").round() + noise
    first = (case.photo - case.hole) // 2
    query = key[:, :, first : first + case.hole, first : first + case.hole].flip(3).contiguous()
    return query, key


def _search(query: Tensor, key: Tensor, backend: str) -> Outputs:
    found = patchmatch(query, key, iterations=ITERATIONS, backend=backend)
    return found.index, found.score


@functools.lru_cache(maxsize=4)
def _expected(case: PatchMatchCase) -> Outputs:
    query, key = _inputs(case)
    backend = "reference" if case.baseline else "portable"
    return _search(query.double(), key.double(), backend)


CASES = [PatchMatchCase(128, 40), PatchMatchCase(256, 72), PatchMatchCase(1000, 200), PatchMatchCase(2000, 400)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_races(metafunc, CASES, test_ratio_to_naive)


def test_seconds(case: PatchMatchCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_seconds(provider, benchmark)


def test_ratio_to_naive(case: PatchMatchCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_ratio(provider, benchmark)
