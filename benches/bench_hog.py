"""Histograms of oriented gradients: scikit-image, ours, portable, a plain port to PyTorch, and the same compiled.

Two threads; images of 256 and 512 pixels squared, gray and in colour, with and without the picture of the histograms,
of 2000 pixels squared beside a copy of their bytes, and a batch. hog_case.py says who takes part. A file per race, with
an OpenCV that still has a descriptor::

    pytest benches/bench_hog.py -k "seconds and 512x512-rgb-uint8 and not visualize"
    ... --benchmark-json=benches/results/hog_512x512-rgb-uint8.json
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from benches.conftest import CLOCK, Race, parametrize_races
from benches.hog_case import HogCase

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark(timer=CLOCK)

CASES: Final = [
    *(HogCase(256, channels) for channels in (1, 3)),
    *(HogCase(512, channels, visualize=visualize) for channels in (1, 3) for visualize in (False, True)),
    HogCase(512, 3, "float32"),
    *(HogCase(2000, channels) for channels in (1, 3)),
    HogCase(256, 3, batch=64),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_races(metafunc, CASES, test_ratio_to_scikit_image)


def test_seconds(case: HogCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_seconds(provider, benchmark)


def test_ratio_to_scikit_image(case: HogCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_ratio(provider, benchmark)
