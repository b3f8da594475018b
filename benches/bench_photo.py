"""Large photos: how long each model takes, and what memory, for the whole photo and for a hole in it.

float32, two threads. At 2000 x 2000 the hole is of 400 x 400, and as large a part of smaller photos. The gate is the
model's own run with whole maps; at 4096 x 4096, where that takes minutes, there is none. With ``--peers DIR`` the
public network with the same weights is raced too, unless its tensors alone take more than 5 GiB, which is computed.

    pytest benches/bench_photo.py --peers DIR -k "seconds and glcic"
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benches.conftest import CLOCK, Race, parametrize_races, peers_folder
from benches.photo_case import MODELS, PhotoCase

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def _cases(peers: Path | None) -> list[PhotoCase]:
    sizes = [PhotoCase(name, side, side // 5, peers) for name in MODELS for side in (512, 1024, 2000)]
    return [*sizes, PhotoCase("deepfill_v1", 4096, 400, peers)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_races(metafunc, _cases(peers_folder(metafunc.config)), test_ratio_to_whole_maps)


def test_seconds(case: PhotoCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_seconds(provider, benchmark)


def test_ratio_to_whole_maps(case: PhotoCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_ratio(provider, benchmark)
