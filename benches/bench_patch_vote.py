"""Patch voting: ours, portable and the reference, as the exemplar filler calls it (five channels, 9x9 patches)."""

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
from inpaint_kernels import patch_vote

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark(timer=CLOCK)

PATCH: Final = 9
TOLERANCE: Final = 1e-5
LARGEST_FOR_REFERENCE: Final = 200


@dataclass(frozen=True)
class PatchVoteCase(HoleCase):
    """One race: a square hole in a square photo, with matches that are coherent in blocks of 8x8."""

    op = "patch_vote"

    @property
    def baseline(self) -> str | None:
        return NAIVE if self.hole <= LARGEST_FOR_REFERENCE else None

    @property
    def tolerances(self) -> tuple[float, ...]:
        return (TOLERANCE,)

    def provider(self, name: str) -> Provider:
        return Provider(
            name,
            run=functools.partial(_vote, *_inputs(self), BACKENDS[name]),
            expected=functools.partial(_expected, self),
            warm_up=functools.partial(_vote, *_inputs(PatchVoteCase(64, 16)), BACKENDS[name]),
        )


@functools.cache
def _inputs(case: PatchVoteCase) -> tuple[Tensor, Tensor, Tensor]:
    """Key, index and score."""
    generator = torch.Generator().manual_seed(0)
    key = torch.rand(1, CHANNELS, case.photo, case.photo, generator=generator)
    blocks = -(-case.hole // 8)
    shift = torch.randint(PATCH, case.photo - case.hole - PATCH, (2, blocks, blocks), generator=generator)
    shift = shift.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, : case.hole, : case.hole]
    row, column = torch.arange(case.hole)[:, None] + shift[0], torch.arange(case.hole) + shift[1]
    score = -torch.rand(1, case.hole, case.hole, generator=generator)
    return key, (row * case.photo + column)[None], score


def _vote(key: Tensor, index: Tensor, score: Tensor, backend: str) -> Outputs:
    return (patch_vote(key, index, score, patch=PATCH, backend=backend),)


@functools.lru_cache(maxsize=4)
def _expected(case: PatchVoteCase) -> Outputs:
    key, index, score = _inputs(case)
    return _vote(key.double(), index, score.double(), "reference" if case.baseline else "portable")


CASES = [PatchVoteCase(256, 64), PatchVoteCase(1000, 200), PatchVoteCase(2000, 400)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_races(metafunc, CASES, test_ratio_to_naive)


def test_seconds(case: PatchVoteCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_seconds(provider, benchmark)


def test_ratio_to_naive(case: PatchVoteCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_ratio(provider, benchmark)
