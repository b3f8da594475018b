"""Exhaustive patch matching: ours, portable and naive PyTorch, which stores every score.

Eight channels and patches of 7 x 7, float32, two threads; the keys are another map than the queries. Up to 9,216 keys
the naive op takes part. At 65,536 keys (a 256x256 image matched pixel by pixel) its scores would take 16 GiB, so ours
and portable run alone, for a box of queries as a hole asks for.

The gate compares the score that a provider returns, and the score in float64 of the key that it chose, with the best
score: of keys that are equally good to rounding any is right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from torch import Tensor

from benches.conftest import CLOCK, Race, parametrize_races
from benches.harness import Outputs, Provider
from inpaint_kernels import match_patches
from inpaint_kernels.reference import match_patches as reference

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark(timer=CLOCK)

CHANNELS: Final = 8
PATCH: Final = 7
TOLERANCE: Final = 3e-5
WARM_UP_SIZE: Final = 16
LARGEST_DENSE_SIZE: Final = 96

OURS, PORTABLE, NAIVE = "ours", "portable", "naive"
BACKENDS: Final = {OURS: "cpu", PORTABLE: "portable", NAIVE: "reference"}

Box = tuple[int, int, int, int]


# Cases ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MatchCase:
    """One race: square maps of ``size``, all queries or a box (y0, x0, y1, x1) of them."""

    size: int
    queries: Box | None = None

    def __str__(self) -> str:
        return f"{self.size}x{self.size}{'' if self.queries is None else '-queries'}"

    @property
    def keys(self) -> int:
        return self.size**2

    @property
    def slow(self) -> bool:
        return self.size > 64

    @property
    def baseline(self) -> str | None:
        return NAIVE if self.size <= LARGEST_DENSE_SIZE else None

    @property
    def tolerances(self) -> tuple[float, ...]:
        return (TOLERANCE, TOLERANCE)

    @property
    def provider_names(self) -> list[str]:
        return [*([] if self.baseline is None else [NAIVE]), OURS, PORTABLE]

    def provider(self, name: str) -> Provider:
        return Provider(
            name,
            run=_runner(self, name),
            expected=functools.partial(_expected, self),
            select=functools.partial(_scores_of_choice, self),
            warm_up=_runner(MatchCase(WARM_UP_SIZE), name),
        )

    def facts(self) -> Mapping[str, Any]:
        queries = self.queries
        return {
            "op": "match_patches",
            "case": str(self),
            "size": self.size,
            "keys": self.keys,
            "queries": self.keys if queries is None else (queries[2] - queries[0]) * (queries[3] - queries[1]),
            "direction": "forward",
            "family": "noise",
            "channels": CHANNELS,
        }


# Providers and the gate ----------------------------------------------------------------------------------------------


def make_maps(size: int) -> tuple[Tensor, Tensor]:
    """Query and key map, [1, CHANNELS, size, size] each."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, CHANNELS, size, size, generator=generator)
    return query, key


def _runner(case: MatchCase, name: str) -> Callable[[], Outputs]:
    query, key = make_maps(case.size)
    return lambda: match_patches(query, key, patch=PATCH, queries=case.queries, backend=BACKENDS[name])


@functools.lru_cache(maxsize=1)
def _expected(case: MatchCase) -> Outputs:
    """The best scores in float64, for both of what :func:`_scores_of_choice` returns."""
    query, key = (x.double() for x in make_maps(case.size))
    best = match_patches(query, key, patch=PATCH, queries=case.queries, backend="portable").score
    best = _computed_part(case, best)
    return best, best


def _scores_of_choice(case: MatchCase, outputs: Outputs) -> Outputs:
    """What a provider claims as the scores of its keys, and what they are in float64."""
    index, score = (_computed_part(case, x) for x in outputs)
    query, key = (reference.patches(x.double(), PATCH) for x in make_maps(case.size))
    wanted = _computed_part(case, query.unflatten(2, (case.size, case.size)))
    chosen = key[0][:, index.flatten()].reshape(wanted.shape)
    return score, (wanted * chosen).sum(1)


def _computed_part(case: MatchCase, x: Tensor) -> Tensor:
    if case.queries is None:
        return x
    y0, x0, y1, x1 = case.queries
    return x[..., y0:y1, x0:x1]


# Benchmarks ----------------------------------------------------------------------------------------------------------

CASES = (MatchCase(32), MatchCase(64), MatchCase(96), MatchCase(256, queries=(112, 112, 144, 144)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_races(metafunc, CASES, test_ratio_to_naive)


def test_seconds(case: MatchCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_seconds(provider, benchmark)


def test_ratio_to_naive(case: MatchCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_ratio(provider, benchmark)
