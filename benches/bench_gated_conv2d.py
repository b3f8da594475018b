"""Gated convolutions: every distinct layer of the DeepFill v2 generator, ours, published code, and the same compiled.

Two threads, float32 and bfloat16, images of 256x256, 512x512 and 2000x2000. The generator's last layer, a convolution
without a gate, takes part through ``dilated_conv2d``: report.py sums over all 42 convolutions.

The layers of one size and precision go into one file; a few seconds for each::

    pytest benches/bench_gated_conv2d.py -k "seconds and 512-float32" --race-seconds 4
    ... --benchmark-json=benches/results/gated_conv2d_512_float32.json
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benches.conftest import CLOCK, Race, parametrize_races
from benches.convolution_case import DEEPFILL_V2, ConvolutionCase, cases_of

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark(timer=CLOCK)

CASES = cases_of(DEEPFILL_V2, sizes=(256, 512, 2000))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_races(metafunc, CASES, test_ratio_to_eager)


def test_seconds(case: ConvolutionCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_seconds(provider, benchmark)


def test_ratio_to_eager(case: ConvolutionCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_ratio(provider, benchmark)
