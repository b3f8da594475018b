"""patch_vote: every backend against the float64 reference, and the reference against the sum written out."""

from __future__ import annotations

import math
import re

import pytest
import torch

from inpaint_kernels import explain, patch_vote, patchmatch
from inpaint_kernels.portable import patch_vote as portable
from tests.compare import assert_close_to_reference

EXAMPLE = (torch.zeros(1, 1, 9, 9), torch.zeros(1, 9, 9, dtype=torch.int64), torch.zeros(1, 9, 9))
BACKENDS = [name for name in explain("patch_vote", *EXAMPLE).usable if name != "reference"]
WITH_REFERENCE = [*BACKENDS, "reference"]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
with_the_reference_too = pytest.mark.parametrize("backend", WITH_REFERENCE)


def matched(patch: int, batch: int = 2):
    """A key, and a field of matches over two thirds of the queries."""
    query, key = torch.rand(batch, 3, 16, 18), torch.rand(batch, 3, 20, 15)
    field = patchmatch(query, key, patch=patch, iterations=1, queries=torch.rand(16, 18) > 0.3)
    return key, field.index, field.score


@with_the_reference_too
@pytest.mark.parametrize("patch", [1, 3, 7, 9])
@pytest.mark.parametrize("bandwidth", [0.02, 1.0])
def test_equals_the_float64_reference(backend, patch, bandwidth):
    key, index, score = matched(patch)
    confidence, targets = torch.randn(16, 18), torch.rand(16, 18) > 0.4
    options = {"patch": patch, "targets": targets, "bandwidth": bandwidth}
    out = patch_vote(key, index, score, confidence=confidence, **options, backend=backend)
    expected = patch_vote(
        key.double(), index, score.double(), confidence=confidence.double(), **options, backend="reference"
    )
    assert_close_to_reference(out, expected)
    assert (out[:, :, ~targets] == 0).all()


def test_the_reference_is_the_sum_of_the_docstring():
    key, index, score = (x.double() if x.is_floating_point() else x for x in matched(3, batch=1))
    confidence = torch.randn(16, 18, dtype=torch.float64)
    out = patch_vote(key, index, score, patch=3, confidence=confidence, bandwidth=0.7, backend="reference")
    for y, x in ((0, 0), (7, 9), (15, 17), (3, 0)):
        proposals = []
        for v in range(max(0, y - 1), min(16, y + 2)):
            for u in range(max(0, x - 1), min(18, x + 2)):
                match = int(index[0, v, u])
                if match >= 0:
                    colour = key[0, :, match // 15 + y - v, match % 15 + x - u]
                    proposals.append((colour, -float(score[0, v, u]), float(confidence[v, u])))
        if not proposals:
            assert (out[0, :, y, x] == 0).all()
            continue
        mean_distance = sum(distance for _, distance, _ in proposals) / len(proposals)
        weights = [math.exp(trust - distance / (2 * 0.7 * mean_distance)) for _, distance, trust in proposals]
        pairs = zip(weights, proposals, strict=True)
        expected = sum((w * colour for w, (colour, _, _) in pairs), torch.zeros(3).double()) / sum(weights)
        torch.testing.assert_close(out[0, :, y, x], expected)


@with_the_reference_too
def test_patches_of_a_shifted_copy_give_the_copy_back(backend):
    key = torch.rand(1, 2, 30, 30)
    index = (torch.arange(5, 20)[:, None] * 30 + torch.arange(8, 22))[None]
    out = patch_vote(key, index, torch.zeros(1, 15, 14), patch=5, backend=backend)
    torch.testing.assert_close(out, key[:, :, 5:20, 8:22], rtol=0, atol=1e-6)


@with_the_reference_too
def test_small_bandwidth_follows_the_nearest_patch(backend):
    key = torch.rand(1, 1, 9, 9)
    index, score = torch.full((1, 3, 3), 4 * 9 + 4), torch.full((1, 3, 3), -1.0)
    score[0, 0, 2] = -0.1
    out = patch_vote(key, index, score, patch=3, bandwidth=0.01, backend=backend)
    assert float(out[0, 0, 1, 1]) == pytest.approx(float(key[0, 0, 4 + 1, 4 - 1]))


@with_the_reference_too
def test_nothing_proposed(backend):
    key, index = torch.rand(1, 2, 9, 9), torch.full((1, 6, 7), -1)
    out = patch_vote(key, index, torch.full((1, 6, 7), -math.inf), patch=3, backend=backend)
    assert torch.equal(out, torch.zeros(1, 2, 6, 7))


@on_every_backend
def test_proposals_outside_the_key_do_not_count(backend):
    key = torch.rand(1, 1, 4, 4)
    index = torch.zeros(1, 3, 3, dtype=torch.int64)  # the key's corner: only what lies right of and below it exists
    out = patch_vote(key, index, torch.zeros(1, 3, 3), patch=3, backend=backend)
    expected = patch_vote(key.double(), index, torch.zeros(1, 3, 3).double(), patch=3, backend="reference")
    assert_close_to_reference(out, expected)


def test_tiles_do_not_matter(monkeypatch):
    key, index, score = matched(5)
    whole = patch_vote(key, index, score, patch=5, backend="portable")
    monkeypatch.setattr(portable, "TILE", 7)
    torch.testing.assert_close(patch_vote(key, index, score, patch=5, backend="portable"), whole, rtol=0, atol=1e-6)


@on_every_backend
def test_same_bits_for_any_number_of_threads(backend):
    key, index, score = matched(7)
    expected = patch_vote(key, index, score, backend=backend)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(patch_vote(key, index, score, backend=backend), expected)


@on_every_backend
def test_opcheck(backend):
    key, index, score = matched(3)
    op = torch.ops.inpaint_kernels.patch_vote.default
    torch.library.opcheck(op, (key, index, score, None, None, 3, 1.0, backend))
    torch.library.opcheck(op, (key, index, score, torch.rand(16, 18), torch.rand(16, 18) > 0.5, 3, 1.0, backend))


@with_the_reference_too
def test_empty_inputs(backend):
    none = torch.zeros(0, 4, 5, dtype=torch.int64)
    assert patch_vote(torch.zeros(0, 3, 6, 7), none, none.float(), backend=backend).shape == (0, 3, 4, 5)


def test_float64_runs_on_the_portable_backend():
    assert explain("patch_vote", EXAMPLE[0].double(), EXAMPLE[1], EXAMPLE[2].double()).chosen == "portable"


KEY, INDEX, SCORE = torch.zeros(2, 3, 8, 9), torch.zeros(2, 5, 6, dtype=torch.int64), torch.zeros(2, 5, 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": KEY[0]}, ValueError, "key: expected shape [B, C, hk, wk], got [3, 8, 9]"),
        ({"key": KEY.half()}, TypeError, "key: expected torch.float32 or torch.float64, got torch.float16"),
        ({"index": INDEX[:1]}, ValueError, "index: expected shape [B, hq, wq] with B=2, got [1, 5, 6]"),
        ({"index": SCORE}, TypeError, "index: expected torch.int64, got torch.float32"),
        ({"score": SCORE[:, 1:]}, ValueError, "score: expected shape [B, hq, wq] with B=2, hq=5, wq=6"),
        ({"score": SCORE.double()}, TypeError, "expected one dtype"),
        ({"confidence": SCORE}, ValueError, "confidence: expected shape [hq, wq] with hq=5, wq=6, got [2, 5, 6]"),
        ({"targets": SCORE[0]}, TypeError, "targets: expected torch.bool, got torch.float32"),
        ({"patch": 2}, ValueError, "patch: expected an odd number, got 2"),
        ({"bandwidth": 0.0}, ValueError, "bandwidth: expected a number >= 1e-06, got 0.0"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"key": KEY, "index": INDEX, "score": SCORE} | change
    with pytest.raises(error, match=re.escape(message)):
        patch_vote(**arguments)
