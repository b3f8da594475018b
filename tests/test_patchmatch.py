"""patchmatch: every backend takes the same candidates as the reference, and finds what an exhaustive search finds."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from inpaint_kernels import PatchMatches, explain, match_patches, patchmatch
from inpaint_kernels.reference.patchmatch import patch_distance

BACKENDS = [name for name in explain("patchmatch", *[torch.zeros(1, 1, 9, 9)] * 2).usable if name != "reference"]
WITH_REFERENCE = [*BACKENDS, "reference"]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
with_the_reference_too = pytest.mark.parametrize("backend", WITH_REFERENCE)


def whole_numbers(*shape: int) -> Tensor:
    """Values whose distances are exact in float32, so that all backends must decide alike."""
    return torch.randint(0, 9, shape).float()


@on_every_backend
@pytest.mark.parametrize("patch", [1, 3, 7])
@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("restricted", [False, True])
def test_equals_the_reference(backend, patch, channels, restricted):
    query, key = whole_numbers(2, channels, 23, 19), whole_numbers(2, channels, 17, 29)
    options = {"patch": patch, "iterations": 2, "seed": 3}
    if restricted:
        options |= {
            "queries": torch.rand(23, 19) > 0.3,
            "valid": torch.rand(2, 17, 29) > 0.3,
            "start": torch.randint(-5, 17 * 29 + 5, (2, 23, 19)),
            "radius": 6,
        }
    result = patchmatch(query, key, **options, backend=backend)
    expected = patchmatch(query, key, **options, backend="reference")
    assert torch.equal(result.index, expected.index)
    assert torch.equal(result.score, expected.score)


@with_the_reference_too
def test_score_is_minus_the_distance_of_the_patches_inside_the_query(backend):
    query, key = torch.rand(1, 3, 11, 12), torch.rand(1, 3, 13, 10)
    index, score = patchmatch(query, key, patch=5, iterations=1, backend=backend)
    for y, x in ((0, 0), (5, 6), (10, 11), (0, 7)):
        v, u = divmod(int(index[0, y, x]), 10)
        distance = 0.0
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                if 0 <= y + dy < 11 and 0 <= x + dx < 12:
                    difference = query[0, :, y + dy, x + dx].double() - key[0, :, v + dy, u + dx].double()
                    distance += float(difference.square().sum())
        assert float(score[0, y, x]) == pytest.approx(-distance, rel=1e-5)


@on_every_backend
def test_finds_a_part_of_the_key(backend):
    key = torch.rand(1, 3, 60, 70)
    query = key[:, :, 11:41, 20:52].clone()
    index, score = patchmatch(query, key, iterations=6, backend=backend)
    place = torch.arange(11, 41)[:, None] * 70 + torch.arange(20, 52)
    inner = (0, slice(3, -3), slice(3, -3))  # patches near the query's border are cut, and may match elsewhere too
    assert torch.equal(index[inner], place[3:-3, 3:-3])
    assert (score[inner] == 0).all()


@on_every_backend
def test_is_nearly_as_good_as_an_exhaustive_search(backend):
    smooth = torch.nn.functional.avg_pool2d(torch.rand(2, 1, 44, 44), 5, 1)
    query, key = smooth[:1], smooth[1:]
    found = patchmatch(query, key, iterations=8, backend=backend).score
    inside = torch.zeros(1, 40, 40, dtype=torch.bool)
    inside[:, 3:-3, 3:-3] = True
    norm = key.square()
    exact = match_patches(torch.cat((2 * query, -torch.ones_like(query)), 1), torch.cat((key, norm), 1), valid=inside)
    centre = (slice(3, -3), slice(3, -3))
    chosen = patchmatch(query, key, exact.index, iterations=0, backend=backend).score[0][centre]
    assert (found[0][centre] <= chosen + 1e-5).all()
    assert float(found[0][centre].mean()) >= 1.1 * float(chosen.mean())


@on_every_backend
def test_iterations_never_worsen_and_zero_scores_the_start(backend):
    query, key = torch.rand(1, 2, 20, 21), torch.rand(1, 2, 22, 23)
    start = torch.full((1, 20, 21), 5 * 23 + 7)
    index, score = patchmatch(query, key, start, iterations=0, backend=backend)
    assert torch.equal(index, start)
    at = torch.arange(20 * 21)
    expected = patch_distance(query[0].double(), key[0].double(), at, start.flatten(), 7)
    torch.testing.assert_close(-score.flatten().double(), expected, rtol=1e-5, atol=0)
    last = score
    for iterations in (1, 2, 4):
        better = patchmatch(query, key, start, iterations=iterations, backend=backend).score
        assert (better >= last).all()
        last = better
    assert last.mean() > score.mean()


@with_the_reference_too
def test_chooses_only_what_may_be_chosen(backend):
    valid = torch.rand(1, 20, 24) > 0.7
    index, score = patchmatch(torch.rand(2, 1, 15, 16), torch.rand(2, 1, 20, 24), valid=valid, backend=backend)
    row, column = index // 24, index % 24
    assert valid.flatten()[index].all()
    assert ((row >= 3) & (row < 17) & (column >= 3) & (column < 21)).all()
    assert score.isfinite().all()


@with_the_reference_too
@pytest.mark.parametrize("kind", ["none valid", "smaller than a patch"])
def test_nothing_to_choose(backend, kind):
    size, valid = (12, torch.zeros(1, 12, 12, dtype=torch.bool)) if kind == "none valid" else (6, None)
    result = patchmatch(torch.rand(1, 2, 9, 9), torch.rand(1, 2, size, size), valid=valid, backend=backend)
    assert (result.index == -1).all()
    assert (result.score == -math.inf).all()


@with_the_reference_too
def test_only_wanted_queries_are_computed(backend):
    query, key = torch.rand(1, 1, 14, 15), torch.rand(1, 1, 16, 17)
    wanted = torch.zeros(14, 15, dtype=torch.bool)
    wanted[2:7, 3:11] = True
    by_mask = patchmatch(query, key, queries=wanted, backend=backend)
    by_box = patchmatch(query, key, queries=(2, 3, 7, 11), backend=backend)
    assert isinstance(by_mask, PatchMatches)
    assert torch.equal(by_mask.index, by_box.index)
    assert torch.equal(by_mask.index[0] >= 0, wanted)
    assert torch.equal(by_mask.score[0].isfinite(), wanted)


@on_every_backend
def test_seeds(backend):
    query, key = torch.rand(1, 1, 30, 30), torch.rand(1, 1, 30, 30)
    first = patchmatch(query, key, iterations=1, seed=1, backend=backend).index
    assert torch.equal(first, patchmatch(query, key, iterations=1, seed=1, backend=backend).index)
    assert not torch.equal(first, patchmatch(query, key, iterations=1, seed=2, backend=backend).index)
    last = patchmatch(query, key, iterations=1, seed=2**32 - 1, backend=backend).index
    assert torch.equal(last, patchmatch(query, key, iterations=1, seed=2**32 - 1, backend="reference").index)


@on_every_backend
def test_same_bits_for_any_number_of_threads(backend):
    size = 60 if backend != "portable" else 30  # which takes seconds for each call
    query, key = torch.rand(1, 3, size, size + 1), torch.rand(1, 3, size, size + 1)
    expected = patchmatch(query, key, iterations=2, backend=backend)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        result = patchmatch(query, key, iterations=2, backend=backend)
        assert torch.equal(result.index, expected.index)
        assert torch.equal(result.score, expected.score)


@with_the_reference_too
def test_nan_stays_where_it_is(backend):
    query, key = torch.rand(1, 1, 20, 20), torch.rand(1, 1, 20, 20)
    key[0, 0, 10, 10] = math.nan
    index, score = patchmatch(query, key, backend=backend)
    row, column = index // 20, index % 20
    near = ((row - 10).abs() <= 3) & ((column - 10).abs() <= 3)
    assert not near[:, 3:-3, 3:-3].any()  # a patch that the border cuts may leave that pixel out
    assert score.isfinite().all()
    query[0, 0, 4, 5] = math.nan
    score = patchmatch(query, key, backend=backend).score
    touched = torch.zeros(20, 20, dtype=torch.bool)
    touched[1:8, 2:9] = True
    assert torch.equal(score[0] == -math.inf, touched)


@on_every_backend
def test_layouts_give_the_same_bits(backend):
    query, key = torch.rand(2, 3, 12, 13), torch.rand(2, 3, 14, 15)
    expected = patchmatch(query, key, backend=backend)
    moved = [x.contiguous(memory_format=torch.channels_last) for x in (query, key)]
    assert not moved[0].is_contiguous()
    assert torch.equal(patchmatch(*moved, backend=backend).index, expected.index)


@with_the_reference_too
def test_empty_inputs(backend):
    assert patchmatch(torch.zeros(0, 3, 4, 5), torch.zeros(0, 3, 6, 7), backend=backend).index.shape == (0, 4, 5)


@with_the_reference_too
def test_there_is_no_gradient(backend):
    x = torch.rand(1, 1, 9, 9, requires_grad=True)
    assert not patchmatch(x, x, backend=backend).score.requires_grad


def test_float64_runs_on_the_portable_backend():
    x = torch.rand(1, 1, 9, 9, dtype=torch.float64)
    explanation = explain("patchmatch", x, x)
    assert explanation.chosen == "portable"
    assert "float32" in str(explanation)
    assert patchmatch(x, x).score.dtype == torch.float64


@on_every_backend
def test_opcheck(backend):
    query, key = torch.rand(1, 2, 9, 10), torch.rand(1, 2, 11, 12)
    op = torch.ops.inpaint_kernels.patchmatch.default
    torch.library.opcheck(op, (query, key, None, None, None, 3, 1, 4, 0, backend))
    start, wanted, valid = (
        torch.zeros(1, 9, 10, dtype=torch.int64),
        torch.rand(9, 10) > 0.5,
        torch.rand(1, 11, 12) > 0.2,
    )
    torch.library.opcheck(op, (query, key, start, wanted, valid, 3, 1, 4, 0, backend))


@on_every_backend
def test_compiles_into_one_graph(backend):
    compiled = torch.compile(patchmatch, fullgraph=True, dynamic=True, backend="eager")
    for size in (9, 12):
        x = torch.rand(1, 2, size, size + 1)
        assert torch.equal(compiled(x, x, backend=backend)[0], patchmatch(x, x, backend=backend).index)


X = torch.zeros(2, 3, 12, 13)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": X[0]}, ValueError, "query: expected shape [B, C, hq, wq], got [3, 12, 13]"),
        ({"query": X.half()}, TypeError, "query: expected torch.float32 or torch.float64, got torch.float16"),
        ({"key": X[:1]}, ValueError, "key: expected shape [B, C, hk, wk] with B=2, C=3, got [1, 3, 12, 13]"),
        ({"key": X.double()}, TypeError, "query, key: expected one dtype"),
        ({"start": torch.zeros(2, 5, 13, dtype=torch.int64)}, ValueError, "start: expected shape [B, hq, wq]"),
        ({"start": torch.zeros(2, 12, 13)}, TypeError, "start: expected torch.int64, got torch.float32"),
        ({"valid": torch.zeros(2, 12, 13)}, TypeError, "valid: expected torch.bool, got torch.float32"),
        ({"queries": (0, 0, 13, 13)}, ValueError, "queries: expected a box"),
        ({"patch": 4}, ValueError, "patch: expected an odd number, got 4"),
        ({"patch": 0}, ValueError, "patch: expected a number >= 1, got 0"),
        ({"iterations": -1}, ValueError, "iterations: expected a number >= 0, got -1"),
        ({"radius": -1}, ValueError, "radius: expected a number >= 0, got -1"),
        ({"seed": 2**32}, ValueError, "seed: expected a number >= 0 and <= 4294967295, got 4294967296"),
        ({"backend": "cuda"}, RuntimeError, "patchmatch has no cuda kernel"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"query": X, "key": X} | change
    with pytest.raises(error, match=re.escape(message)):
        patchmatch(**arguments)
