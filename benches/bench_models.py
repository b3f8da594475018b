"""Our models against the public networks with the same weights; needs ``--peers DIR``, the folder of their checkouts.

Inference, float32, two threads: the public network as it is, the same in channels_last, ours on the whole photo, and
ours for the hole alone where the hole does not depend on every pixel. The gate is the public network's own result.

    pytest benches/bench_models.py --peers DIR -k "seconds and glcic"
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benches.conftest import CLOCK, Race, parametrize_races, peers_folder
from benches.model_case import ModelCase
from benches.published_models import available_pairs

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark(timer=CLOCK)

SYSTEMS = (
    "deepfill_v1-daa233",
    "deepfill_v2-nipponjo",
    "glcic-otenim",
    "glcic-mmagic",
    "partial_conv_unet-naoto",
    "edge_connect-knazeri",
)
SQUARES = ((256, 1, 64), (512, 1, 128), (256, 8, 64))
CSA_SQUARES = ((256, 1, 128), (1024, 1, 512))
"""With the published mask, the middle half of each side; its public network takes one image at a time."""
GLCIC_PHOTOS = ((660, 1084), (540, 960))
"""Those of a published demonstration, 1083 x 658 and 960 x 540, in multiples of 4; a hole of 200 x 200 in each."""


def _cases(peers: Path | None) -> list[ModelCase]:
    if peers is None:
        return []
    names = available_pairs(peers)
    squares = {**dict.fromkeys(SYSTEMS, SQUARES), "csa-official": CSA_SQUARES}
    cases = [
        ModelCase(name, side, side, batch, hole, peers)
        for name, sizes in squares.items()
        if name in names
        for side, batch, hole in sizes
    ]
    cases += [
        ModelCase(name, height, width, 1, 200, peers)
        for name in ("glcic-otenim", "glcic-mmagic")
        if name in names
        for height, width in GLCIC_PHOTOS
    ]
    return cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_races(metafunc, _cases(peers_folder(metafunc.config)), test_ratio_to_published)


def test_seconds(case: ModelCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_seconds(provider, benchmark)


def test_ratio_to_published(case: ModelCase, provider: str, race: Race, benchmark: BenchmarkFixture) -> None:
    race(case).replay_ratio(provider, benchmark)
