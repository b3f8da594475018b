"""Networks give the values that the published code gave for the same weights and inputs."""

from __future__ import annotations

import json

import pytest

from tests.golden_models import FILE, golden_pairs, of_ours


@pytest.mark.parametrize("pair", golden_pairs(), ids=lambda pair: pair.name)
def test_network_gives_the_published_values(pair):
    published = json.loads(FILE.read_text(encoding="utf-8"))[pair.name]
    for ours, theirs in zip(of_ours(pair), published, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-11)
