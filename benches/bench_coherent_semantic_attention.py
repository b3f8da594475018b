"""CSA's attention: ours, portable, the naive loop and, from a checkout given by ``--peers``, the published layer.

512 channels, a square hole over a quarter of the map, float32, two threads; smoothed noise with a constant per channel,
as features of images are (uncorrelated ones are chaotic in float32, in every implementation). A map is an eighth of
its image: 32x32 is the network's 256x256, 250x250 a photo of 2000x2000. The naive loop is the definition in plain
PyTorch: one matrix product for the search, then a step per masked position. The published layer takes 5 GB at 128x128;
at 250x250 it would take 74 GB and stays out. Its gradient is what ours computes by default, so forward+backward races
the same numbers.

The gate is the reference in float64; at 250x250 it holds for the first 256 masked positions. Rows behind a query whose
two best scores are equal to rounding are left out: whichever is taken is right, and the two vectors may differ much.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benches.coherent_case import CoherentCase
from benches.conftest import CLOCK, Race, parametrize_races, peers_folder

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def _cases(peers: Path | None) -> list[CoherentCase]:
    shapes = [
        (32, "forward"),
        (32, "forward+backward"),
        (64, "forward"),
        (64, "forward+backward"),
        (128, "forward"),
        (250, "forward"),
    ]
    return [CoherentCase(size, direction, peers) for size, direction in shapes]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_races(metafunc, _cases(peers_folder(metafunc.config)), test_ratio_to_naive)


def test_seconds(case: CoherentCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_seconds(provider, benchmark)


def test_ratio_to_naive(case: CoherentCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_ratio(provider, benchmark)
