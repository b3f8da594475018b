"""CUDA kernels on the CPU: the emulation itself, the rules that kernels follow for it, and the first kernels in it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benches import evidence
from tests import emulation_build
from tests.compare import assert_close_to_reference
from tests.emulation_build import WrongAccessError, check, needs_emulation, run
from tests.kernel_rules import violations

# `make gpu` collects these tests with an interpreter that has torch and pytest, and perhaps no more.
hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

ROOT = Path(__file__).resolve().parents[1]
BUILDS = ["plain", pytest.param("asan", marks=pytest.mark.slow)]  # whose build takes a minute
ORDERS = ["ascending", "descending"]
FULL = 0xFFFFFFFF

pytest.importorskip("hypothesis.configuration").set_hypothesis_home_dir(str(ROOT / "build/hypothesis"))
quick = hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def unwritten(shape, dtype):
    """An array that shows what was not written: NaN, or the largest integer."""
    dtype = np.dtype(dtype)
    return np.full(shape, np.nan if dtype.kind == "f" else np.iinfo(dtype).max, dtype)


# ---- What CUDA promises ----------------------------------------------------------------------------------------------


@needs_emulation
@pytest.mark.parametrize("build", BUILDS)
def test_indices(build):
    blocks, threads = np.array([3, 2, 2], np.uint32), np.array([5, 3, 4], np.uint32)
    out = unwritten((12, 60, 12), np.int32)
    check(("indices", out, blocks, threads, 0), build=build)
    grid = np.stack(np.unravel_index(np.arange(12), (2, 2, 3))[::-1], -1)
    block = np.stack(np.unravel_index(np.arange(60), (4, 3, 5))[::-1], -1)
    assert (out[..., 0:3] == grid[:, None]).all()
    assert (out[..., 3:6] == block[None, :]).all()
    assert (out[..., 6:] == [3, 2, 2, 5, 3, 4]).all()


@needs_emulation
def test_empty_grid_is_no_launch():
    out = unwritten((1, 1, 12), np.int32)
    for blocks in ([0, 1, 1], [1, 0, 1], [1, 1, 0]):
        run(("indices", out, np.array(blocks, np.uint32), np.array([1, 1, 1], np.uint32), 0), build="plain")
    assert (out == unwritten((1, 1, 12), np.int32)).all()


@needs_emulation
@pytest.mark.parametrize(
    ("blocks", "threads", "shared_bytes"),
    [
        ([1, 1, 1], [1025, 1, 1], 0),
        ([1, 1, 1], [0, 1, 1], 0),
        ([1, 1, 1], [1, 1, 65], 0),
        ([1, 65536, 1], [1, 1, 1], 0),
        ([1, 1, 65536], [1, 1, 1], 0),
        ([1, 1, 1], [1, 1, 1], 99 * 1024 + 1),
    ],
)
def test_launch_that_cuda_refuses(blocks, threads, shared_bytes):
    out = unwritten((1, 1, 12), np.int32)
    call = ("indices", out, np.array(blocks, np.uint32), np.array(threads, np.uint32), shared_bytes)
    with pytest.raises(RuntimeError, match="invalid launch"):
        run(call, build="plain")


def shuffled(values, operand, width, kind):
    """NumPy's idea of a shuffle of whole warps."""
    lane = np.arange(len(values)) % 32
    begin = lane // width * width
    source = {
        "idx": begin + operand % width,
        "up": np.where(lane - operand < begin, lane, lane - operand),
        "down": np.where(lane + operand >= begin + width, lane, lane + operand),
        "xor": np.where(lane ^ operand >= begin + width, lane, lane ^ operand),
    }[kind]
    return values[np.arange(len(values)) // 32 * 32 + source]


@needs_emulation
@pytest.mark.parametrize("dtype", ["int32", "int64", "float32", "float64", "float16", "uint16"])
def test_shuffles(rng, dtype):
    threads = 96
    values = (rng.standard_normal(threads) * 1000).astype("int32" if dtype == "uint16" else dtype).astype(dtype)
    for width in (32, 16, 8, 2, 1):
        operand = rng.integers(0, 32, (4, threads)).astype(np.int32)
        # up, down and xor by one operand per warp, as a reduction does it, and by one of each lane
        out = unwritten((4, threads), dtype)
        check((f"shuffles_{dtype}", values, operand, out, FULL, width, threads), build="plain")
        for i, kind in enumerate(["idx", "up", "down", "xor"]):
            assert (out[i] == shuffled(values, operand[i], width, kind)).all(), (width, kind)


@needs_emulation
def test_shuffles_and_votes_of_some_lanes_and_of_a_partial_warp(rng):
    mask, threads = 0x00FF0F33, 56  # the second warp has 24 lanes
    inside = (mask >> np.arange(threads) % 32 & 1).astype(bool)
    values = rng.integers(0, 1000, threads).astype(np.int32)
    operand = np.zeros((4, threads), np.int32)
    operand[0] = 9
    operand[3] = 1
    out = unwritten((4, threads), np.int32)
    check(("shuffles_int32", values, operand, out, mask, 32, threads), build="plain")
    assert (out[0] == np.where(inside, np.repeat(values[[9, 41]], [32, 24]), 0)).all()
    assert (out[3] == np.where(inside, values[np.arange(threads) ^ 1], 0)).all()

    predicate = rng.integers(0, 2, threads).astype(np.int32)
    predicate[:32] = 1
    votes = unwritten((3, threads), np.uint32)
    check(("votes", predicate, votes, mask, threads), build="plain")
    for warp in (slice(0, 32), slice(32, 56)):
        taken = np.flatnonzero(inside[warp] & (predicate[warp] != 0))
        assert (votes[0, warp] == np.where(inside[warp], (1 << taken).sum(), 0)).all()
        assert (votes[1, warp] == np.where(inside[warp], len(taken) > 0, 0)).all()
        assert (votes[2, warp] == np.where(inside[warp], len(taken) == inside[warp].sum(), 0)).all()


@needs_emulation
def test_lanes_meet_by_their_masks(rng):
    values = rng.integers(0, 1000, 64).astype(np.int32)
    out = unwritten(64, np.int32)
    check(("half_warps", values, out, 64), build="plain")
    halves = values.reshape(2, 2, 16).sum(-1) * [[3, 1]]
    assert (out == np.repeat(halves.sum(-1), 32)).all()


@needs_emulation
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_reduction_through_dynamic_shared_memory(rng, build, dtype):
    calls, expected = [], []
    for count, blocks, threads in [(1000, 3, 128), (1, 2, 32), (70000, 2, 1024), (0, 1, 64)]:
        values, sums = rng.standard_normal(count).astype(dtype), unwritten(blocks, dtype)
        calls.append((f"block_sums_{dtype}", values, sums, count, blocks, threads))
        padded = np.zeros(-(-count // (blocks * threads)) * blocks * threads)
        padded[:count] = values
        expected.append(padded.reshape(-1, blocks, threads).sum((0, 2)))
    check(*calls, build=build)
    for (_, _, sums, *_), sum64 in zip(calls, expected, strict=True):
        np.testing.assert_allclose(sums, sum64, rtol=1e-5, atol=1e-4 if dtype == "float32" else 1e-11)


@needs_emulation
@pytest.mark.parametrize("build", BUILDS)
def test_transpose_through_static_shared_memory(rng, build):
    calls = []
    for dtype in ("float32", "int64"):
        for rows, columns in [(1, 1), (16, 16), (17, 45), (3, 100)]:
            values = (rng.standard_normal((rows, columns)) * 100).astype(dtype)
            calls.append((f"transpose_{dtype}", values, unwritten((columns, rows), dtype), rows, columns))
    check(*calls, build=build)
    for _, values, out, *_ in calls:
        assert (out == values.T).all()


@needs_emulation
@pytest.mark.parametrize("dtype", ["int32", "uint32", "uint64"])
def test_atomics_of_integers(rng, dtype):
    values = rng.integers(0 if dtype.startswith("u") else -50, 1000, 500).astype(dtype)
    out = np.array([0, 10**6, 0, 0, 0], dtype)
    check((f"atomics_{dtype}", values, out, 500, 3), build="plain")
    assert out.tolist() == [values.sum(), values.min(), values.max(), 1, 1]


@needs_emulation
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_atomic_sums_of_floats_depend_on_the_order(rng, dtype):
    values = (rng.standard_normal(500) * 10.0 ** rng.integers(-6, 1, 500)).astype(dtype)
    out = np.zeros(1, dtype)
    run((f"atomics_{dtype}", values, out, 500, 3), build="plain")
    np.testing.assert_allclose(out, values.sum(dtype=np.float64), rtol=1e-4)
    with pytest.raises(AssertionError, match="argument 1 depends on the order of threads"):
        check((f"atomics_{dtype}", values, np.zeros(1, dtype), 500, 3), build="plain")


def floats_around(narrow):
    """All 16-bit numbers, the points halfway between neighbours, their float neighbours, and what lies beyond."""
    exact = np.unique(narrow[np.isfinite(narrow)].astype(np.float64))
    middle = ((exact[1:] + exact[:-1]) / 2).astype(np.float32)
    points = [exact.astype(np.float32), middle, np.nextafter(middle, np.float32(np.inf))]
    points += [np.nextafter(middle, np.float32(-np.inf))]
    special = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 2.0**-25, 2.0**-25 * 1.0001]
    special += [65519.9, 65520, 1e9, 3.4028235e38, -3.4028235e38]
    return np.concatenate([*points, np.array(special, np.float32)])


@needs_emulation
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_floats_round_to_nearest_even(dtype):
    torch_dtype = getattr(torch, dtype)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch_dtype)
    values = floats_around(every.double().numpy())
    bits = np.zeros(len(values), "float16" if dtype == "float16" else "uint16")
    back = unwritten(len(values), np.float32)
    run((f"narrow_{dtype}", values, bits, back, len(values)), build="plain")

    expected = torch.from_numpy(values).to(torch_dtype)
    got = torch.from_numpy(bits.view(np.int16)).view(torch_dtype)
    numbers = ~np.isnan(values)
    assert (got.view(torch.int16) == expected.view(torch.int16))[torch.from_numpy(numbers)].all()
    assert got[~numbers].isnan().all()
    np.testing.assert_array_equal(back, expected.float().numpy())


@needs_emulation
def test_doubles_become_halves_by_one_rounding(rng):
    # 1 + 2^-11 lies halfway between two halves; a float cannot tell what is a little above it.
    special = [1 + 2.0**-11 + 2.0**-40, 1 + 2.0**-11, 1 + 2.0**-11 - 2.0**-40, -(1 + 2.0**-11 + 2.0**-40)]
    special += [
        np.nan,
        np.inf,
        -np.inf,
        1e300,
        -1e300,
        65519.999999999,
        65520.0,
        1e-300,
        2.0**-25 + 2.0**-60,
        0.0,
        -0.0,
    ]
    values = np.array([*special, *(rng.standard_normal(1000) * 10.0 ** rng.integers(-9, 6, 1000))])
    out = np.zeros(len(values), np.float16)
    run(("narrow_double_float16", values, out, len(values)), build="plain")
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out, values.astype(np.float16))


@needs_emulation
@pytest.mark.parametrize("build", BUILDS)
def test_alignment_and_minima_of_nan(build):
    out = unwritten(8, np.float32)
    values = np.array([5, 6, 7, 8], np.float32)
    check(("alignment", values, out), build=build)
    assert out.tolist() == [3, 0, 0, 0, 5, 6, 7, 8]


@needs_emulation
def test_memory_is_copied_and_cleared():
    out = unwritten(7, np.float32)
    run(("copy_and_clear", np.arange(1, 8, dtype=np.float32), out, 7), build="plain")
    assert out.tolist() == [1, 2, 3, 0, 0, 0, 0]


@needs_emulation
@pytest.mark.slow
def test_fibers_of_other_processors(rng):
    values, out = rng.integers(0, 1000, 64).astype(np.int32), unwritten(64, np.int32)
    check(("half_warps", values, out, 64), build="ucontext")
    assert (out == np.repeat((values.reshape(2, 2, 16).sum(-1) * [[3, 1]]).sum(-1), 32)).all()
    with pytest.raises(RuntimeError, match="divergent __syncthreads"):
        run(("divergent_barrier", 0, np.zeros(64, np.int32)), build="ucontext")


# ---- Arguments -------------------------------------------------------------------------------------------------------


@needs_emulation
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros(4),), "expected 3 arguments, got 1"),
        ((np.zeros(4), np.zeros(4, np.float32), 4), "expected an array of float32, got float64"),
        (([0.0], np.zeros(4, np.float32), 4), "expected a NumPy array"),
        ((np.zeros(4, np.float32), np.zeros(4, np.float32), 4.5), "'float' object cannot be interpreted as an integer"),
        ((np.zeros(4, np.float32), np.zeros(4, np.float32), [4]), "'list' object cannot be interpreted as an integer"),
        ((np.zeros((4, 4), np.float32)[:, 0], np.zeros(4, np.float32), 4), "expected a C-contiguous array"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        run(("copy_and_clear", *arguments), build="plain")


@needs_emulation
def test_read_only_arrays_and_wrong_structs_are_refused():
    out = np.zeros(4, np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        run(("copy_and_clear", np.zeros(4, np.float32), out, 4), build="plain")
    with pytest.raises(ValueError, match="expected an array of 12 bytes, got 8"):
        run(("indices", np.zeros(12, np.int32), np.zeros(2, np.uint32), np.zeros(3, np.uint32), 0), build="plain")


# ---- Planted bugs ----------------------------------------------------------------------------------------------------


@needs_emulation
@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "report"),
    [
        (("static_shift", np.zeros(64, np.float32), np.zeros(64, np.float32), 1), "global-buffer-overflow"),
        (("static_shift", np.zeros(64, np.float32), np.zeros(64, np.float32), -1), "global-buffer-overflow"),
        (("dynamic_shift", np.zeros(64, np.float32), np.zeros(64, np.float32), 1), "heap-buffer-overflow"),
        (("dynamic_shift", np.zeros(64, np.float32), np.zeros(64, np.float32), -1), "heap-buffer-overflow"),
        (("global_shift", np.zeros(64, np.float32), np.zeros(64, np.float32), 1, 0), "heap-buffer-overflow.*READ"),
        (("global_shift", np.zeros(64, np.float32), np.zeros(64, np.float32), 0, 1), "heap-buffer-overflow.*WRITE"),
        (("row_shift", np.zeros(64, np.float32), 1), r"index 64 out of bounds for type 'float \[64\]'"),
        (("misaligned", np.zeros(8, np.float32), np.zeros(1, np.float32), 1), "misaligned address"),
    ],
)
def test_access_out_of_bounds_is_found(call, report):
    with pytest.raises(WrongAccessError, match=rf"(?s){report}.*planted\.cu"):
        run(call, build="asan")


@needs_emulation
@pytest.mark.slow
def test_the_same_kernels_are_clean_without_their_bug():
    calls = []
    for name, rest in [("static_shift", (0,)), ("dynamic_shift", (0,)), ("global_shift", (0, 0))]:
        calls.append((name, np.arange(64, dtype=np.float32), unwritten(64, np.float32), *rest))
    check(*calls, build="asan")
    for _, values, out, *_ in calls:
        assert (out == values).all()
    value = np.zeros(1, np.float32)
    run(("misaligned", np.arange(8, dtype=np.float32), value, 4), build="asan")
    assert value == 22


@needs_emulation
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["static_float32", "static_float64", "static_float16", "dynamic_float32"])
def test_uninitialised_shared_memory_is_nan(kind, order):
    dtype = kind.partition("_")[2]
    values = np.arange(64).astype(dtype)
    # The second block sees nothing of what the first has written to the same place.
    for shift, first in [(0, values), (32, [*values[32:], *[np.nan] * 32])]:
        out = np.zeros((2, 64), dtype)
        run((f"uninitialised_{kind}", values, out, shift, 2), build="plain", order=order)
        np.testing.assert_array_equal(out[0], first)
        assert np.isnan(out[1]).all()
    out = np.zeros(64, np.float32)
    run(("never_written", out), build="plain", order=order)
    assert np.isnan(out).all()


@needs_emulation
@pytest.mark.parametrize("kind", ["static_int32", "dynamic_int32"])
def test_uninitialised_integers_differ_between_the_orders(kind):
    values = np.arange(64, dtype=np.int32)
    check((f"uninitialised_{kind}", values, np.zeros(64, np.int32), 0, 1), build="plain")
    with pytest.raises(AssertionError, match="argument 1 depends on the order of threads"):
        check((f"uninitialised_{kind}", values, np.zeros(64, np.int32), 1, 1), build="plain")


BARRIERS = ["one warp", "some lanes", "return", "two barriers", "correct"]
SHUFFLES = {
    "some lanes": "divergent __shfl_xor_sync.*thread .(16|48), 0, 0. has returned",
    "return": "divergent __shfl_down_sync.*thread .(31|63), 0, 0. has returned",
    "other masks": "divergent __shfl_xor_sync.*waits at __shfl_xor_sync with mask 0xffffffff .*has returned",
    "not in mask": "__shfl_xor_sync with mask 0x7fffffff .* leaves out the lane that calls it",
    "reads outside": "__shfl_sync with mask 0xffff .* reads lane 20, which takes no part",
    "two shuffles": "divergent __shfl_xor_sync.*waits at __shfl_xor_sync with mask 0xffffffff",
    "barrier": "divergent __any_sync.*waits at __syncthreads",
    "width": "__shfl_xor_sync with width 24",
    "correct": "",
}


@needs_emulation
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bug", BARRIERS)
def test_divergent_barrier_is_found(bug, order):
    out = np.zeros(64, np.int32)
    call = ("divergent_barrier", BARRIERS.index(bug), out)
    if bug == "correct":
        run(call, build="plain", order=order)
        assert out.all()
    else:
        with pytest.raises(RuntimeError, match=r"divergent __syncthreads: .*planted.cu:\d+.* in block \(0, 0, 0\)"):
            run(call, build="plain", order=order)


@needs_emulation
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bug", SHUFFLES)
def test_divergent_shuffle_is_found(bug, order):
    out = np.zeros(64, np.int32)
    call = ("divergent_shuffle", list(SHUFFLES).index(bug), out)
    if bug == "correct":
        run(call, build="plain", order=order)
        assert (out == np.arange(64) ^ 1).all()
    else:
        with pytest.raises(RuntimeError, match=SHUFFLES[bug]):
            run(call, build="plain", order=order)


@needs_emulation
@pytest.mark.slow
def test_divergence_is_found_under_the_sanitizer_too():
    with pytest.raises(RuntimeError, match=r"divergent __syncthreads: .*planted.cu"):
        run(("divergent_barrier", 0, np.zeros(64, np.int32)), build="asan")


@needs_emulation
def test_emulation_goes_on_after_a_failed_launch():
    for _ in range(3):
        with pytest.raises(RuntimeError, match="divergent"):
            run(("divergent_shuffle", 0, np.zeros(64, np.int32)), build="plain")
        out = np.zeros(64, np.int32)
        check(("divergent_shuffle", len(SHUFFLES) - 1, out), build="plain")
        assert (out == np.arange(64) ^ 1).all()


@needs_emulation
@pytest.mark.parametrize(
    "bug", [1, 2, 3, 4], ids=["after write", "after write below", "before rewrite", "within a warp"]
)
def test_missing_barrier_makes_the_orders_differ(rng, bug):
    values = rng.standard_normal(64).astype(np.float32)
    with pytest.raises(AssertionError, match="argument 2 depends on the order of threads"):
        check(("missing_barrier", bug, values, np.zeros(64, np.float32)), build="plain")


@needs_emulation
@pytest.mark.parametrize("build", BUILDS)
def test_with_all_its_barriers_the_kernel_is_right(rng, build):
    values, out = rng.standard_normal(64).astype(np.float32), unwritten(64, np.float32)
    check(("missing_barrier", 0, values, out), build=build)
    np.testing.assert_array_equal(out, (values + 1) + values[::-1])


@needs_emulation
def test_blocks_run_in_both_orders():
    with pytest.raises(AssertionError, match="argument 1 depends on the order"):
        check(("block_order", np.zeros(1, np.int32), np.zeros(3, np.int32), 3), build="plain")


# ---- Building --------------------------------------------------------------------------------------------------------


@needs_emulation
def test_change_of_a_source_or_a_flag_builds_again(monkeypatch, tmp_path):
    monkeypatch.setattr(emulation_build, "CACHE", tmp_path / "cache")
    source = tmp_path / "one.cpp"
    source.write_text("int one() { return 1; }\n")

    def build(*flags):
        emulation_build.compiled.cache_clear()
        return emulation_build.compiled("one.o", ("g++", *flags, "-c", str(source)), (source,))

    first = build()
    written = first.stat().st_mtime_ns
    assert build() == first
    assert first.stat().st_mtime_ns == written
    assert build("-O1") != first
    assert not first.exists()
    source.write_text("int one() { return 2; }\n")
    assert build() != first
    source.write_text("int one() { return nothing; }\n")
    with pytest.raises(AssertionError, match=r"(?s)does not compile:.*nothing"):
        build()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == []


@needs_emulation
def test_module_is_made_of_all_cuda_sources():
    names = {str(path.relative_to(ROOT)) for path in emulation_build.sources()}
    assert {"csrc/common.h", "csrc/cuda/contextual_attention.cu", "csrc/math/contextual_attention.h"} <= names
    assert {"tests/emulation/module.cpp", "tests/emulation/fiber.h", "tests/emulation/cuda_fp16.h"} <= names


# ---- The rules that kernels follow -----------------------------------------------------------------------------------


def cuda_sources():
    paths = [*(ROOT / "csrc/cuda").rglob("*"), *(ROOT / "csrc/math").rglob("*")]
    return {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in sorted(paths) if path.is_file()}


def test_cuda_sources_keep_the_rules():
    found = violations(cuda_sources())
    assert not found, "\n".join(found)


def test_every_cuda_source_is_emulated():
    module = (ROOT / "tests/emulation/module.cpp").read_text("utf-8")
    for path in (ROOT / "csrc/cuda").glob("*.cu"):
        assert f'#include "../../csrc/cuda/{path.name}"' in module, f"module.cpp does not include {path.name}"


def in_namespaces(text):
    return f"namespace inpaint {{\nnamespace {{\n{text}\n}}  // namespace\n}}  // namespace inpaint\n"


CORRECT = in_namespaces(
    """
// A return before a barrier would be wrong here, <<<so>>> would asm("this").
constexpr int kTable[] = {1, 2, 3};
struct Pair {
  int a = 0;
  __device__ int sum() const { return a; }
};
template <class T, int kSize>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T partial[kSize];
  alignas(16) __shared__ float other[4];
  const auto twice = [](T x) { return x + x; };
  for (int i = 0; i < kSize; ++i) {
    if (i > 3) continue;
    __syncthreads();
  }
  return twice(partial[0]);
}
template <class T>
__global__ void __launch_bounds__(256) sum_kernel(const T* in, T* out) {
  const T sum = block_sum<T, 32>(in[threadIdx.x]);
  if (threadIdx.x != 0) return;
  for (int i = 0; i < 4; ++i) if (i == 2) return;
  *out = sum;
}
inline void launch_sum(cudaStream_t stream) {
  if (stream == nullptr) return;
  launch_kernel(sum_kernel<float>, 1, 32, 0, stream, in, out);
}
"""
)


def test_correct_kernels_break_no_rule():
    assert violations({"csrc/cuda/sum.cu": CORRECT}) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (in_namespaces("void f() { kernel<<<1, 2, 0, stream>>>(x); }"), "3: launches without"),
        (in_namespaces("void f() { cudaLaunchKernel(kernel, 1, 2, 0, 0, stream); }"), "3: launches without"),
        (in_namespaces("__global__ void k() { extern __shared__ float x[]; }"), "3: extern __shared__"),
        (in_namespaces("__global__ void k() { extern __align__(16) __shared__ float x[]; }"), "3: extern __shared__"),
        (in_namespaces("__global__ void k() { __shared__ alignas(16) float x[4]; }"), "3: an alignment after"),
        (in_namespaces('__device__ void f() { asm volatile("bar.sync 0;"); }'), "3: inline PTX"),
        (in_namespaces("__device__ void f() { nvcuda::wmma::fill_fragment(a, 0); }"), "3: mma"),
        ('#include "mma.h"\n', "1: mma"),
        (in_namespaces("__device__ void f() { __pipeline_commit(); }"), "3: cp.async"),
        ("#include <cooperative_groups.h>\n", "1: cooperative groups"),
        ("namespace inpaint {\n__global__ void k() {}\n}\n", "2: k: a kernel outside"),
        ("template <class T>\n__global__ void __launch_bounds__(32) k(T x) {}\n", "2: k: a kernel outside"),
        ("namespace a {\n__device__ void f() {\n  __shared__ int x;\n}\n}\n", "2: f: shared memory outside"),
        (in_namespaces("__global__ void k() {\n  if (x) return;\n  __syncthreads();\n}"), "4: k: a return before"),
        (
            in_namespaces("__device__ int f() {\n  if (x) return 1;\n  return __any_sync(m, x);\n}"),
            "4: f: a return before",
        ),
        (
            in_namespaces("__global__ void k() {\n  for (;;) {\n    __syncwarp();\n    if (x) return;\n  }\n}"),
            "6: k: a return before",
        ),
        (
            in_namespaces("__global__ void k() {\n  while (x)\n    if (__shfl_sync(m, x, 0)) return;\n}"),
            "5: k: a return before",
        ),
        (
            in_namespaces(
                "__device__ void wait() { __syncthreads(); }\n__device__ void both() { wait(); }\n"
                "__global__ void k() {\n  if (x) return;\n  both();\n}"
            ),
            "6: k: a return before",
        ),
        (
            in_namespaces(
                "__global__ void k() {\n  f([&](int i) {\n    if (i) return;\n    __syncthreads();\n  });\n}"
            ),
            "5: k: a return before",
        ),
        (
            in_namespaces("__global__ void k() {\n  if (x) return;\n  f([&] { __syncthreads(); });\n}"),
            "4: k: a return before",
        ),
    ],
)
def test_planted_violations_are_found(text, expected):
    assert [found for found in violations({"csrc/cuda/x.cu": text}) if found.startswith(f"csrc/cuda/x.cu:{expected}")]
    assert len(violations({"csrc/cuda/x.cu": text})) == 1


def test_ptx_needs_a_plain_body():
    ptx = 'asm("bar.sync 0;");'
    good = f"#ifdef INPAINT_EMULATION\n  f();\n#else\n  {ptx}\n#endif\n"
    bad = f"#ifdef SOMETHING\n  {ptx}\n#endif\n"
    wrap = "__device__ void f() {{\n{}}}\n".format
    assert violations({"csrc/cuda/ptx.cuh": in_namespaces(wrap(good))}) == []
    (found,) = violations({"csrc/cuda/ptx.cuh": in_namespaces(wrap(bad))})
    assert "inline PTX without a plain C++ body" in found
    (found,) = violations({"csrc/cuda/other.cuh": in_namespaces(wrap(good))})
    assert re.search(r"other\.cuh:7: inline PTX$", found)


def test_barriers_in_other_files_are_seen():
    header = in_namespaces("__device__ float block_sum(float x) { __syncthreads(); return x; }")
    kernel = in_namespaces("__global__ void k() {\n  if (x) return;\n  block_sum(x);\n}")
    assert violations({"csrc/cuda/a.cuh": header, "csrc/cuda/k.cu": kernel}) == [
        "csrc/cuda/k.cu:4: k: a return before a barrier"
    ]


# ---- Index maps and scalar math --------------------------------------------------------------------------------------

sides, long_sides = st.integers(1, 9), st.integers(1, 2**20)
steps = st.integers(-20, 20)


def shifted(order, step):
    """For the p-th place of an order: which place comes `step` later, -1 past the ends."""
    later = np.full(order.shape, -1)
    count = len(order)
    source = np.arange(max(0, -step), min(count, count - step))
    later[order[source]] = order[source + step]
    return later


@needs_emulation
@quick
@hypothesis.given(height=sides, width=sides, step=steps)
def test_row_neighbour_runs_on_past_line_ends(height, width, step):
    count = height * width
    got = emulation_build.module().row_neighbour(np.arange(count), step, count)
    np.testing.assert_array_equal(got, shifted(np.arange(count), step))


@needs_emulation
@quick
@hypothesis.given(height=sides, width=sides, step=steps)
def test_column_neighbour_runs_on_past_line_ends(height, width, step):
    count = height * width
    got = emulation_build.module().column_neighbour(np.arange(count), step, height, width)
    column_major = np.arange(count).reshape(height, width).T.reshape(-1)
    np.testing.assert_array_equal(got, shifted(column_major, step))


@needs_emulation
@quick
@hypothesis.given(
    height=st.integers(1, 2**20), width=st.integers(1, 2**20), step=st.integers(-(2**20), 2**20), data=st.data()
)
def test_neighbours_undo_each_other_on_any_grid(height, width, step, data):
    module = emulation_build.module()
    p = data.draw(st.integers(0, height * width - 1))
    row = int(module.row_neighbour(p, step, height * width))
    assert row == (p + step if 0 <= p + step < height * width else -1)
    column = int(module.column_neighbour(p, step, height, width))
    if column >= 0:
        assert int(module.column_neighbour(column, -step, height, width)) == p
        y, x = divmod(column, width)
        assert x * height + y == p % width * height + p // width + step


@needs_emulation
@quick
@hypothesis.given(patch=st.integers(1, 99))
def test_window_surrounds_its_centre(patch):
    start = int(emulation_build.module().window_start(patch))
    offsets = range(start, start + patch)
    assert 0 in offsets
    assert -offsets[0] + (patch % 2 == 0) == offsets[-1]


# In the order of NormRule.
RULES = {
    "none": lambda squared, eps, elements: np.ones_like(squared),
    "add": lambda squared, eps, elements: np.sqrt(squared) + eps,
    "max": lambda squared, eps, elements: np.maximum(np.sqrt(squared), eps),
    "sum": lambda squared, eps, elements: np.sqrt(squared + eps * elements),
}


@needs_emulation
@pytest.mark.parametrize("rule", RULES)
@quick
@hypothesis.given(
    squared=st.floats(0, 1e30) | st.sampled_from([0.0, np.inf, np.nan]),
    eps=st.floats(0, 1e3),
    elements=st.integers(1, 10**6),
)
def test_patch_norm(rule, squared, eps, elements):
    module = emulation_build.module()
    number = list(RULES).index(rule)
    got = module.patch_norm_float64(number, squared, eps, elements)
    np.testing.assert_allclose(got, RULES[rule](np.float64(squared), eps, elements), rtol=1e-15)
    single = RULES[rule](np.float64(np.float32(squared)), np.float64(np.float32(eps)), elements)
    np.testing.assert_allclose(module.patch_norm_float32(number, squared, eps, elements), single, rtol=1e-6)


# ---- The key norm ----------------------------------------------------------------------------------------------------


def key_norm_reference(key, patch, rule, eps):
    """Energy and norm in float64."""
    before = (patch - 1) // 2
    margins = ((0, 0), (before, patch - 1 - before), (before, patch - 1 - before))
    energy = np.square(key.astype(np.float64)).sum(1)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(energy, margins), (patch, patch), (1, 2))
    return energy, RULES[rule](windows.sum((-2, -1)), eps, key.shape[1] * patch * patch)


def assert_emulated(kernel, case, result, reference):
    """Asserts that a result is near enough to the float64 reference, and records the case for the kernel's evidence."""
    assert_close_to_reference(torch.from_numpy(result), torch.from_numpy(reference))
    if reference.size:
        error = float(np.abs(result - reference).max() / (np.abs(reference).max() or 1.0))
        evidence.record_emulated(f"{kernel}<{'float' if result.dtype == np.float32 else 'double'}>", case, error)


@needs_emulation
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_key_norm(rng, dtype, build):
    calls, cases, expected = [], [], []
    for patch, shape, blocks in [
        (3, (2, 5, 9, 13), 1),
        (3, (2, 5, 9, 31), 2),
        (3, (1, 3, 17, 19), 7),
        (1, (1, 4, 3, 3), 1),
        (2, (1, 3, 5, 4), 3),
        (7, (1, 2, 4, 21), 2),
        (4, (3, 1, 1, 1), 1),
        (3, (0, 3, 4, 4), 0),
    ]:
        for number, rule in enumerate(RULES):
            key = rng.standard_normal(shape).astype(dtype)
            key[..., :2, :2] = 0  # patches without energy
            maps = (shape[0], *shape[2:])
            energy, norm = unwritten(maps, dtype), unwritten(maps, dtype)
            sizes = (*shape, patch, number, 2.0, blocks)
            calls.append((f"contextual_attention_key_norm_{dtype}", key, energy, norm, *sizes))
            cases.append(f"{build}, patch {patch}, {rule}, {'x'.join(map(str, shape))}, {blocks} blocks")
            expected.append(key_norm_reference(key, patch, rule, 2.0))
    check(*calls, build=build)
    for (_, _, energy, norm, *_), case, references in zip(calls, cases, expected, strict=True):
        assert_emulated("contextual_attention_key_energy_kernel", case, energy, references[0])
        assert_emulated("contextual_attention_key_norm_kernel", case, norm, references[1])
