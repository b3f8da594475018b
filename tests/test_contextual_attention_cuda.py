"""The CUDA backend of contextual_attention: its host code around emulated kernels, and around real ones on a GPU."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benches import evidence
from inpaint_kernels import PRESETS, contextual_attention, use_backend
from inpaint_kernels.cuda_kernels import _contextual_attention_plan as planning
from inpaint_kernels.cuda_kernels import contextual_attention as cuda_kernels
from inpaint_kernels.ops import contextual_attention as op
from inpaint_kernels.portable._contextual_attention_tiles import Semantics
from inpaint_kernels.reference import contextual_attention as reference
from tests.compare import assert_close_to_reference
from tests.emulated_attention import EmulatedKernels, schemas
from tests.emulation_build import ROOT, module, needs_emulation
from tests.gpu_launches import TorchLaunches

FORWARD_KERNELS = ["rows", "scores", "statistics", "paste_weights", "paste", "matches"]
BACKWARD_KERNELS = ["rows", "scores", "statistics", "paste_weights", "softmax_backward"]
BACKWARD_KERNELS += ["fuse_backward", "patch_backward"]
SIZES = [((12, 16), (12, 16)), ((18, 14), (20, 26)), ((10, 10), (6, 8)), ((2, 12), (14, 2))]
OVERRIDES: list[dict[str, Any]] = [
    {"fuse": 0},
    {"fuse": 5, "patch": 5},
    {"patch": 1, "fuse": 0},
    {"patch": 2},
    {"patch": 4, "fuse": 3},
    {"paste_size": 3, "pad_cut": 0, "pad_put": 0, "divisor": 1.0},
    {"paste_size": 9, "pad_cut": 3, "pad_put": 3, "divisor": 0.0},
    {"masking": "inf", "norm": "sum"},
    {"masking": "fill", "floor": 1e-8, "norm": "add"},
    {"floor": 1e-2, "norm": "none", "scale": 2.0},
]


@pytest.fixture
def side(request, monkeypatch):
    """Cells or queries along a side of a tile."""
    monkeypatch.setattr(planning, "LARGEST_SIDE", request.param)
    planning.make_plan.cache_clear()
    yield request.param
    planning.make_plan.cache_clear()


def make_maps(f_size, b_size, batch=2, channels=3, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """f, b and a mask with a hole."""
    f, b = (torch.randn(batch, channels, *size, dtype=torch.float64).mul(0.4).to(dtype) for size in (f_size, b_size))
    mask = torch.zeros(batch, 1, *b_size)
    mask[0, :, : b_size[0] // 3, : b_size[1] // 3] = 1
    mask[-1, :, b_size[0] // 2 :, b_size[1] // 2 :] = 1
    return f, b, mask


def arguments_of(
    f: Tensor, b: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> tuple[list[Any], tuple[Any, ...]]:
    """What the backends of the op receive for a public call: tensors, and the fields of the preset."""
    names = ("value", "preset", "queries", "key_scale", "key_bias")
    given: dict[str, Any] = {**dict.fromkeys(names), "preset": "nipponjo", **options}
    value, preset, queries, key_scale, key_bias = (given.pop(name) for name in names)
    problem, selected = op._pose(f, b, mask, value, preset, queries, key_scale, key_bias, given)
    tensors = [*op._dense_maps_as_they_are(f.dtype, *problem[:3]), *problem[3:6], selected]
    return tensors, op._scalars(problem.semantics)


def emulated(f, b, mask=None, *, kernels: Any = None, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Output, index and maximum of a public call, by emulated kernels."""
    tensors, scalars = arguments_of(f, b, mask, options)
    return cuda_kernels.forward(*tensors, *scalars, True, kernels=kernels if kernels is not None else EmulatedKernels())


def emulated_gradients(grad, f, b, mask, *, kernels: Any = None, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of a public call, by emulated kernels."""
    tensors, scalars = arguments_of(f, b, mask, options)
    return cuda_kernels.backward(
        grad, *tensors, *scalars, kernels=kernels if kernels is not None else EmulatedKernels()
    )


def reference_gradients(grad, f, b, mask, **options) -> list[Tensor]:
    tensors, scalars = arguments_of(f, b, mask, options)
    leaves = [x.detach().clone().requires_grad_() for x in tensors[:3]]
    output = reference.forward(*leaves, *tensors[3:], *scalars, False)[0]
    return list(torch.autograd.grad(output, leaves, grad))


def relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def record(kernels: list[str], direction: str, f: Tensor, b: Tensor, options: dict[str, Any], error: float) -> None:
    """Note the case for benches/results/gpu_evidence.json."""
    shown = {name: value for name, value in options.items() if not isinstance(value, Tensor)}
    case = f"{direction} {f.dtype} {tuple(f.shape)} {tuple(b.shape)} tiles {planning.LARGEST_SIDE} {shown}"
    for kernel in kernels:
        evidence.record_emulated(f"contextual_attention_{kernel}_kernel", case, error)


def check_forward(f, b, mask, tolerance=1e-11, **options) -> None:
    output, index, maximum = emulated(f, b, mask, **options)
    tensors, scalars = arguments_of(f, b, mask, options)
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in tensors]
    expected = reference.forward(*wide, *scalars, True)
    error = relative_error(output, expected[0])
    assert error <= tolerance
    assert (maximum - expected[2]).abs().max() <= tolerance
    if f.dtype == torch.float64:
        assert torch.equal(index, expected[1])
    record(FORWARD_KERNELS, "forward", f, b, options, error)


# Forward --------------------------------------------------------------------------------------------------------------


@needs_emulation
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset(preset):
    f, b, mask = make_maps((12, 16), (12, 16))
    options = {"value": torch.randn(2, 3, 24, 32, dtype=f.dtype)} if PRESETS[preset].grid == "none" else {}
    check_forward(f, b, mask, preset=preset, **options)


@needs_emulation
@pytest.mark.parametrize("side", [64, 3], indirect=True)
@pytest.mark.parametrize(("f_size", "b_size"), SIZES)
def test_sizes_and_tiles(f_size, b_size, side):
    check_forward(*make_maps(f_size, b_size))


@needs_emulation
@pytest.mark.parametrize("side", [64, 21, 6], indirect=True)
@pytest.mark.parametrize("f_size", [(40, 44), (38, 80)])
@pytest.mark.parametrize("overrides", [{}, {"fuse": 0}, {"patch": 1, "fuse": 0}], ids=str)
def test_maps_that_are_walked_several_lines_at_once(overrides, f_size, side):
    """Large enough that most scores are far from the borders; tiles end after any number of lines."""
    f, b, mask = make_maps(f_size, (42, 40), channels=2)
    check_forward(f, b, mask, **overrides)
    check_forward(f.float(), b.float(), mask, tolerance=2e-5, **overrides)


@needs_emulation
@pytest.mark.parametrize("side", [64, 4], indirect=True)
@pytest.mark.parametrize("overrides", OVERRIDES, ids=str)
def test_general_parameters(overrides, side):
    f, b, mask = make_maps((14, 12), (12, 18))
    bias = {"key_scale": torch.rand(2, 6, 9) + 0.5, "key_bias": torch.randn(1, 6, 9)}
    check_forward(f, b, mask, **overrides, **bias)


@needs_emulation
@pytest.mark.parametrize("side", [64, 3], indirect=True)
@pytest.mark.parametrize("preset", PRESETS)
def test_queries_equal_the_full_call(preset, side):
    f, b, mask = make_maps((12, 16), (12, 16))
    options: dict[str, Any] = {"preset": preset}
    if PRESETS[preset].grid == "none":
        options["value"] = torch.randn(2, 3, 24, 32, dtype=f.dtype)
    full = emulated(f, b, mask, **options)
    height, width = full[1].shape[1:]
    for queries in ((1, 1, 3, 4), torch.rand(height, width) < 0.15):
        selected = op.query_mask(queries, (height, width))
        rate = full[0].shape[2] // height
        pixels = selected.repeat_interleave(rate, 0).repeat_interleave(rate, 1)
        output, index, maximum = emulated(f, b, mask, queries=queries, **options)
        torch.testing.assert_close(output, torch.where(pixels, full[0], 0), rtol=0, atol=1e-12)
        assert torch.equal(index, torch.where(selected, full[1], -1))
        torch.testing.assert_close(maximum, torch.where(selected, full[2], 0), rtol=0, atol=1e-12)


@needs_emulation
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_dtypes(dtype, tolerance):
    f, b, mask = make_maps((16, 12), (12, 16), channels=8, dtype=dtype)
    output, _, maximum = emulated(f, b, mask)
    assert output.dtype == dtype
    assert maximum.dtype == torch.float32
    check_forward(f, b, mask, tolerance=tolerance)


@needs_emulation
@pytest.mark.parametrize("masking", ["multiply", "inf", "fill"])
def test_nothing_valid(masking):
    f, b, _ = make_maps((8, 8), (8, 8))
    check_forward(f, b, torch.ones(2, 1, 8, 8), masking=masking)


@needs_emulation
def test_nothing_selected_and_empty_batch():
    f, b, mask = make_maps((12, 16), (12, 16))
    nothing = torch.zeros(6, 8, dtype=torch.bool)
    output, index, maximum = emulated(f, b, mask, queries=nothing)
    assert not output.any()
    assert (index == -1).all()
    assert not maximum.any()
    assert not any(x.any() for x in emulated_gradients(torch.randn(2, 3, 12, 16), f, b, mask, queries=nothing))
    output, index, _ = emulated(f[:0], b[:0], mask[:0])
    assert output.shape == (0, 3, 12, 16)
    assert index.shape == (0, 6, 8)


@needs_emulation
def test_nan_reaches_only_what_depends_on_it():
    f, b, _ = make_maps((32, 32), (8, 8), batch=1)
    f[0, 0, 16, 16] = float("nan")
    output = emulated(f, b)[0]
    assert output[..., 16:18, 16:18].isnan().all()
    assert output[..., :8, :].isfinite().all()
    assert output[..., 26:, :].isfinite().all()


@needs_emulation
def test_order_of_threads_does_not_matter():
    f, b, mask = make_maps((12, 16), (14, 10), dtype=torch.float32)
    grad = torch.randn(2, 3, 12, 16)
    for run, inputs in ((emulated, (f, b, mask)), (emulated_gradients, (grad, f, b, mask))):
        ascending, descending = (run(*inputs, kernels=EmulatedKernels(order=o)) for o in ("ascending", "descending"))
        assert all(torch.equal(one, other) for one, other in zip(ascending, descending, strict=True))


@needs_emulation
@pytest.mark.slow  # the sanitiser's build takes a minute
@pytest.mark.parametrize(
    "options", [{}, {"fuse": 0, "patch": 1}, {"patch": 5, "fuse": 5, "floor": 1e-3}, {"paste_size": 3, "divisor": 0.0}]
)
@pytest.mark.parametrize("sizes", [((6, 10), (8, 6)), ((40, 44), (42, 40))], ids=str)
def test_no_access_out_of_bounds(options, sizes):
    f_size, b_size = sizes
    f, b, mask = make_maps(f_size, b_size, batch=1, dtype=torch.float32)
    kernels = EmulatedKernels(build="asan")
    output, *_ = emulated(f, b, mask, kernels=kernels, **options)
    torch.testing.assert_close(output, emulated(f, b, mask, **options)[0], rtol=0, atol=0)
    emulated_gradients(torch.randn(output.shape), f, b, mask, kernels=kernels, **options)
    assert {*kernels.launches} >= {*FORWARD_KERNELS, *BACKWARD_KERNELS}


# Backward -------------------------------------------------------------------------------------------------------------


def check_backward(f, b, mask, tolerance=1e-9, **options) -> None:
    rate = arguments_of(f, b, mask, options)[1][8]
    tensors = arguments_of(f, b, mask, options)[0]
    grad = torch.randn(f.shape[0], tensors[2].shape[1], *(rate * n for n in tensors[0].shape[2:]), dtype=f.dtype)
    gradients = emulated_gradients(grad, f, b, mask, **options)
    expected = reference_gradients(grad.double(), f.double(), b.double(), mask, **options)
    error = max(relative_error(one, other) for one, other in zip(gradients, expected, strict=True))
    assert error <= tolerance
    record(BACKWARD_KERNELS, "backward", f, b, options, error)


@needs_emulation
@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if preset.grid != "none"])
def test_gradients_of_every_preset(preset):
    check_backward(*make_maps((12, 16), (12, 16)), preset=preset)


@needs_emulation
@pytest.mark.parametrize("side", [64, 3], indirect=True)
@pytest.mark.parametrize("overrides", OVERRIDES, ids=str)
def test_gradients_of_general_parameters(overrides, side):
    f, b, mask = make_maps((14, 12), (12, 18))
    bias = {"key_scale": torch.rand(2, 6, 9) + 0.5, "key_bias": torch.randn(1, 6, 9)}
    check_backward(f, b, mask, **overrides, **bias, queries=torch.rand(7, 6) < 0.7)


@needs_emulation
@pytest.mark.parametrize("side", [64, 3], indirect=True)
@pytest.mark.parametrize(("f_size", "b_size"), [*SIZES, ((8, 80), (10, 70))])
def test_gradients_of_sizes_and_tiles(f_size, b_size, side):
    check_backward(*make_maps(f_size, b_size))


@needs_emulation
@pytest.mark.parametrize("width", range(3, 9))
def test_gradients_of_queries_whose_fuse_wraps(width):
    """Positions at a line's other end have rows too: next to the queries' own, or with a gap of a few positions."""
    check_backward(*make_maps((12, 20), (12, 16)), queries=(0, 0, 6, width))


@needs_emulation
def test_gradients_in_float32():
    check_backward(*make_maps((16, 12), (12, 16), channels=8, dtype=torch.float32), tolerance=1e-4)


@needs_emulation
@pytest.mark.parametrize("norm", ["max", "sum", "add", "none"])
def test_gradient_at_zero_patches_is_finite(norm):
    f, b, mask = make_maps((12, 12), (12, 12))
    b[:, :, :6] = 0
    assert all(x.isfinite().all() for x in emulated_gradients(torch.ones(2, 3, 12, 12), f, b, mask, norm=norm))


@needs_emulation
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_gradients_of_half_precision(dtype, tolerance):
    """Operands of products are rounded, sums are not: errors are those of a few rounded terms."""
    check_backward(*make_maps((16, 12), (12, 16), channels=8, dtype=dtype), tolerance=tolerance)


@needs_emulation
@pytest.mark.parametrize("size_of_gradient", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("size_of_values", [1e-2, 1e3])
def test_gradients_of_float16_keep_their_range(size_of_values, size_of_gradient):
    """Gradients of scores from far below the smallest float16 to beyond the largest one."""
    f, b, mask = make_maps((12, 16), (12, 16), channels=8)
    f, b, value = f.half(), b.half(), (torch.randn(2, 8, 12, 16) * size_of_values).half()
    options = {"value": value, "scale": 1.0}
    grad = torch.randn(2, 8, 12, 16) * size_of_gradient
    gradients = emulated_gradients(grad, f, b, mask, **options)  # float32: the op rounds them only later
    expected = reference_gradients(grad.double(), f.double(), b.double(), mask, **_double(options))
    for one, other in zip(gradients, expected, strict=True):
        assert relative_error(one, other) < 2e-3


@needs_emulation
def test_the_public_gradient_of_half_precision_keeps_its_operands_short(monkeypatch):
    """The op hands maps to the CUDA backend as they are, the gradient in float32, and rounds the results."""
    seen: list[torch.dtype] = []

    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        seen.extend(x.dtype for x in arguments[:4])
        return tuple(torch.zeros_like(x, dtype=torch.float32) for x in arguments[1:4])

    monkeypatch.setitem(op._BACKWARD, "cuda", backward)
    f, b, mask = make_maps((12, 16), (12, 16), dtype=torch.bfloat16)
    tensors, scalars = arguments_of(f, b, mask, {})
    gradients = op._backward(torch.zeros(2, 3, 12, 16, dtype=torch.bfloat16), *tensors, *scalars, "cuda")
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16]
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients)


# Batches --------------------------------------------------------------------------------------------------------------


def product_of_each(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """A product whose bits do not depend on the other samples; torch's own may take another way for more of them."""
    products = torch.stack(
        [torch.mm(one.to(torch.float32), other.to(torch.float32)) for one, other in zip(a, b, strict=True)]
    )
    return products if out is None else out.copy_(products)


@needs_emulation
@pytest.mark.parametrize("side", [64, 3], indirect=True)
@pytest.mark.parametrize("samples_at_once", [5, 2])
def test_samples_of_a_batch_have_the_bits_they_have_alone(side, samples_at_once, monkeypatch):
    monkeypatch.setattr(cuda_kernels, "_product", product_of_each)
    monkeypatch.setattr(cuda_kernels, "_add_product", lambda total, a, b: total.add_(product_of_each(a, b)))
    monkeypatch.setattr(planning, "MOST_SAMPLES", samples_at_once)
    f, b, mask = make_maps((10, 14), (14, 10), batch=5, dtype=torch.float32)
    options = {"key_scale": torch.rand(5, 7, 5) + 0.5, "key_bias": torch.randn(1, 7, 5), "fuse": 3}
    tensors, scalars = arguments_of(f, b, mask, options)
    grad, kernels = torch.randn(5, 3, 10, 14), EmulatedKernels()

    def results(samples: slice) -> tuple[Tensor, ...]:
        own = [x[samples] if x is not None and x.shape[0] == 5 else x for x in tensors]
        forward = cuda_kernels.forward(*own, *scalars, True, kernels=kernels)
        return (*forward, *cuda_kernels.backward(grad[samples], *own, *scalars, kernels=kernels))

    together = results(slice(0, 5))
    for sample in range(5):
        for whole, alone in zip(together, results(slice(sample, sample + 1)), strict=True):
            assert torch.equal(whole[sample : sample + 1], alone)


def launches(batch: int) -> tuple[int, int]:
    """What a forward and a backward launch on a GPU."""
    f, b, mask = make_maps((12, 16), (12, 16), batch=batch, dtype=torch.float32)
    tensors, scalars = arguments_of(f, b, mask, {})
    grad = torch.randn(batch, 3, 12, 16)
    counts = []
    for run in (
        lambda kernels: cuda_kernels.forward(*tensors, *scalars, False, kernels=kernels),
        lambda kernels: cuda_kernels.backward(grad, *tensors, *scalars, kernels=kernels),
    ):
        kernels = EmulatedKernels()
        run(kernels)  # plans, and fills what is kept from call to call
        kernels.launches.clear()
        with TorchLaunches() as torch_launches:
            run(kernels)
        of_kernels = len(kernels.launches) + kernels.launches.count("key_norm")  # that one launches twice
        counts.append(of_kernels + len(torch_launches.names))
    return counts[0], counts[1]


@needs_emulation
def test_a_batch_takes_as_many_launches_as_one_sample():
    """Sample by sample, 16 of them took 353 launches forward and 1,024 backward."""
    forward, backward = launches(16)
    assert (forward, backward) == launches(1)
    assert forward <= 26
    assert backward <= 68


@needs_emulation
def test_what_does_not_fit_is_cut_into_groups(monkeypatch):
    f, b, mask = make_maps((12, 16), (12, 16), batch=5, dtype=torch.float32)
    whole = emulated(f, b, mask)
    planning.make_plan.cache_clear()
    monkeypatch.setattr(planning, "WORKSPACE_BYTES", 60_000)
    kernels = EmulatedKernels()
    output = emulated(f, b, mask, kernels=kernels)[0]
    planning.make_plan.cache_clear()
    assert kernels.launches.count("key_norm") == 3  # two samples at a time
    assert kernels.launches.count("scores") == 6  # of two tiles
    torch.testing.assert_close(output, whole[0], rtol=0, atol=2e-6)


# Index maps -----------------------------------------------------------------------------------------------------------


@needs_emulation
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 1), (2, 3), (6, 4)])
def test_steps_by_coordinates_are_the_maps_that_the_cpu_kernel_uses(height, width):
    maps, positions = module(), np.arange(height * width)
    for step in range(-9, 10):
        rows = maps.row_neighbour(positions, step, height * width)
        assert np.array_equal(maps.row_neighbour_by_steps(positions, step, height, width), rows)
        columns = maps.column_neighbour(positions, step, height, width)
        assert np.array_equal(maps.column_neighbour_by_steps(positions, step, height, width), columns)


# Schemas --------------------------------------------------------------------------------------------------------------

CPP_TYPES = {
    "const Tensor&": "Tensor",
    "Tensor": "Tensor",
    "const std::optional<Tensor>&": "Optional[Tensor]",
    "std::optional<Tensor>": "Optional[Tensor]",
    "int64_t": "int",
    "double": "float",
    "bool": "bool",
    "const std::string&": "str",
}


def test_boxed_functions_take_what_their_schemas_say():
    """No GPU is needed to find an op that cannot be called."""
    found = {}
    for path in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        text = path.read_text(encoding="utf-8")
        for name, function in re.findall(r'm\.impl\("(\w+)", TORCH_BOX\(&inpaint::(\w+)\)\)', text):
            declared = re.search(rf"^(?:void|Tensor) {function}\((.*?)\) {{", text, flags=re.MULTILINE | re.DOTALL)
            assert declared, function
            parameters = [" ".join(p.split()).rpartition(" ") for p in declared[1].split(",")]
            found[name] = [(CPP_TYPES[kind]) for kind, _, _ in parameters]
    assert found
    for name, types in found.items():
        assert [str(argument.type) for argument in schemas()[name].arguments] == types, name


# The plan -------------------------------------------------------------------------------------------------------------


def semantics_of(preset: str) -> Semantics:
    return Semantics(*op._scalars(PRESETS[preset]))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("purpose", ["output", "offsets", "gradients"])
def test_tiles_cover_everything_once(preset, purpose):
    semantics = semantics_of(preset)
    grid, more = (40, 33), semantics_of(preset).reach - 1
    plan = planning.make_plan(grid, (30, 50), semantics, None, purpose, 4, 4)
    covered = np.zeros(grid if purpose == "gradients" else (grid[0] + more, grid[1] + more), int)
    for tile in plan.tiles:
        top, left, height, width = tile.queries if purpose == "gradients" else tile.cells
        covered[top : top + height, left : left + width] += 1
    assert covered.max() == 1
    pad = semantics.pad_put // semantics.rate
    assert (covered[pad : pad + grid[0], pad : pad + grid[1]] == 1).all()


@pytest.mark.parametrize("purpose", ["output", "gradients"])
@pytest.mark.parametrize("size", [(32, 32), (96, 96), (250, 250), (512, 512), (3, 2000), (2000, 3)])
def test_workspace_stays_within_a_gibibyte(size, purpose):
    semantics = semantics_of("nipponjo")
    box = np.zeros(size, bool)
    box[: 2 + size[0] // 4, : 2 + size[1] // 4] = True
    plan = planning.make_plan(size, size, semantics, box.tobytes(), purpose, 4, 4)
    most = (plan.most_pixels, plan.most_scores, plan.most_cells, plan.most_queries)
    assert sum(planning.matrix_bytes(most, plan.keys, len(plan.phases), purpose, 4, 4)) < 2**30
    assert all(len(part.slices) <= planning.MAX_RUNS for tile in plan.tiles for part in (tile.pixels, tile.scores))


@pytest.mark.parametrize("purpose", ["output", "offsets", "gradients"])
@pytest.mark.parametrize("size", [64, 100, 250, 251])
def test_most_tiles_hold_whole_groups_of_lines(size, purpose):
    """The kernel takes nearly as long for what remains of one as for a whole group."""
    plan = planning.make_plan((size, size), (250, 250), semantics_of("nipponjo"), None, purpose, 4, 4)
    rows = sorted({(tile.queries[0], tile.queries[2]) for tile in plan.tiles})
    assert max(height for _, height in rows) < 1.5 * min(height for _, height in rows)
    assert all(height % planning.LINES == 0 for _, height in rows[:-2])


@pytest.mark.parametrize("purpose", ["output", "gradients"])
def test_samples_share_the_workspace(purpose):
    def samples(size: int, batch: int) -> int:
        return planning.make_plan(
            (size, size), (size, size), semantics_of("nipponjo"), None, purpose, 4, 4, batch
        ).samples

    assert samples(32, 16) == 16
    at_most = samples(32, 10_000)
    assert 30 < at_most < 80  # 1,024^2 scores are 4 MiB, and two to four matrices of this size share 640 MiB
    assert samples(250, 16) == 1


@pytest.mark.parametrize(("map_size", "multiple"), [(2, 8), (4, 4), (8, 4)])
@pytest.mark.parametrize("keys", [(5, 7), (6, 8), (3, 31)])
def test_lines_of_keys_are_padded_to_the_widest_access(keys, map_size, multiple):
    score_size = max(4, map_size)
    plan = planning.make_plan((4, 4), keys, semantics_of("nipponjo"), None, "output", score_size, map_size)
    rows, width = plan.keys.cells
    assert (rows, width % multiple, plan.keys.columns % multiple) == (keys[0] + 1, 0, 0)
    assert keys[1] + 1 <= width < keys[1] + 1 + multiple
    assert keys[0] * keys[1] <= plan.keys.columns < keys[0] * keys[1] + multiple
    assert plan.keys.logit_columns == keys[0] * width


def test_cost_is_that_of_the_queries():
    box = np.zeros((250, 250), bool)
    box[100:150, 100:150] = True
    few = planning.make_plan((250, 250), (250, 250), semantics_of("nipponjo"), box.tobytes(), "output", 4, 4)
    everything = planning.make_plan((250, 250), (250, 250), semantics_of("nipponjo"), None, "output", 4, 4)
    rows = [sum(tile.pixels.number for tile in plan.tiles) for plan in (few, everything)]
    assert rows[0] < 0.07 * rows[1]  # 4 % of the queries, and their halo


# On a GPU -------------------------------------------------------------------------------------------------------------


def on_gpu(options: dict[str, Any]) -> dict[str, Any]:
    return {name: x.cuda() if isinstance(x, Tensor) and name != "queries" else x for name, x in options.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", PRESETS)
def test_gpu_equals_the_reference(preset, dtype):
    f, b, mask = make_maps((44, 36), (38, 50), channels=16, dtype=dtype)
    options: dict[str, Any] = {"preset": preset}
    if PRESETS[preset].grid == "none":
        options["value"] = torch.randn(2, 3, 76, 100, dtype=torch.float64).to(dtype)
    expected = contextual_attention(f.double(), b.double(), mask, backend="reference", **_double(options))
    output = contextual_attention(f.cuda(), b.cuda(), mask.cuda(), backend="cuda", **on_gpu(options))
    assert output.dtype == dtype
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    assert relative_error(output.cpu().double(), expected) < tolerance


def _double(options: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if preset.grid != "none"])
def test_gpu_gradients_equal_the_references(preset, dtype):
    f, b, mask = make_maps((44, 36), (38, 50), channels=16, dtype=dtype)

    def gradients(device: str, to: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [x.to(device, to).requires_grad_() for x in (f, b)]
        output = contextual_attention(leaves[0], leaves[1], mask.to(device), preset=preset, backend=backend)
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape).to(device, to)
        return list(torch.autograd.grad(output, leaves, weights))

    expected = gradients("cpu", torch.float64, "reference")
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    for one, other in zip(gradients("cuda", dtype, "cuda"), expected, strict=True):
        assert relative_error(one.cpu().double(), other) < tolerance


@pytest.mark.gpu
def test_gpu_is_chosen_and_waits_for_nothing():
    f = torch.randn(1, 8, 64, 64, device="cuda")
    mask = torch.zeros(1, 1, 64, 64, device="cuda")
    contextual_attention(f, f, mask, queries=(4, 4, 12, 12))
    torch.cuda.set_sync_debug_mode("error")
    try:
        with use_backend("cuda"):
            contextual_attention(f, f, mask, queries=(4, 4, 12, 12))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_call_can_be_captured():
    f = torch.randn(1, 8, 64, 64, device="cuda")
    contextual_attention(f, f)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = contextual_attention(f, f)
    f.normal_()
    graph.replay()
    assert_close_to_reference(output, contextual_attention(f.cpu().double(), f.cpu().double(), backend="reference"))


@pytest.mark.gpu
def test_gpu_takes_as_many_launches_for_a_batch_as_for_one_sample():
    """Of forward and backward; all kernels that the profiler sees, torch's own among them."""

    def launches(batch: int) -> int:
        f = torch.randn(batch, 16, 64, 64, device="cuda", requires_grad=True)
        for _ in range(2):  # the first call plans
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                contextual_attention(f, f).sum().backward()
                torch.cuda.synchronize()
        return sum(event.count for event in profile.key_averages() if not event.key.startswith(("Mem", "cuda")))

    assert launches(16) <= launches(1) + 8  # a product of a batch may take another way


@pytest.mark.gpu
def test_gpu_uses_the_current_stream_and_gives_the_same_bits():
    f = torch.randn(2, 16, 128, 128, device="cuda")
    first = contextual_attention(f, f)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = contextual_attention(f, f)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(first, second)


@pytest.mark.gpu
def test_gpu_runs_a_2000x2000_image_within_a_gibibyte():
    f = torch.randn(1, 128, 500, 500, device="cuda").relu()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = contextual_attention(f, f)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2**30
    box = (60, 60, 64, 64)
    part = contextual_attention(f.cpu(), f.cpu(), queries=box)
    pixels = slice(2 * box[0], 2 * box[2]), slice(2 * box[1], 2 * box[3])
    assert relative_error(output[..., pixels[0], pixels[1]].cpu(), part[..., pixels[0], pixels[1]]) < 1e-3
