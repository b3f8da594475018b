"""A training step of each generator, ours against the public networks; needs ``--peers DIR``, see peer_models.py.

Forward, L1 of what is painted, gradients of all parameters; float32, two threads, images of 256 x 256, batch 4 and
(slow) 16: time, and the peak of memory. The same weights on both sides, the public network also in channels_last; the
gate is its own picture. CSA is not among them: its public network takes one image at a time.

    pytest benches/bench_training.py --peers DIR -k "seconds and batch4"
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benches.conftest import CLOCK, Race, parametrize_races, peers_folder
from benches.published_models import available_pairs
from benches.training_case import TrainingCase

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark(timer=CLOCK)

SYSTEMS = (
    "deepfill_v1-daa233",
    "deepfill_v2-nipponjo",
    "glcic-otenim",
    "partial_conv_unet-naoto",
    "edge_connect-knazeri",
)
SIZE, BATCHES = 256, (4, 16)


def _cases(peers: Path | None) -> list[TrainingCase]:
    if peers is None:
        return []
    names = available_pairs(peers)
    return [TrainingCase(name, SIZE, batch, peers) for name in SYSTEMS if name in names for batch in BATCHES]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_races(metafunc, _cases(peers_folder(metafunc.config)), test_ratio_to_published)


def test_seconds(case: TrainingCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_seconds(provider, benchmark)


def test_ratio_to_published(case: TrainingCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_ratio(provider, benchmark)
