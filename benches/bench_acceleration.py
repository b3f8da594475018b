"""Whole public networks, unmodified, before and after ``accelerate(model, example)``; needs ``--peers``.

Generators with their repository's architecture and random weights (see peer_models.py), batch 1, float32, two threads:
as published, the same in channels_last, and accelerated with an example of 256 x 256. Inference, and a training step of
the generator: forward, backward of an L1 loss. The gate is the published network's own result.

    pytest benches/bench_acceleration.py --peers DIR -k "seconds and 512-inference"
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benches.acceleration_case import AccelerationCase
from benches.conftest import CLOCK, Race, parametrize_races, peers_folder
from benches.peer_models import available_models

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark(timer=CLOCK)

RACES = (
    ("nipponjo", 512, "inference"),
    ("daa233", 512, "inference"),
    ("nipponjo", 1024, "inference"),
    ("daa233", 1024, "inference"),
    ("nipponjo", 256, "training step"),
    ("daa233", 256, "training step"),
    ("mmagic_deepfillv2", 256, "inference"),
    ("knazeri_inpaint", 256, "inference"),
    ("otenim", 256, "inference"),
    ("naoto0804", 256, "inference"),
    ("csa", 256, "inference"),
)


def _cases(peers: Path | None) -> list[AccelerationCase]:
    there = {model.name for model in available_models(peers)}
    return [AccelerationCase(name, size, step, peers) for name, size, step in RACES if peers and name in there]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_races(metafunc, _cases(peers_folder(metafunc.config)), test_ratio_to_published)


def test_seconds(case: AccelerationCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_seconds(provider, benchmark)


def test_ratio_to_published(case: AccelerationCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_ratio(provider, benchmark)
