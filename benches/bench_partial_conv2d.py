"""Partial convolutions: every layer of the U-Net of Liu et al., ours, published code, and the same compiled.

Two threads, float32 and bfloat16, an image of 512x512. A decoder's layer has two masks, that of the upsampled channels
and that of the skip connection::

    pytest benches/bench_partial_conv2d.py -k "seconds and 512-float32" --race-seconds 4
    ... --benchmark-json=benches/results/partial_conv2d_512_float32.json
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benches.conftest import CLOCK, Race, parametrize_races
from benches.convolution_case import PCONV_UNET, ConvolutionCase, cases_of

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark(timer=CLOCK)

CASES = cases_of(PCONV_UNET, sizes=(512,))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_races(metafunc, CASES, test_ratio_to_eager)


def test_seconds(case: ConvolutionCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_seconds(provider, benchmark)


def test_ratio_to_eager(case: ConvolutionCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_ratio(provider, benchmark)
