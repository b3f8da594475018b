"""The CUDA backend of coherent_semantic_attention: its host code around emulated kernels, and real ones on a GPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benches import evidence, harness, report
from benches import gpu_coherent_semantic_attention as bench
from benches.gpu_coherent_semantic_attention import GpuCoherentCase
from benches.harness import BFLOAT16, FLOAT32
from inpaint_kernels import _native, coherent_semantic_attention
from inpaint_kernels.cuda_kernels import coherent_semantic_attention as cuda_kernels
from inpaint_kernels.reference import coherent_semantic_attention as reference
from tests.compare import assert_close_to_reference
from tests.emulated_coherent_attention import EmulatedKernels
from tests.emulation_build import needs_emulation
from tests.gpu_launches import TorchLaunches

VARIANTS = ["official", "paper"]
GRADIENTS = ["official", "straight", "exact"]
FORWARD_KERNELS = ["pack", "search", "matches", "products", "scan", "generate"]
BACKWARD_KERNELS = ["pack", "products", "coefficients", "scan_backward", "terms", "gradient"]
FILTER_KERNELS = ["pack", "operands", "filter", "search", "matches"]

# (top, bottom, left, right) of the hole in a map of this height and width.
HOLES = {
    "box": lambda h, w: (h // 4, 3 * h // 4, w // 4, 3 * w // 4),
    "one pixel": lambda h, w: (h - 1, h, 0, 1),
    "first pixels": lambda h, w: (0, 1, 0, w - 1),
    "nearly full": lambda h, w: (0, h - 1, 0, w),
}


def make_flags(size: tuple[int, int], *holes: str) -> Tensor:
    """[holes, H, W], each sample with its own hole; "none": none."""
    flags = torch.zeros(len(holes), *size, dtype=torch.bool)
    for flag, hole in zip(flags, holes, strict=True):
        if hole != "none":
            top, bottom, left, right = HOLES[hole](*size)
            flag[top:bottom, left:right] = True
    return flags


def make_features(*shape: int, dtype: torch.dtype = torch.float64, kind: str = "relu") -> Tensor:
    """Features; "gaussian" ones have weights of any sign and size, and short dtypes cannot follow the recurrence."""
    x = torch.randn(shape, dtype=torch.float64)
    if kind == "relu":
        x = x.relu() + 0.1
    elif kind == "smooth":
        x = torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1) + torch.rand(shape[1], 1, 1, dtype=x.dtype)
    return x.to(dtype)


def record(kernels: list[str], case: str, error: float) -> None:
    """Note the case for benches/results/gpu_evidence.json."""
    for kernel in kernels:
        evidence.record_emulated(f"coherent_semantic_attention_{kernel}_kernel", case, error)


def emulated(x: Tensor, flags: Tensor, variant: str = "official", kernels: Any = None) -> tuple[Tensor, ...]:
    return cuda_kernels.forward(x, flags, variant, kernels=kernels if kernels is not None else EmulatedKernels())


def relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected.double()).abs().max() / expected.abs().max().clamp_min(1e-30))


def check_forward(x: Tensor, flags: Tensor, variant: str, tolerance: float, kernels: Any = None) -> tuple[Tensor, ...]:
    result = emulated(x, flags, variant, kernels)
    expected = reference.forward(x.double().contiguous(), flags, variant)
    assert torch.equal(result[1], expected[1])
    assert torch.equal(result[4].isinf(), expected[4].isinf())
    finite = expected[4].isfinite()
    totals = tuple(of.where(finite, 0) for of in (result[4], expected[4]))
    pairs = [(result[2], expected[2]), (result[3], expected[3]), totals]
    error = relative_error(result[0], expected[0])
    assert error <= tolerance
    assert max(relative_error(one, other) for one, other in pairs) <= tolerance
    assert result[0].dtype == x.dtype
    assert all(of_positions.dtype == cuda_kernels._Call(x, flags, None).dtype for of_positions in result[2:])
    record(FORWARD_KERNELS, f"forward {x.dtype} {tuple(x.shape)} {int(flags.sum())} {variant}", error)
    return result


@pytest.fixture
def chunks_at_once(monkeypatch):
    """Every scan runs all chunks at once, in so many passes."""

    def set_passes(passes: int) -> None:
        monkeypatch.setattr(cuda_kernels, "SEQUENTIAL_CHUNKS", 0)
        monkeypatch.setattr(cuda_kernels, "PASSES", passes)

    return set_passes


# Forward --------------------------------------------------------------------------------------------------------------


@needs_emulation
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("hole", HOLES)
@pytest.mark.parametrize("size", [(16, 16), (9, 14), (1, 40), (23, 3)])
def test_forward_equals_the_reference(size, hole, variant):
    if hole == "nearly full" and size[0] == 1:
        pytest.skip("one row has no row to leave out")
    check_forward(make_features(1, 5, *size), make_flags(size, hole), variant, 1e-12)


@needs_emulation
@pytest.mark.parametrize("channels", [1, 16, 67, 130])
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_channels(channels, variant):
    kind = "smooth" if channels > 1 else "relu"
    check_forward(make_features(1, channels, 12, 12, kind=kind), make_flags((12, 12), "box"), variant, 1e-12)


@needs_emulation
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_sample_has_its_own_hole(layout, variant):
    x = make_features(5, 7, 13, 11).to(memory_format=layout)
    flags = make_flags((13, 11), "box", "none", "nearly full", "one pixel", "first pixels")
    output = check_forward(x, flags, variant, 1e-12)[0]
    assert output.stride() == x.stride()
    assert torch.equal(output.movedim(1, -1)[~flags], x.movedim(1, -1)[~flags])


@needs_emulation
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dtypes(dtype, tolerance, variant):
    layout = torch.channels_last if variant == "paper" else torch.contiguous_format
    x = make_features(2, 40, 12, 13, dtype=dtype).to(memory_format=layout)
    check_forward(x, make_flags((12, 13), "box", "nearly full"), variant, tolerance)


@needs_emulation
def test_maps_that_are_not_dense_keep_their_strides():
    x = make_features(2, 6, 10, 12).transpose(2, 3)
    flags = make_flags((12, 10), "box")
    output = check_forward(x, flags, "official", 1e-12)[0]
    assert output.stride() == x.stride()
    check_forward(torch.cat([x, x], 1)[:, ::2], flags, "official", 1e-12)


@needs_emulation
@pytest.mark.parametrize("filtered", [False, True])
def test_a_row_without_a_finite_sum_restarts(filtered, monkeypatch):
    """A zero query has s = 0; what follows goes on from the vector that it matched."""
    if filtered:
        monkeypatch.setattr(cuda_kernels, "LEAST_FILTERED_FLOPS", 0)
    x = make_features(1, 6, 12, 12, dtype=torch.float32)
    flags = make_flags((12, 12), "box")
    x[0, :, 5, 5:7] = 0
    output, _, alpha, beta, total = check_forward(x, flags, "official", 2e-6)
    assert total[0, 5, 5:7].isinf().all()
    assert (alpha[0, 5, 5:7] == 0).all()
    assert (beta[0, 5, 5:7] == 1).all()
    assert output.isfinite().all()


@needs_emulation
def test_a_nan_among_the_known_wins_and_leaves_no_trace_behind_the_next_restart():
    x = make_features(1, 6, 12, 12, dtype=torch.float32)
    x[0, 2, 0, 3] = math.nan
    flags = make_flags((12, 12), "box")
    expected = reference.forward(x, flags, "official")
    result = emulated(x, flags)
    assert (result[1][flags] == 3).all()
    assert torch.equal(result[1], expected[1])
    assert torch.equal(result[0].isnan(), expected[0].isnan())


# Search ---------------------------------------------------------------------------------------------------------------


def fused(sum_: Any, a: Any, b: Any) -> Any:
    """fma(a, b, sum) of float32 arrays: the product is exact in the long format, so is nearly every sum."""
    return (a.astype(np.longdouble) * b.astype(np.longdouble) + sum_.astype(np.longdouble)).astype(np.float32)


def scores_in_order(x: Tensor, flags: Tensor) -> tuple[Any, Any]:
    """Scores [queries, keys] as one chain of FMAs each, in float32, and the keys' positions; of one sample."""
    vectors, masked = x[0].float().flatten(1).t().numpy(), flags.flatten().numpy()
    queries, keys = vectors[masked], vectors[~masked]
    dots, squares = np.zeros((len(queries), len(keys)), np.float32), np.zeros(len(keys), np.float32)
    for c in range(x.shape[1]):
        dots = fused(dots, queries[:, None, c], keys[None, :, c])
        squares = fused(squares, keys[:, c], keys[:, c])
    return dots * (np.float32(1) / (np.sqrt(squares) + np.float32(1e-8))), np.flatnonzero(~masked)


def found_by(x: Tensor, flags: Tensor, **kernel_options: Any) -> tuple[Tensor, Tensor, EmulatedKernels]:
    """Scores and positions of the best keys of all queries, in raster order."""
    kernels = EmulatedKernels(**kernel_options)
    index = emulated(x, flags, kernels=kernels)[1]
    value = kernels.seen["search"][15]
    masked = flags.expand(len(x), -1, -1).flatten(1)
    of_queries = torch.cat([values[: int(own.sum())] for values, own in zip(value, masked, strict=True)])
    return of_queries, index.flatten(1)[masked], kernels


TILES = {"small tiles": False, "large tiles": True}


@pytest.fixture(params=TILES)
def tiles(request, monkeypatch):
    monkeypatch.setattr(cuda_kernels._Call, "fills_large_tiles", lambda self: TILES[request.param])


@needs_emulation
@pytest.mark.usefixtures("tiles", "poisoned_memory")
@pytest.mark.parametrize("blocks", [1, 3, 264])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_are_one_chain_of_fmas(dtype, blocks, monkeypatch):
    """Whatever the tiles and however many blocks share the keys."""
    monkeypatch.setattr(cuda_kernels, "SEARCH_BLOCKS", blocks)
    x, flags = make_features(1, 37, 18, 17, dtype=dtype, kind="gaussian"), make_flags((18, 17), "box")
    scores, positions = scores_in_order(x, flags)
    value, index, _ = found_by(x, flags)
    assert np.array_equal(value.numpy(), scores.max(1))
    assert np.array_equal(index.numpy(), positions[scores.argmax(1)])


@needs_emulation
@pytest.mark.usefixtures("tiles")
def test_equal_scores_are_decided_by_the_lower_position():
    """Copies, multiples by powers of two, and vectors that are zero: hundreds of ties."""
    distinct = make_features(1, 9, 1, 5, dtype=torch.float32, kind="gaussian")
    x = distinct[..., torch.arange(400) % 5].view(1, 9, 20, 20).clone()
    x *= torch.tensor([1.0, 2.0, 0.5, 4.0]).repeat(100).view(20, 20)
    flags = make_flags((20, 20), "box")
    x[:, :, 0, 0] = x[:, :, 7, 7] = 0
    scores, positions = scores_in_order(x, flags)
    _, index, _ = found_by(x, flags)
    assert np.array_equal(index.numpy(), positions[scores.argmax(1)])
    assert len(index.unique()) <= 6


@needs_emulation
@pytest.mark.skipif(
    not _native.available("coherent_semantic_attention_forward", "CPU"), reason="the CPU kernel is not built"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_search_finds_what_the_cpu_kernel_finds(dtype):
    """Whose scores are the same chains: near ties are decided alike."""
    x, flags = near_ties(dtype)
    result = coherent_semantic_attention(x, flags, backend="cpu", return_attention=True)
    assert torch.equal(emulated(x, flags)[1], result.index)


# Filter ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def filtered(monkeypatch):
    """Tensor cores filter every search, in tiles of a few queries and keys."""
    monkeypatch.setattr(cuda_kernels, "LEAST_FILTERED_FLOPS", 0)
    monkeypatch.setattr(cuda_kernels, "PRODUCT_BYTES", 4 * 40 * 64)
    monkeypatch.setattr(cuda_kernels, "KEYS_OF_PRODUCT", 64)


@pytest.fixture
def worst_products(monkeypatch):
    """Products that are off by as much as they may be, at random."""
    exactly = cuda_kernels._multiply

    def multiply(queries: Tensor, keys: Tensor, out: Tensor) -> Tensor:
        products = exactly(queries, keys, out)
        channels = queries.shape[-1]
        # Rounded operands have already taken at most this share.
        spare = cuda_kernels.product_error(channels) - 2.0**-10 * 1.001 - channels * 2.0**-24
        return products.add_(torch.empty_like(products).uniform_(-1, 1).sign_().mul_(0.9 * spare))

    monkeypatch.setattr(cuda_kernels, "_multiply", multiply)


def near_ties(dtype: torch.dtype, channels: int = 24, size: int = 16) -> tuple[Tensor, Tensor]:
    """Keys that differ from each other in the last bits, and queries that are such keys themselves."""
    base = torch.randn(1, channels, 1, 3, dtype=torch.float64).expand(-1, -1, size, -1)
    x = base.repeat(1, 1, 1, size // 3 + 1)[..., :size].clone()
    ulp = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    x *= 1 + ulp * torch.randint(-2, 3, x.shape)
    x *= torch.rand(size, size).mul(4).exp2()
    return x.to(dtype), make_flags((size, size), "box")


def assert_filter_finds_what_the_search_finds(x: Tensor, flags: Tensor, monkeypatch: Any) -> EmulatedKernels:
    value, index, kernels = found_by(x, flags)
    assert "filter" in kernels.launches
    with monkeypatch.context() as without:
        without.setattr(cuda_kernels, "LEAST_FILTERED_FLOPS", math.inf)
        expected_value, expected_index, plain = found_by(x, flags)
    assert "filter" not in plain.launches
    assert torch.equal(index, expected_index)
    assert torch.equal(value.nan_to_num(nan=7e7), expected_value.nan_to_num(nan=7e7))
    record(FILTER_KERNELS, f"filter {x.dtype} {tuple(x.shape)} {int(flags.sum())}", 0.0)
    return kernels


@needs_emulation
@pytest.mark.usefixtures("filtered", "worst_products", "poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["relu", "gaussian", "smooth", "near ties"])
def test_the_filter_finds_what_the_search_finds(kind, dtype, monkeypatch):
    if kind == "near ties":
        x, flags = near_ties(dtype)
    else:
        x, flags = make_features(2, 50, 16, 15, dtype=dtype, kind=kind), make_flags((16, 15), "box", "first pixels")
    kernels = assert_filter_finds_what_the_search_finds(x, flags, monkeypatch)
    assert kernels.launches.count("filter") > 4


@needs_emulation
@pytest.mark.usefixtures("filtered")
def test_few_keys_are_scored_again():
    """Else the filter would be a slow search; the reach of half precision is one in a thousand."""
    x, flags = make_features(1, 64, 20, 20, dtype=torch.float32, kind="gaussian"), make_flags((20, 20), "box")
    kernels = found_by(x, flags)[2]
    candidates = kernels.seen["search"][13]
    assert (candidates >= 1).all()
    assert candidates.double().mean() < 2.5


@needs_emulation
@pytest.mark.usefixtures("filtered", "worst_products")
def test_a_smaller_error_would_lose_candidates(monkeypatch):
    """The test above can fail."""
    x, flags = near_ties(torch.float32)
    monkeypatch.setattr(cuda_kernels, "product_error", lambda channels: 0.0)
    monkeypatch.setattr(cuda_kernels, "_multiply", lambda q, k, out: out.copy_(torch.rand_like(out)))
    with pytest.raises(AssertionError):
        assert_filter_finds_what_the_search_finds(x, flags, monkeypatch)


@needs_emulation
@pytest.mark.usefixtures("filtered")
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e18, 1e25])
def test_the_filter_at_extreme_lengths(scale, monkeypatch):
    """Squares that are 0 or infinite, of queries, keys or both."""
    flags = make_flags((12, 12), "box")
    for where in (flags, ~flags, torch.ones_like(flags), torch.rand(1, 12, 12) < 0.1):
        x = make_features(1, 8, 12, 12, dtype=torch.float32, kind="gaussian")
        assert_filter_finds_what_the_search_finds(torch.where(where[:, None], x * scale, x), flags, monkeypatch)


@needs_emulation
@pytest.mark.usefixtures("filtered")
@pytest.mark.parametrize("special", [0.0, math.nan, math.inf])
def test_the_filter_with_special_vectors(special, monkeypatch):
    flags = make_flags((12, 12), "box")
    x = make_features(1, 8, 12, 12, dtype=torch.float32, kind="gaussian")
    x[:, :, 5, 4:7] = special  # queries
    assert_filter_finds_what_the_search_finds(x, flags, monkeypatch)
    x[:, 3, 1, 2:9] = special  # keys
    x[:, :, 10, 2:9] = special
    assert_filter_finds_what_the_search_finds(x, flags, monkeypatch)


@needs_emulation
@pytest.mark.usefixtures("filtered")
def test_queries_with_too_many_candidates_are_searched(monkeypatch):
    """A flat region: every key can be the best, and some queries elsewhere have few."""
    x, flags = (
        make_features(1, 9, 36, 36, dtype=torch.float32, kind="gaussian"),
        torch.zeros(1, 36, 36, dtype=torch.bool),
    )
    flags[0, 30:33, 4:12] = True
    x[..., 1:, :] = x[..., :1, :1] * (1 + 2.0**-23 * torch.randint(-3, 4, x[..., 1:, :].shape))
    x[..., 31, 5:8] = x[..., 0, 5:8]  # not flat
    monkeypatch.setattr(cuda_kernels, "KEYS_OF_PRODUCT", 512)
    kernels = assert_filter_finds_what_the_search_finds(x, flags, monkeypatch)
    listed = int(kernels.seen["search"][6])
    assert 0 < listed < int(flags.sum())


@pytest.mark.parametrize("channels", [1, 64, 512, 2048])
def test_products_of_half_precision_are_within_their_error(channels):
    """And the error is not much larger than what operands can be off: the filter would let too much pass."""
    vectors = torch.randn(2, 300, channels, dtype=torch.float64)
    vectors[0, :100] = 1 + 2.0**-11 * (1 - 1e-9)  # all elements halfway to the next number of half precision
    vectors[:, 200:] *= torch.rand(100, channels, dtype=torch.float64).mul(30).neg().exp2()
    queries, keys = (v / torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in vectors)
    exact = queries @ keys.T
    products = cuda_kernels._multiply(queries.half()[None], keys.half()[None], torch.empty(1, 300, 300))[0]
    error = cuda_kernels.product_error(channels)
    assert (products - exact).abs().max() < error
    assert error < 1e-3 + 6e-7 * channels


@pytest.mark.parametrize(
    ("samples", "queries", "keys"), [(1, 15625, 46875), (16, 256, 768), (1, 1, 8), (3, 200_000, 600_000), (500, 60, 8)]
)
def test_products_stay_within_their_memory(samples, queries, keys):
    at_once, height, width = cuda_kernels.product_tile(samples, queries, keys)
    assert 1 <= at_once <= samples
    assert 1 <= height <= queries
    assert 1 <= width <= keys
    assert 4 * at_once * height * width <= cuda_kernels.PRODUCT_BYTES
    tiles = math.prod(-(-all_ // some) for all_, some in ((samples, at_once), (queries, height), (keys, width)))
    assert tiles <= 2 + 3 * 4 * samples * queries * keys / cuda_kernels.PRODUCT_BYTES


# Scan -----------------------------------------------------------------------------------------------------------------


@needs_emulation
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["relu", "gaussian"])
@pytest.mark.parametrize("passes", [1, 5])
def test_chunks_at_once_give_the_bits_of_chunks_in_turn(passes, kind, variant, chunks_at_once):
    """Gaussian features carry every vector to the end: what passes leave, the last launch settles."""
    x, flags = make_features(2, 12, 21, 20, dtype=torch.float32, kind=kind), make_flags((21, 20), "nearly full", "box")
    grad = torch.randn_like(x)

    def results() -> list[Tensor]:
        forward = emulated(x, flags, variant)
        return [*forward, *(backward_of(grad, x, flags, forward, variant, mode) for mode in ("straight", "exact"))]

    expected = results()
    chunks_at_once(passes)
    for one, other in zip(results(), expected, strict=True):
        assert torch.equal(one, other)


@needs_emulation
def test_passes_end_when_no_bit_changes(chunks_at_once):
    x, flags = make_features(1, 12, 24, 24, dtype=torch.float32, kind="smooth"), make_flags((24, 24), "nearly full")
    chunks_at_once(6)
    kernels = EmulatedKernels()
    emulated(x, flags, kernels=kernels)
    changed = kernels.seen["generate"][11].view(6, -1).any(1)
    assert changed[0]
    assert not changed[3:].any()


@needs_emulation
def test_gaussian_features_need_more_than_the_passes(chunks_at_once):
    """Else the last launch of the tests above had nothing to do."""
    x, flags = make_features(1, 64, 24, 24, dtype=torch.float64, kind="gaussian"), make_flags((24, 24), "nearly full")
    chunks_at_once(2)
    kernels = EmulatedKernels()
    emulated(x, flags, kernels=kernels)
    assert kernels.seen["generate"][11].view(2, -1)[1].any()


# Backward -------------------------------------------------------------------------------------------------------------


def backward_of(
    grad: Tensor,
    x: Tensor,
    flags: Tensor,
    results: tuple[Tensor, ...],
    variant: str,
    gradient: str,
    weight: float = 0.7,
    kernels: Any = None,
) -> Tensor:
    output, index, alpha, beta, total = results
    return cuda_kernels.backward(
        *(grad, x, flags, output, index, alpha, beta, total, variant, gradient, weight),
        kernels=kernels if kernels is not None else EmulatedKernels(),
    )


def in_float(results: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(of.cpu().to(dtype) if of.is_floating_point() else of.cpu() for of in results)


def reference_backward(
    grad: Tensor, x: Tensor, flags: Tensor, results: tuple[Tensor, ...], variant: str, gradient: str, weight: float
) -> Tensor:
    output, index, alpha, beta, total = results
    return reference.backward(grad, x, flags, output, index, alpha, beta, total, variant, gradient, weight)


def check_backward(
    x: Tensor, flags: Tensor, variant: str, gradient: str, tolerance: float, wide_expected: bool = True
) -> None:
    """Against float64, or with the coefficients of the result: on their last bits it depends what is cut off."""
    grad = torch.randn(x.shape, dtype=torch.float64).to(x)
    results = emulated(x, flags, variant)
    got = backward_of(grad, x, flags, results, variant, gradient)
    to = torch.float64 if wide_expected else torch.float32
    own = reference.forward(x.double(), flags, variant) if wide_expected else in_float(results, to)
    expected = reference_backward(grad.to(to), x.to(to), flags, own, variant, gradient, 0.7)
    assert got.dtype == x.dtype
    assert got.stride() == x.stride()
    error = relative_error(got, expected)
    assert error <= tolerance
    record(BACKWARD_KERNELS, f"backward {x.dtype} {tuple(x.shape)} {int(flags.sum())} {variant} {gradient}", error)


@needs_emulation
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("hole", HOLES)
def test_gradients_equal_the_references(hole, variant, gradient):
    check_backward(make_features(1, 5, 9, 20), make_flags((9, 20), hole), variant, gradient, 1e-11)


@needs_emulation
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_samples_with_their_own_holes(layout, variant, gradient):
    x = make_features(4, 70, 13, 11, kind="smooth").to(memory_format=layout)
    check_backward(x, make_flags((13, 11), "box", "none", "nearly full", "one pixel"), variant, gradient, 1e-11)


@needs_emulation
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_gradients_of_dtypes(dtype, tolerance, variant, gradient):
    x = make_features(2, 33, 12, 13, dtype=dtype)
    check_backward(x, make_flags((12, 13), "box", "nearly full"), variant, gradient, tolerance, gradient != "official")


@needs_emulation
@pytest.mark.parametrize("size_of_gradient", [1e-4, 1e3])
def test_official_weights_are_truncated_as_float32_is_rounded(size_of_gradient):
    """Uncorrelated features have large weights and many of them; the sum is dominated by which ones are cut off."""
    x, flags = make_features(1, 6, 14, 14, dtype=torch.float32, kind="gaussian"), make_flags((14, 14), "box")
    results = emulated(x, flags)
    index, alpha, beta = (of[0][flags[0]] for of in results[1:4])
    weights = reference.attention_rows(index, alpha, beta, 196).trunc()
    assert (weights.abs() >= 1).sum() > 3
    grad = torch.randn_like(x) * size_of_gradient
    got = backward_of(grad, x, flags, results, "official", "official", 1.0)
    rows = grad[0].flatten(1)[:, flags[0].flatten()].double()
    expected = grad[0].flatten(1).double()
    known = ~flags[0].flatten()
    expected[:, known] += expected[:, known] + rows @ weights.double()[:, known]
    assert relative_error(got[0].flatten(1), expected) < 1e-6


@needs_emulation
@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_gradients_where_rows_restart_and_vectors_are_zero(variant):
    x, flags = make_features(1, 6, 12, 12), make_flags((12, 12), "box")
    x[0, :, 5, 5:7] = 0  # queries
    x[0, :, 1, 1] = 0  # a key
    check_backward(x, flags, variant, "exact", 1e-11)


@needs_emulation
def test_exact_gradients_of_the_public_derivative():
    """Differences of the forward itself, in float64."""
    x, flags = make_features(1, 4, 9, 9), make_flags((9, 9), "box")
    for variant in VARIANTS:
        results = emulated(x, flags, variant)
        grad, step = torch.randn_like(x), torch.randn_like(x)
        got = (backward_of(grad, x, flags, results, variant, "exact") * step).sum()
        ahead, behind = (emulated(x + h * step, flags, variant)[0] for h in (1e-6, -1e-6))
        torch.testing.assert_close(got, ((ahead - behind) * grad).sum() / 2e-6, rtol=1e-6, atol=1e-6)


# Threads, accesses, launches ------------------------------------------------------------------------------------------


@needs_emulation
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("search", ["tiles", "filter"])
def test_order_of_threads_does_not_matter(search, variant, monkeypatch, chunks_at_once):
    if search == "filter":
        monkeypatch.setattr(cuda_kernels, "LEAST_FILTERED_FLOPS", 0)
        monkeypatch.setattr(cuda_kernels, "KEYS_OF_PRODUCT", 64)
        chunks_at_once(2)
    x, flags = make_features(2, 20, 14, 15, dtype=torch.float32), make_flags((14, 15), "box", "nearly full")
    grad = torch.randn_like(x)

    def results(order: Any) -> list[Tensor]:
        kernels = EmulatedKernels(order=order)
        forward = emulated(x, flags, variant, kernels)
        gradients = [backward_of(grad, x, flags, forward, variant, mode, kernels=kernels) for mode in GRADIENTS]
        return [*forward, *gradients]

    for one, other in zip(results("ascending"), results("descending"), strict=True):
        assert torch.equal(one, other)


@needs_emulation
@pytest.mark.slow  # the sanitiser's build takes a minute
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_access_out_of_bounds(variant, monkeypatch, chunks_at_once):
    if variant == "paper":
        monkeypatch.setattr(cuda_kernels, "LEAST_FILTERED_FLOPS", 0)
        chunks_at_once(1)
    x, flags = make_features(2, 5, 11, 9, dtype=torch.float32), make_flags((11, 9), "box", "nearly full")
    kernels = EmulatedKernels(build="asan")
    results = emulated(x, flags, variant, kernels)
    for one, other in zip(results, emulated(x, flags, variant), strict=True):
        assert torch.equal(one, other)
    for gradient in ("official", "exact") if variant == "official" else ("straight", "exact"):
        backward_of(torch.randn_like(x), x, flags, results, variant, gradient, kernels=kernels)
    assert len({*kernels.launches}) == (6 if variant == "official" else 8)


def launches(batch: int, run: str) -> int:
    """What a call launches on a GPU: ops of ours, each of a fixed number of kernels, and of torch."""
    x, flags = make_features(batch, 6, 12, 12, dtype=torch.float32), make_flags((12, 12), "box")
    results = emulated(x, flags)  # plans
    kernels, grad = EmulatedKernels(), torch.ones_like(x)
    with TorchLaunches() as of_torch:
        if run == "forward":
            emulated(x, flags, kernels=kernels)
        else:
            backward_of(grad, x, flags, results, "official", run, kernels=kernels)
    more = {"search": 1, "generate": 2, "backward_scan": 3 if run == "exact" else 1}
    return len(kernels.launches) + sum(more.get(name, 0) for name in kernels.launches) + len(of_torch.names)


@needs_emulation
@pytest.mark.parametrize(("run", "most"), [("forward", 6), ("official", 4), ("straight", 6), ("exact", 10)])
def test_launches(run, most):
    """The published layer makes 21,000 forward at 32x32; a batch takes as many as one sample."""
    assert launches(1, run) == most
    assert launches(16, run) == most


@needs_emulation
def test_samples_of_a_batch_have_the_bits_they_have_alone():
    x, flags = make_features(3, 9, 12, 14, dtype=torch.float32), make_flags((12, 14), "box", "nearly full", "one pixel")
    grad = torch.randn_like(x)

    def results(samples: slice) -> list[Tensor]:
        forward = emulated(x[samples], flags[samples])
        own = (grad[samples], x[samples], flags[samples], forward, "official")
        return [*forward, *(backward_of(*own, gradient) for gradient in GRADIENTS)]

    together = results(slice(0, 3))
    for sample in range(3):
        for whole, alone in zip(together, results(slice(sample, sample + 1)), strict=True):
            assert torch.equal(whole[sample : sample + 1], alone)


# The plan -------------------------------------------------------------------------------------------------------------


def test_a_plan_holds_every_position_once_and_is_kept():
    flags = make_flags((6, 7), "box", "nearly full")
    key = flags.numpy().tobytes()
    plan = cuda_kernels.make_plan(key, 2, 42, torch.device("cpu"))
    for mask, positions, row_of, known in zip(flags.flatten(1), plan.positions, plan.row_of, plan.known, strict=True):
        assert torch.equal(positions[:known].long(), (~mask).nonzero()[:, 0])
        assert torch.equal(positions[known:].long(), mask.nonzero()[:, 0])
        assert torch.equal(row_of[positions.long()].long(), torch.arange(42))
    assert (plan.most_known, plan.most_masked) == (int((~flags).flatten(1).sum(1).max()), 35)
    assert cuda_kernels.make_plan(key, 2, 42, torch.device("cpu")) is plan


def test_flags_that_are_written_to_make_another_plan():
    x, flags = make_features(1, 3, 6, 7), make_flags((6, 7), "box")
    before = cuda_kernels._Call(x, flags, None).plan
    flags[0, 0, 0] = True
    after = cuda_kernels._Call(x, flags, None).plan
    assert after.most_masked == before.most_masked + 1


def test_a_sample_without_a_known_position_is_refused():
    with pytest.raises(ValueError, match="known position in every sample"):
        cuda_kernels.make_plan(bytes([0, 1, 1, 1]), 2, 2, torch.device("cpu"))


@pytest.fixture
def short_sums():
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    yield
    torch.backends.cuda.matmul.allow_fp16_accumulation = False


def is_filtered(size: int, batch: int, dtype: torch.dtype = torch.float32) -> bool:
    call = cuda_kernels._Call(torch.empty(batch, 1, size, size, dtype=dtype), make_flags((size, size), "box"), None)
    call.channels = 512
    return call.is_filtered()


def test_the_filter_is_for_large_searches_and_never_for_float64():
    assert not is_filtered(32, 1)
    assert is_filtered(32, 16)
    assert is_filtered(64, 1)
    assert not is_filtered(64, 16, torch.float64)


@pytest.mark.usefixtures("short_sums")
def test_the_filter_is_not_for_sums_of_half_precision():
    assert not is_filtered(64, 1)


# The bench ------------------------------------------------------------------------------------------------------------


def predicted(case: GpuCoherentCase) -> float:
    return report.prediction(dict(case.facts()), report.H200_DATASHEET)


def test_predictions_meet_the_goals():
    """And no prediction is below its floor; launches and chains of the smallest case are not in its figure."""
    assert predicted(GpuCoherentCase(32, 1, FLOAT32)) < 20e-6
    assert predicted(GpuCoherentCase(250, 1, FLOAT32)) < 4e-3
    for case in bench.cases():
        assert report.floor(dict(case.facts()), report.H200_DATASHEET) < predicted(case)


def test_the_largest_search_is_750_gflop_on_tensor_cores():
    facts = GpuCoherentCase(250, 1, FLOAT32).facts()
    assert (facts["queries"], facts["keys"]) == (15625, 46875)
    assert facts["flops"] == 2 * 512 * 15625 * 46875
    assert facts["products"] == BFLOAT16
    assert "2000x2000 image" in report._gpu_title(dict(facts))
    assert GpuCoherentCase(32, 1, FLOAT32).facts()["products"] == FLOAT32


def passes_gate(case: GpuCoherentCase, monkeypatch: Any, small: bool = True) -> None:
    if not small:
        monkeypatch.setattr(bench, "LARGEST_NAIVE_SIZE", 0)
    names = [name for name in case.provider_names if name != bench.PRODUCTS]
    measurements, _ = harness.run_race([case.provider(name) for name in names], case.tolerances, seconds=0, rounds=1)
    for name in names:
        assert measurements[name].failure is None, (name, measurements[name].failure)


@pytest.mark.parametrize(("precision", "gradient"), [(FLOAT32, None), (FLOAT32, "exact"), (BFLOAT16, "official")])
def test_providers_pass_the_gate(precision, gradient, monkeypatch):
    passes_gate(GpuCoherentCase(16, 2, precision, gradient, device="cpu"), monkeypatch)


def test_large_cases_are_gated_by_their_first_rows(monkeypatch):
    passes_gate(GpuCoherentCase(20, 1, FLOAT32, device="cpu"), monkeypatch, small=False)


def test_a_mistake_does_not_pass_the_gate(monkeypatch):
    monkeypatch.setattr(bench, "_expected", lambda case: (bench._inputs(case)[0].double(),))
    with pytest.raises(AssertionError, match="WrongResult"):
        passes_gate(GpuCoherentCase(16, 1, FLOAT32, device="cpu"), monkeypatch)


def test_the_products_alone_run_in_both_precisions(monkeypatch):
    for least in (0, math.inf):
        monkeypatch.setattr(cuda_kernels, "LEAST_FILTERED_FLOPS", least)
        monkeypatch.setattr(cuda_kernels, "PRODUCT_BYTES", 1 << 14)
        assert bench.bare_products(GpuCoherentCase(16, 3, FLOAT32, device="cpu"))() == ()


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(32, 32), (44, 70)])
def test_gpu_equals_the_reference(size, dtype, variant):
    x, flags = make_features(2, 96, *size, dtype=dtype), make_flags(size, "box", "first pixels")
    expected = reference.forward(x.double(), flags, variant)
    result = cuda_kernels.forward(x.cuda(), flags, variant)
    assert torch.equal(result[1].cpu(), expected[1])
    tolerance = {torch.float64: 1e-11, torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert relative_error(result[0].cpu(), expected[0]) < tolerance
    for gradient in GRADIENTS:
        grad = torch.randn(x.shape).to(dtype)
        of_gpu = (result[0], result[1], result[2], result[3], result[4])
        got = cuda_kernels.backward(grad.cuda(), x.cuda(), flags, *of_gpu, variant, gradient, 1.0)
        to = torch.float32 if gradient == "official" and dtype != torch.float64 else torch.float64
        own = in_float(result, to)
        expected_gradient = reference_backward(grad.to(to), x.to(to), flags, own, variant, gradient, 1.0)
        assert relative_error(got.cpu(), expected_gradient) < 10 * tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["relu", "gaussian", "near ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu_filter_finds_what_the_search_finds(dtype, kind, monkeypatch):
    """And both what the CPU's kernel finds, bit for bit."""
    if kind == "near ties":
        x, flags = near_ties(dtype, channels=300, size=96)
    else:
        x, flags = make_features(1, 300, 96, 96, dtype=dtype, kind=kind), make_flags((96, 96), "box")
    found = []
    for least in (0, math.inf):
        monkeypatch.setattr(cuda_kernels, "LEAST_FILTERED_FLOPS", least)
        found.append(cuda_kernels.forward(x.cuda(), flags, "official")[1].cpu())
    assert torch.equal(*found)
    result = coherent_semantic_attention(x, flags, backend="cpu", return_attention=True)
    assert torch.equal(found[0], result.index)


@pytest.mark.gpu
def test_gpu_waits_for_nothing():
    """Not even for the plan of flags that it has never seen."""
    x = torch.rand(1, 64, 40, 40, device="cuda", requires_grad=True)
    for warm in (True, False):
        flags = torch.rand(1, 40, 40) < 0.3
        torch.cuda.set_sync_debug_mode("default" if warm else "error")
        try:
            for gradient in GRADIENTS:
                coherent_semantic_attention(x, flags, gradient=gradient, backend="cuda").sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_call_can_be_captured():
    x, flags = torch.rand(1, 64, 32, 32, device="cuda"), make_flags((32, 32), "box")
    for _ in range(2):
        coherent_semantic_attention(x, flags)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = coherent_semantic_attention(x, flags)
    x.uniform_()
    graph.replay()
    expected = reference.forward(x.cpu().double(), flags, "official")[0]
    assert_close_to_reference(output, expected)


@pytest.mark.gpu
def test_gpu_runs_a_2000x2000_image_in_bounded_memory():
    """The published layer would take 74 GB."""
    x = torch.rand(1, 512, 250, 250, device="cuda")
    flags = make_flags((250, 250), "box")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = coherent_semantic_attention(x, flags)
    torch.cuda.synchronize()
    # Rows and output are 122 MiB each, operands 61, products 64.
    assert torch.cuda.max_memory_allocated() - before < 512 << 20
    assert torch.equal(output[0][:, ~flags[0]], x[0][:, ~flags[0]])
