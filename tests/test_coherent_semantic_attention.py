"""coherent_semantic_attention: every backend against the float64 reference, ties, special values, and the flags."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inpaint_kernels import CoherentSemanticAttentionResult, coherent_semantic_attention, explain, use_backend
from inpaint_kernels.nn import CSA
from inpaint_kernels.portable import coherent_semantic_attention as portable
from inpaint_kernels.reference.coherent_semantic_attention import norm
from tests.coherent_maps import HOLES, KINDS, features, hole
from tests.compare import assert_close_to_reference, assert_same_indices

BACKENDS = [
    name
    for name in explain("coherent_semantic_attention", torch.zeros(1, 1, 2, 2), torch.eye(2)).usable
    if name != "reference"
]
WITH_REFERENCE = [*BACKENDS, "reference"]
VARIANTS = ("official", "paper")
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
needs_cpu_kernels = pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the native library")
has_fma = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def run(x: Tensor, flags: Tensor, backend: str, variant: str = "official") -> CoherentSemanticAttentionResult:
    return coherent_semantic_attention(x, flags, variant=variant, return_attention=True, backend=backend)


def all_scores(x: Tensor, flags: Tensor) -> Tensor:
    """Of every position with every position, in float64 [B, H * W, H * W]; masked keys are -inf."""
    vectors = x.double().flatten(2).transpose(1, 2)
    scores = vectors @ (vectors / norm(vectors)[..., None]).transpose(1, 2)
    return scores.masked_fill(flags.view(-1, 1, vectors.shape[1]), -math.inf)


def assert_same_bits(one: CoherentSemanticAttentionResult, other: CoherentSemanticAttentionResult) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


# ---- Values ----------------------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 17, 12, 9), (1, 130, 7, 20), (1, 19, 24, 24), (3, 33, 1, 40)], ids=str)
def test_equals_the_reference(backend, variant, kind, dtype, shape, poisoned_memory):
    x = features(kind, *shape, dtype=dtype)
    flags = torch.stack([hole(HOLES[i % 5], *shape[2:]) for i in range(shape[0])])
    got, eager = run(x, flags, backend, variant), run(x, flags, "reference", variant)
    expected = run(x.double(), flags, "reference", variant)
    assert got.output.dtype == dtype
    assert got.alpha.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Where two keys are equally good to rounding, another one makes other numbers: rounded features have such pairs.
    scores = all_scores(x, flags)
    best = scores.topk(2, 2).values
    if (best[..., 0] - best[..., 1] > 1e-5 * best[..., 0])[flags.flatten(1)].all():
        assert torch.equal(got.index, expected.index)
        for of_ours, of_eager, of_reference in zip(got, eager, expected, strict=True):
            if of_ours.is_floating_point():
                assert_close_to_reference(of_ours, of_reference, of_eager)
    else:
        masked = flags.flatten(1)
        assert_same_indices(got.index.flatten(1)[masked], scores[masked])
    assert torch.equal(got.output.where(~flags[:, None], 0), x.where(~flags[:, None], 0))
    known = ~flags
    assert (got.index[known] == -1).all()
    assert all((weight[known] == 0).all() for weight in (got.alpha, got.beta))


@on_every_backend
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", HOLES)
@pytest.mark.parametrize("size", [(16, 16), (12, 20)], ids=str)
def test_float64_is_exact_for_every_hole(backend, variant, kind, where, size):
    x, flags = features(kind, 1, 48, *size), hole(where, *size)
    got, expected = run(x, flags, backend, variant), run(x, flags, "reference", variant)
    assert torch.equal(got.index, expected.index)
    torch.testing.assert_close(got.output, expected.output, rtol=1e-12, atol=1e-13)


@on_every_backend
def test_float32_at_the_networks_size(backend):
    x, flags = features("relu", 1, 512, 32, 32), hole("centre", 32, 32)
    expected = run(x, flags, "reference")
    got = run(x.float(), flags, backend)
    assert torch.equal(got.index, expected.index)
    assert (got.output - expected.output).abs().max() <= 5e-6


@on_every_backend
@pytest.mark.parametrize("variant", VARIANTS)
def test_long_memory(backend, variant):
    """Small queries and large keys: alpha is near 1, and a row depends on hundreds of rows before it."""
    x = 1 + 0.2 * features("relu", 1, 16, 20, 30)
    flags = torch.zeros(20, 30, dtype=torch.bool)
    flags[2:] = True
    scale = torch.where(flags, 0.02, 1) if variant == "official" else torch.ones(20, 30)
    expected = run(x * scale, flags, "reference", variant)
    assert expected.alpha[0][flags][1:].mean() > (0.95 if variant == "official" else 0.45)
    got = run(x * scale, flags, backend, variant)
    torch.testing.assert_close(got.output, expected.output, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.alpha, expected.alpha, rtol=1e-12, atol=1e-15)


def test_blocks_that_guessed_wrong_are_repeated(monkeypatch):
    """Blocks of 2 rows need many passes, and in the end have seen what one block of everything sees, bit for bit."""
    x, flags = 1 + 0.2 * features("relu", 1, 16, 20, 10), torch.zeros(20, 10, dtype=torch.bool)
    flags[2:] = True
    x = x * torch.where(flags, 0.02, 1)
    results = []
    for block in (2, 32, 200):
        monkeypatch.setattr(portable, "BLOCK", block)
        results.append(run(x, flags, "portable"))
    for other in results[1:]:
        torch.testing.assert_close(other.output, results[0].output, rtol=1e-14, atol=0)


# ---- Bits ------------------------------------------------------------------------------------------------------------


def fused_chain(query: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Products [n, keys] by fused multiply-adds over c = 0, 1, ... in float32.

    A product of two float32 is exact in 80 bits, and so is nearly every sum; the conversion rounds once.
    """
    total = np.zeros((query.shape[0], keys.shape[0]), np.float32)
    for c in range(query.shape[1]):
        product = query[:, None, c].astype(np.longdouble) * keys[None, :, c].astype(np.longdouble)
        total = (product + total.astype(np.longdouble)).astype(np.float32)
    return total


@needs_cpu_kernels
@pytest.mark.skipif(not has_fma, reason="this processor has no fused multiply-add")
@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="numpy's long double is a double here")
@pytest.mark.parametrize("channels", [3, 40, 201])
def test_a_score_is_one_chain_of_fused_multiply_adds(channels):
    """Every other masked vector is a unit vector along the last channel, where all others are 0: then a is exactly 0,
    and what the op calls total = a + v is the score itself."""
    width, height = 20, 6
    x = torch.randn(1, channels, height, width)
    x[:, -1] = 0
    flags = torch.zeros(height, width, dtype=torch.bool)
    flags[:3] = True
    x[..., :3, ::2] = x[..., 5:, 3:4] = torch.eye(channels)[-1].view(1, -1, 1, 1)
    result = torch.ops.inpaint_kernels.coherent_semantic_attention(x, flags[None], "official", "official", 1.0, "cpu")
    odd = flags & (torch.arange(width) % 2 == 1)
    queries, keys = (x[0, :, of].T.numpy() for of in (odd, ~flags))
    squares = np.concatenate([fused_chain(key[None], key[None])[0] for key in keys])
    scores = fused_chain(queries, keys) * (np.float32(1) / (np.sqrt(squares) + np.float32(1e-8)))
    found = (~flags).flatten().nonzero()[:, 0][torch.from_numpy(scores.argmax(1))]
    assert torch.equal(result[1][0][odd], found)
    assert torch.equal(result[2][0][odd], torch.zeros(int(odd.sum())))
    assert torch.equal(result[4][0][odd], torch.from_numpy(scores.max(1)))


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads_and_any_batch(dtype):
    x = features("relu", 5, 72, 23, 30, dtype=dtype)
    flags = torch.stack([hole(kind, 23, 30) for kind in HOLES])
    expected = run(x, flags, "cpu")
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        assert_same_bits(run(x, flags, "cpu"), expected)
        for i in range(5):
            alone = run(x[i : i + 1], flags[i], "cpu")
            assert_same_bits(alone, CoherentSemanticAttentionResult(*(part[i : i + 1] for part in expected)))


# Many keys for each worker are searched with a filter of 16 bits in front, few are not: threads decide.
FILTERED, UNFILTERED = 1, 12

MANY_KEYS = {
    "smooth": lambda x: x,
    "one_vector": lambda x: x[..., :1, :1].expand_as(x).clone(),
    "nearly_one_vector": lambda x: x[..., :1, :1] * (1 + 1e-6 * torch.randn_like(x)),
    "few_vectors": lambda x: x[..., ::16, ::16].repeat_interleave(16, 2).repeat_interleave(16, 3),
    "one_channel": lambda x: torch.cat([1e4 * x[:, :1], 1e-4 * x[:, 1:]], 1),
    "short": lambda x: x * torch.logspace(-38, 0, x.shape[3]),
    "long": lambda x: x * torch.logspace(0, 19.5, x.shape[3]),
    "zeros": lambda x: x * (torch.rand(x.shape[2:]) > 0.5),
    "special": lambda x: torch.where(torch.rand_like(x) > 0.9999, x * math.inf, x.where(x < 2.5, math.nan)),
}


@needs_cpu_kernels
@pytest.mark.parametrize("kind", MANY_KEYS)
@pytest.mark.parametrize("channels", [7, 64])
def test_the_filter_of_many_keys_changes_no_bit(kind, channels):
    torch.manual_seed(0)
    x = MANY_KEYS[kind](features("relu", 1, channels, 128, 160, dtype=torch.float32))
    flags = torch.zeros(128, 160, dtype=torch.bool)
    flags[::9, ::11] = True
    torch.set_num_threads(UNFILTERED)
    expected = run(x, flags, "cpu")
    torch.set_num_threads(FILTERED)
    torch.testing.assert_close(run(x, flags, "cpu"), expected, rtol=0, atol=0, equal_nan=True)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layouts_give_the_same_bits_and_are_kept(backend, dtype):
    x, flags = features("relu", 2, 21, 11, 16, dtype=dtype), hole("centre", 11, 16)
    expected = run(x, flags, backend)
    last = x.contiguous(memory_format=torch.channels_last)
    result = run(last, flags, backend)
    assert result.output.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(result, expected)
    for moved in (
        x.repeat_interleave(2, 3)[..., ::2],
        x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        x.expand(2, -1, -1, -1).transpose(2, 3).contiguous().transpose(2, 3),
    ):
        assert not moved.is_contiguous()
        assert_same_bits(run(moved, flags, backend), expected)


@on_every_backend
def test_flags_in_every_form(backend):
    x, flags = features("relu", 2, 9, 8, 10), torch.stack([hole("centre", 8, 10), hole("scattered", 8, 10)])
    expected = run(x, flags, backend)
    for form in (flags[:, None], flags.float() * -0.5, flags.to(torch.uint8) * 255, flags.flip(2).flip(2)):
        assert_same_bits(run(x, form, backend), expected)
    one = run(x[:1], flags[0], backend)
    for form in (flags[:1], flags[:1, None], flags[0].int()):
        assert_same_bits(run(x[:1], form, backend), one)
    assert torch.equal(run(x, flags[0], backend).output[0], one.output[0])


# ---- Ties and special values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", WITH_REFERENCE)
def test_equal_scores_choose_the_lowest_index(backend):
    """Small integers: products are exact in every order, and so are ratios of norms that are powers of two."""
    x = torch.randint(0, 4, (1, 6, 9, 30)).float()
    x[..., 0, :] = 0
    x[0, :, 0, 7] = x[0, :, 5, 11] = torch.tensor([8.0, 0, 0, 0, 0, 0])  # norm 8: parallel to the next two
    x[0, :, 4, 20] = torch.tensor([2.0, 0, 0, 0, 0, 0])
    x[0, :, 8, 0] = torch.tensor([4.0, 0, 0, 0, 0, 0])
    flags = torch.zeros(9, 30, dtype=torch.bool)
    flags[2, 3:9] = True
    x[0, :, 2, 3:9] = torch.tensor([1.0, 0, 0, 0, 0, 0])[:, None]
    assert (run(x, flags, backend).index[0][flags] == 7).all()
    x[..., 0, 7] = 0
    assert (run(x, flags, backend).index[0][flags] == 4 * 30 + 20).all()


@needs_cpu_kernels
def test_duplicates_choose_the_first_whatever_the_tile():
    """Every known vector stands there three times, in other tiles and at other places of a tile."""
    vectors = features("relu", 1, 40, 1, 500, dtype=torch.float32)
    x = torch.cat((vectors, features("relu", 1, 40, 1, 203, dtype=torch.float32, seed=1), vectors, vectors), 3)
    flags = torch.zeros(1, x.shape[3], dtype=torch.bool)
    flags[0, 500:703] = True
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert (run(x, flags, "cpu").index[0][flags] < 500).all()


@pytest.mark.parametrize("backend", WITH_REFERENCE)
def test_a_nan_score_is_the_largest_and_rows_start_again(backend):
    x, flags = features("relu", 1, 12, 8, 9), hole("centre", 8, 9)
    masked = flags.flatten().nonzero()[:, 0]
    clean = run(x, flags, backend)
    x[0, 3].view(-1)[masked[2]] = math.nan  # a query: it takes the first known vector, and the next rows go on
    result = run(x, flags, backend)
    assert torch.equal(result.output.flatten(2)[0, :, masked[2]], x.flatten(2)[0, :, 0])
    assert result.output.isfinite().all()
    assert result.alpha.flatten()[masked[2]] == 0
    assert result.beta.flatten()[masked[2]] == 1
    assert torch.equal(result.index.flatten()[masked[3:]], clean.index.flatten()[masked[3:]])
    x[0, 3].view(-1)[masked[2]] = 0
    x[0, 1, 7, 2] = x[0, 0, 7, 5] = math.nan  # two keys: every query takes the first of them
    assert (run(x, flags, backend).index[0][flags] == 7 * 9 + 2).all()


@pytest.mark.parametrize("backend", WITH_REFERENCE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_vectors(backend, variant):
    """A zero query has s = 0, which the published layer divides by: here its row starts again."""
    x, flags = features("relu", 1, 12, 8, 9), hole("centre", 8, 9)
    masked = flags.flatten().nonzero()[:, 0]
    x.view(12, -1)[:, masked[3]] = 0
    x[..., 7, 7] = 0  # a key, which nobody takes
    result = run(x, flags, backend, variant)
    assert result.output.isfinite().all()
    assert result.index.flatten()[masked[3]] == 0
    assert torch.equal(result.output.flatten(2)[0, :, masked[3]], x.flatten(2)[0, :, 0])
    assert result.alpha.flatten()[masked[4]] > 0
    all_zero = run(torch.zeros(1, 4, 5, 5), hole("centre", 5, 5), backend, variant)
    assert (all_zero.output == 0).all()
    assert (all_zero.index[0][hole("centre", 5, 5)] == 0).all()


@pytest.mark.parametrize("backend", WITH_REFERENCE)
def test_a_sum_of_zero_starts_again(backend):
    """q_1 = (-2, 1, 0, 1) finds k = (0, 0, 0, 2) with v = 1, and looks back at y_0 = (|q_1| / 2, 0, 0, 0): a = -1."""
    x = torch.zeros(1, 4, 1, 5, dtype=torch.float64)
    x[0, :, 0, 0] = torch.tensor([1.0, 0, 0, 0])
    x[0, :, 0, 1] = torch.tensor([math.sqrt(6) / 2, 0, 0, 0])
    x[0, :, 0, 2] = torch.tensor([-2.0, 1, 0, 1])
    x[0, :, 0, 3] = torch.tensor([0.0, 0, 0, 2])
    x[0, :, 0, 4] = torch.tensor([0.0, 0, 3, 0])
    flags = torch.tensor([[True, False, True, False, True]])
    op = torch.ops.inpaint_kernels.coherent_semantic_attention
    total = op(x, flags[None], "official", "official", 1.0, backend)[4]
    assert total[0, 0, 2].isinf() or total[0, 0, 2].abs() < 1e-7  # in exact arithmetic it is 0
    # Powers of two leave no rounding: |q_1| = 2^34, so that 1e-8 is lost, and s = -2^33 + 2^33.
    big = 2.0**34
    x[0, :, 0, 2] = torch.tensor([-big / 2, -big / 2, big / 2, big / 2])
    x[0, :, 0, 1] = torch.tensor([big, 0, 0, 0])
    x[0, :, 0, 3] = torch.tensor([0, 0, 0, big])
    x[0, :, 0, 4] = torch.tensor([0, 0, 0, big])
    output, index, alpha, beta, total = op(x, flags[None], "official", "official", 1.0, backend)
    assert index[0, 0].tolist() == [1, -1, 3, -1, 3]
    assert alpha[0, 0].tolist() == [0, 0, 0, 0, 0.5]
    assert beta[0, 0].tolist() == [1, 0, 1, 0, 0.5]
    assert total[0, 0].tolist() == [math.inf, 0, math.inf, 0, 2 * big]
    assert torch.equal(output[..., 2], x[..., 3])


@pytest.mark.parametrize("backend", WITH_REFERENCE)
@pytest.mark.parametrize("gradient", ["official", "straight", "exact"])
def test_without_a_hole_nothing_happens(backend, gradient):
    x = features("relu", 2, 5, 6, 7).requires_grad_()
    nothing = torch.zeros(6, 7)
    assert coherent_semantic_attention(x, nothing, gradient=gradient, backend=backend) is x
    result = run(x, nothing, backend)
    assert torch.equal(result.output, x)
    assert (result.index == -1).all()
    flags = torch.stack([hole("none", 6, 7), hole("centre", 6, 7)])
    y = coherent_semantic_attention(x, flags, gradient=gradient, backend=backend)
    assert torch.equal(y[0], x[0])
    g = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, g)
    assert torch.equal(dx[0], g[0])


@pytest.mark.parametrize("backend", WITH_REFERENCE)
def test_empty_maps(backend):
    for shape in ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)):
        result = run(torch.zeros(shape), torch.zeros(shape[2:]), backend)
        assert result.output.shape == shape
        assert result.index.shape == (shape[0], *shape[2:])


# ---- Attention rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", WITH_REFERENCE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_rows_make_the_output(backend, variant):
    x, flags = features("smooth", 2, 9, 7, 10), torch.stack([hole("centre", 7, 10), hole("scattered", 7, 10)])
    x[1, :, 3, 3:5] = 0  # if masked, their rows start again
    result = run(x, flags, backend, variant)
    for sample in range(2):
        rows = result.rows(sample, torch.arange(70))
        expected = result.output[sample].flatten(1).t()
        torch.testing.assert_close(rows @ x[sample].flatten(1).t(), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rows.sum(1), torch.ones(70, dtype=rows.dtype))
        known = (~flags[sample]).flatten()
        assert torch.equal(rows[known], torch.eye(70, dtype=rows.dtype)[known])
        assert (rows[:, flags[sample].flatten()] == 0).all()
        some = torch.tensor([41, 3, 3])
        assert torch.equal(result.rows(sample, some), rows[some])


def test_attention_rows_reject_what_is_not_there():
    result = run(features("relu", 1, 4, 5, 6), hole("centre", 5, 6), "reference")
    with pytest.raises(ValueError, match="positions: expected raster indices below 30, got 30"):
        result.rows(0, torch.tensor([3, 30]))
    with pytest.raises(ValueError, match="sample: expected a number >= 0 and <= 0, got 1"):
        result.rows(1, torch.tensor([3]))
    with pytest.raises(ValueError, match=r"positions: expected shape \[n\]"):
        result.rows(0, torch.tensor([[3]]))


# ---- Flags of a mask -------------------------------------------------------------------------------------------------


def published_flags(mask: Tensor, layers: int, threshold: float) -> Tensor:
    """Convolutions of 4 x 4 weights 1 / 16, stride 2, zero border, then one comparison; in float64."""
    x, weight = mask.double(), torch.full((1, 1, 4, 4), 1 / 16, dtype=torch.float64)
    for _ in range(layers):
        x = F.conv2d(x, weight, stride=2, padding=1)
    return (x > threshold)[:, 0]


@pytest.mark.parametrize("size", [(256, 256), (64, 120), (203, 77), (263, 300)], ids=str)
@pytest.mark.parametrize(("layers", "threshold"), [(3, 5 / 16), (1, 0.5), (2, 0.3), (4, 0.0), (3, 0.999), (5, 5 / 16)])
def test_flags_are_the_published_ones(size, layers, threshold):
    noise = F.avg_pool2d(torch.randn(3, 1, size[0] + 16, size[1] + 16), 17, 1)
    mask = (noise > noise.quantile(0.6)).float()
    flags = CSA().set_mask(mask, layers, threshold)
    assert flags.dtype == torch.bool
    assert flags.shape == (3, size[0] >> layers, size[1] >> layers)
    assert torch.equal(flags, published_flags(mask, layers, threshold))
    assert threshold == 0.999 or flags.any()
    for form in (mask.bool(), mask * -3, mask.to(torch.uint8)):
        assert torch.equal(CSA().set_mask(form, layers, threshold), flags)
    assert torch.equal(CSA(mask[0, 0]).set_mask(mask[0, 0], layers, threshold), flags[:1])


def test_thresholds_are_compared_exactly():
    """A sum that equals the threshold is not above it."""
    mask = torch.zeros(64, 64)
    mask[24:40, 24:40] = 1  # sums of 1 to 4096 / 4096
    x = mask.double()[None, None]
    for _ in range(3):
        x = F.conv2d(x, torch.ones(1, 1, 4, 4, dtype=torch.float64), stride=2, padding=1)
    csa = CSA()
    for value in x.unique().tolist():
        if 0 < value < 4096:
            assert torch.equal(csa.set_mask(mask, 3, Fraction(int(value), 4096)), (x > value)[:, 0])
            below = Fraction(int(value), 4096) - Fraction(1, 10**9)
            assert torch.equal(csa.set_mask(mask, 3, below), (x >= value)[:, 0])


def test_thin_masks_are_never_flagged():
    csa = CSA()

    def flagged(height: int, width: int, places: list[tuple[int, int]]) -> list[bool]:
        masks = torch.zeros(len(places), 1, 96, 96)
        for mask, (top, left) in zip(masks, places, strict=True):
            mask[0, top : top + height, left : left + width] = 1
        return csa.set_mask(masks).flatten(1).any(1).tolist()

    steps = range(32, 40)
    squares = [(top, left) for top in steps for left in steps]
    across, along = [(top, 0) for top in steps], [(0, left) for left in steps]
    assert not any(flagged(5, 96, across) + flagged(96, 5, along))
    assert all(flagged(6, 96, across) + flagged(96, 6, along))
    assert not any(flagged(8, 8, squares))
    assert sum(flagged(10, 10, squares)) == 59
    assert all(flagged(12, 12, squares))
    x = features("relu", 1, 4, 12, 12)
    line = torch.zeros(96, 96)
    line[:, 40:45] = 1
    csa.set_mask(line)
    assert csa(x) is x


def test_module():
    mask = torch.zeros(2, 1, 64, 96)
    mask[0, :, 16:48, 24:60] = mask[1, :, :20, :20] = 1
    x = features("relu", 2, 7, 8, 12)
    csa = CSA(mask, variant="paper", gradient="straight", triple_weight=0.5, return_attention=True)
    assert "variant='paper', gradient='straight', triple_weight=0.5" in repr(csa)
    assert csa.mask_flags is not None
    assert csa.mask_flags[1].sum() < csa.mask_flags[0].sum()
    result = csa(x)
    assert_same_bits(result, coherent_semantic_attention(x, csa.mask_flags, variant="paper", return_attention=True))
    other = csa(x, mask_flags=hole("corner", 8, 12))
    assert not torch.equal(other.index, result.index)
    csa.set_mask(1 - mask)  # the flags follow the mask, always
    assert not torch.equal(csa(x).index, result.index)
    assert not list(csa.parameters())
    assert not csa.state_dict()
    with pytest.raises(ValueError, match="mask_flags: expected flags, or set_mask"):
        CSA()(x)


# ---- The op ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", WITH_REFERENCE)
def test_opcheck(backend):
    op = torch.ops.inpaint_kernels.coherent_semantic_attention.default
    flags = torch.stack([hole("centre", 6, 7), hole("scattered", 6, 7)])
    x = features("relu", 2, 5, 6, 7, dtype=torch.float32)
    for gradient in ("official", "straight", "exact"):
        torch.library.opcheck(op, (x.clone().requires_grad_(), flags, "official", gradient, 1.0, backend))
    for moved in (
        x.contiguous(memory_format=torch.channels_last),
        x.repeat_interleave(2, 3)[..., ::2],
        x.permute(3, 0, 2, 1).half().contiguous().permute(1, 3, 2, 0),
    ):
        torch.library.opcheck(op, (moved, flags, "paper", "exact", 1.0, backend))
    torch.library.opcheck(op, (x, hole("none", 6, 7)[None], "official", "official", 1.0, backend))


@on_every_backend
def test_compiles_into_one_graph(backend):
    compiled = torch.compile(coherent_semantic_attention, fullgraph=True, dynamic=True, backend="eager")
    for size in (8, 11):
        x, flags = features("relu", 1, 6, size, size + 1), hole("centre", size, size + 1)
        leaf = x.clone().requires_grad_()
        got = compiled(leaf, flags, gradient="exact", backend=backend)
        assert torch.equal(got, coherent_semantic_attention(x, flags, backend=backend))
        (gradient,) = torch.autograd.grad(got.sum(), leaf)
        again = x.clone().requires_grad_()
        y = coherent_semantic_attention(again, flags, gradient="exact", backend=backend)
        assert torch.equal(gradient, torch.autograd.grad(y.sum(), again)[0])
    assert torch.equal(compiled(x, torch.zeros(11, 12), backend=backend), x)


def test_exports():
    csa = CSA(torch.nn.functional.pad(torch.ones(1, 1, 32, 32), (32, 32, 32, 32)))
    x = features("relu", 1, 8, 12, 12, dtype=torch.float32)
    exported = torch.export.export(csa, (x,))
    assert any("coherent_semantic_attention" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(x), csa(x))


@on_every_backend
def test_autocast_computes_in_float32(backend):
    x, flags = features("relu", 1, 20, 9, 9, dtype=torch.bfloat16), hole("centre", 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(x, flags, backend)
    assert got.output.dtype == torch.float32
    assert_same_bits(got, run(x.float(), flags, backend))


def test_backends_are_explained_and_obeyed():
    x, flags = features("relu", 1, 4, 5, 6), hole("centre", 5, 6)
    explanation = explain("coherent_semantic_attention", x, flags, variant="paper")
    assert explanation.chosen == BACKENDS[0]
    assert "not on a CUDA device" in explanation.cannot["cuda"][0]
    with use_backend("reference", op="coherent_semantic_attention"):
        assert_same_bits(coherent_semantic_attention(x, flags, return_attention=True), run(x, flags, "reference"))


def test_does_not_touch_the_random_state():
    """Published code initialises a convolution per masked position, out of the global generator."""
    before = torch.get_rng_state()
    coherent_semantic_attention(features("relu", 1, 4, 5, 6), hole("centre", 5, 6))
    assert torch.equal(before, torch.get_rng_state())
