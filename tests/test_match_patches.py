"""match_patches: every backend against the float64 reference and against a search written out."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from inpaint_kernels import PatchMatches, explain, match_patches
from inpaint_kernels.portable import match_patches as portable
from inpaint_kernels.reference.match_patches import patches
from tests.compare import assert_close_to_reference, assert_same_indices

BACKENDS = [name for name in explain("match_patches", *[torch.zeros(1, 1, 4, 4)] * 2).usable if name != "reference"]
WITH_REFERENCE = [*BACKENDS, "reference"]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def scores_of(
    query: Tensor, key: Tensor, patch: int, key_scale: Tensor | None, key_bias: Tensor | None, valid: Tensor | None
) -> Tensor:
    """All scores in float64, [B, hq, wq, keys]."""
    scores = patches(query.double(), patch).transpose(1, 2) @ patches(key.double(), patch)
    if key_scale is not None:
        scores = scores * key_scale.double().flatten(1)[:, None]
    if key_bias is not None:
        scores = scores + key_bias.double().flatten(1)[:, None]
    if valid is not None:
        scores = scores.masked_fill(~valid.flatten(1)[:, None], -math.inf)
    return scores.unflatten(1, query.shape[2:])


@on_every_backend
@pytest.mark.parametrize("patch", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_finds_the_largest_score(backend, patch, dtype, weighted):
    query, key = torch.randn(2, 3, 9, 11).to(dtype), torch.randn(2, 3, 7, 13).to(dtype)
    options: dict[str, Tensor | None] = {"key_scale": None, "key_bias": None, "valid": None}
    if weighted:
        options = {
            "key_scale": torch.rand(1, 7, 13) + 0.5,
            "key_bias": torch.randn(2, 7, 13),
            "valid": torch.rand(1, 7, 13) > 0.5,
        }
    index, score = match_patches(query, key, patch=patch, **options, backend=backend)
    expected = scores_of(query, key, patch, **options)
    assert_same_indices(index, expected)
    assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close_to_reference(score, expected.amax(-1))


@on_every_backend
@pytest.mark.parametrize("tile_bytes", [1, 20_000])
def test_result_does_not_depend_on_the_tiles(backend, tile_bytes, monkeypatch):
    query, key = torch.randn(1, 2, 12, 10, dtype=torch.float64), torch.randn(1, 2, 9, 8, dtype=torch.float64)
    bias = torch.randn(1, 9, 8, dtype=torch.float64)
    whole = match_patches(query, key, patch=3, key_bias=bias, backend=backend)
    monkeypatch.setattr(portable, "TILE_BYTES", tile_bytes)
    tiled = match_patches(query, key, patch=3, key_bias=bias, backend="portable")
    assert torch.equal(tiled.index, whole.index)
    torch.testing.assert_close(tiled.score, whole.score)


@pytest.mark.parametrize("backend", WITH_REFERENCE)
@pytest.mark.parametrize("kind", ["box", "mask", "nothing"])
def test_queries(backend, kind):
    query, key = torch.randn(2, 3, 9, 11), torch.randn(2, 3, 7, 13)
    full = match_patches(query, key, patch=5, backend=backend)
    wanted = torch.zeros(9, 11, dtype=torch.bool)
    if kind == "box":
        wanted[1:5, 2:9] = True
    elif kind == "mask":
        wanted = torch.rand(9, 11) < 0.3
    part = match_patches(query, key, patch=5, queries=(1, 2, 5, 9) if kind == "box" else wanted, backend=backend)
    assert torch.equal(part.index, full.index.where(wanted, -1))
    torch.testing.assert_close(part.score, full.score.where(wanted, -math.inf))


@pytest.mark.parametrize("backend", WITH_REFERENCE)
def test_weighted_squared_distance_as_a_correlation(backend):
    """The recipe of the docstring, against the distances of all patches written out."""
    patch, size = 3, 6
    image, other = torch.rand(1, 3, size, size), torch.rand(1, 3, 5, 7)
    weight = (torch.rand(1, 1, size, size) > 0.4).float()
    query = torch.cat((2 * weight * image, -weight), 1)
    key = torch.cat((other, other.square().sum(1, keepdim=True)), 1)
    x, w, k = (patches(y.double(), patch)[0].t() for y in (image, weight, other))
    difference = (x[:, None] - k[None]).square().unflatten(2, (3, patch**2)).sum(2)
    inside = patches(torch.ones_like(other[:, :1]).double(), patch)[0].t().bool().all(1).view(1, 5, 7)
    distance = (difference * w[:, None]).sum(2).masked_fill(~inside.flatten(), math.inf)
    index = match_patches(query, key, patch=patch, valid=inside, backend=backend).index
    assert_same_indices(index[0], -distance.view(size, size, -1))


@pytest.mark.parametrize("backend", WITH_REFERENCE)
def test_equal_scores_choose_the_lowest_valid_index(backend):
    query, key = torch.ones(1, 2, 3, 4), torch.ones(2, 5, 40)[None]
    assert (match_patches(query, key, patch=1, backend=backend).index == 0).all()
    valid = torch.zeros(1, 5, 40, dtype=torch.bool)
    valid[0, 2, 37] = valid[0, 3, 1] = valid[0, 4] = True
    result = match_patches(query, key, patch=1, valid=valid, backend=backend)
    assert (result.index == 2 * 40 + 37).all()
    assert (result.score == 2).all()


@pytest.mark.parametrize("backend", WITH_REFERENCE)
def test_nothing_valid(backend):
    x = torch.randn(2, 1, 4, 5)
    valid = torch.ones(2, 4, 5, dtype=torch.bool)
    valid[1] = False
    index, score = match_patches(x, x, patch=3, valid=valid, backend=backend)
    assert (index[0] >= 0).all()
    assert (index[1] == -1).all()
    assert (score[1] == -math.inf).all()


@pytest.mark.parametrize("backend", WITH_REFERENCE)
def test_nan_is_never_chosen_and_touches_only_its_patches(backend):
    query, key = torch.randn(1, 2, 8, 9), torch.randn(1, 2, 6, 7)
    clean = match_patches(query, key, patch=3, backend=backend)
    query[0, 1, 4, 5] = math.nan
    result = match_patches(query, key, patch=3, backend=backend)
    touched = torch.zeros(1, 8, 9, dtype=torch.bool)
    touched[:, 3:6, 4:7] = True
    assert not result.score.isnan().any()
    assert torch.equal(result.index[~touched], clean.index[~touched])
    assert torch.equal(result.score[~touched], clean.score[~touched])
    query[0, 1, 4, 5], key[0, 0, 2, 3] = 0, math.nan
    result = match_patches(query, key, patch=3, backend=backend)
    near = torch.zeros(6, 7, dtype=torch.bool)
    near[1:4, 2:5] = True
    assert result.score.isfinite().all()
    assert not near.flatten()[result.index[:, 1:-1, 1:-1]].any()  # at the border that pixel may meet no query pixel


@on_every_backend
def test_layouts_give_the_same_bits(backend):
    query, key = torch.randn(2, 3, 9, 11), torch.randn(2, 3, 7, 13)
    expected = match_patches(query, key, patch=3, backend=backend)
    for moved in (
        [x.contiguous(memory_format=torch.channels_last) for x in (query, key)],
        [x.repeat_interleave(2, 3)[..., ::2] for x in (query, key)],
        [x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for x in (query, key)],
    ):
        assert not moved[0].is_contiguous()
        result = match_patches(*moved, patch=3, backend=backend)
        assert torch.equal(result.index, expected.index)
        assert torch.equal(result.score, expected.score)


@on_every_backend
def test_same_bits_for_any_number_of_threads(backend):
    query, key = torch.randn(1, 7, 40, 44), torch.randn(1, 7, 40, 44)
    expected = match_patches(query, key, backend=backend)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        result = match_patches(query, key, backend=backend)
        assert torch.equal(result.index, expected.index)
        assert torch.equal(result.score, expected.score)


@pytest.mark.parametrize("backend", WITH_REFERENCE)
def test_empty_inputs(backend):
    none = match_patches(torch.zeros(0, 3, 4, 5), torch.zeros(0, 3, 6, 7), backend=backend)
    assert isinstance(none, PatchMatches)
    assert none.index.shape == none.score.shape == (0, 4, 5)


@on_every_backend
def test_there_is_no_gradient(backend):
    x = torch.randn(1, 2, 6, 6, requires_grad=True)
    result = match_patches(x, x, key_bias=torch.zeros(1, 6, 6, requires_grad=True), backend=backend)
    assert not result.score.requires_grad


@on_every_backend
def test_opcheck(backend):
    query, key = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 4, 7)
    op = torch.ops.inpaint_kernels.match_patches.default
    torch.library.opcheck(op, (query, key, None, None, None, None, 3, backend))
    per_key = torch.rand(1, 4, 7)
    torch.library.opcheck(op, (query, key, per_key > 0.2, per_key, per_key, torch.rand(5, 6) > 0.5, 2, backend))


@on_every_backend
def test_compiles_into_one_graph(backend):
    compiled = torch.compile(match_patches, fullgraph=True, dynamic=True, backend="eager")
    for size in (8, 11):
        x = torch.randn(1, 2, size, size + 1)
        got, expected = compiled(x, x, patch=3, backend=backend), match_patches(x, x, patch=3, backend=backend)
        assert torch.equal(got[0], expected.index)


X = torch.zeros(2, 3, 8, 9)
PER_KEY = torch.zeros(2, 8, 9)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": X[0]}, ValueError, "query: expected shape [B, C, hq, wq], got [3, 8, 9]"),
        ({"query": X.int()}, TypeError, "query: expected a floating-point tensor, got torch.int32"),
        ({"key": X[:1]}, ValueError, "key: expected shape [B, C, hk, wk] with B=2, C=3, got [1, 3, 8, 9]"),
        ({"key": X[:, :, :0]}, ValueError, "key: expected at least one key, got shape [2, 3, 0, 9]"),
        ({"key": X.double()}, TypeError, "query, key: expected one dtype, got query torch.float32, key torch.float64"),
        ({"key": X.to("meta")}, ValueError, "query, key: expected one device, got query on cpu, key on meta"),
        ({"patch": 0}, ValueError, "patch: expected a number >= 1, got 0"),
        ({"patch": 2.5}, TypeError, "patch: expected an integer, got float"),
        ({"valid": PER_KEY}, TypeError, "valid: expected torch.bool, got torch.float32"),
        ({"valid": PER_KEY[:, 1:] > 0}, ValueError, "valid: expected shape [B|1, hk, wk] with B=2, hk=8, wk=9"),
        ({"key_scale": PER_KEY.int()}, TypeError, "key_scale: expected a floating-point tensor, got torch.int32"),
        ({"key_bias": PER_KEY[0]}, ValueError, "key_bias: expected shape [B|1, hk, wk] with B=2, hk=8, wk=9"),
        ({"queries": (0, 0, 9, 9)}, ValueError, "queries: expected a box (y0, x0, y1, x1) inside 8 x 9"),
        ({"queries": torch.zeros(8, 9)}, TypeError, "queries: expected dtype torch.bool, got torch.float32"),
        ({"backend": "triton"}, RuntimeError, "match_patches: backend 'triton' was requested and cannot run"),
    ],
    ids=lambda x: x.split(", got")[0] if isinstance(x, str) else "",
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        match_patches(**{"query": X, "key": X, **arguments})
