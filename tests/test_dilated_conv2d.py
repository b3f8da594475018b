"""dilated_conv2d: every backend against the float64 reference, and the reference against loops over pixels and taps."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inpaint_kernels import dilated_conv2d, explain
from inpaint_kernels.nn import DilatedConv2d
from inpaint_kernels.portable import _convolution
from tests.convolutions import (
    BORDERS,
    LAYOUTS,
    UPSAMPLED,
    ZEROS,
    Arguments,
    PeakMemory,
    assert_equals_reference,
    assert_gradients_equal_reference,
    assert_layout,
    backends,
    compiled_graphs,
    gradients,
    in_dtype,
    layer,
    naive_convolution,
)

BACKENDS = backends("dilated_conv2d")
GEOMETRIES = [*ZEROS, *BORDERS, *UPSAMPLED]
ACTIVATIONS = ("relu", "elu", "leaky_relu", "none")

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
with_the_reference_too = pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
in_both_layouts = pytest.mark.parametrize("layout", ["nchw", "channels_last"])


@pytest.fixture(autouse=True)
def _one_thread():
    """The maps here are too small for two, which would wait for each other on a busy machine."""
    torch.set_num_threads(1)


def with_residual(arguments: Arguments, layout: str = "nchw") -> Arguments:
    y = dilated_conv2d(**arguments, backend="reference")
    return {**arguments, "residual": LAYOUTS[layout](torch.randn(y.shape, dtype=torch.float64).to(y.dtype))}


# Against the reference ------------------------------------------------------------------------------------------------


@on_every_backend
@in_both_layouts
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_geometry_equals_the_reference(backend, layout, geometry):
    for channels in ((3, 4), (9, 22)):
        arguments = layer(geometry, channels, layout=layout)
        assert_equals_reference(dilated_conv2d, arguments, backend)
        assert_equals_reference(dilated_conv2d, with_residual(arguments, layout), backend)


@on_every_backend
@in_both_layouts
@pytest.mark.parametrize("rate", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rates_and_dtypes(backend, layout, rate, dtype):
    arguments = layer({"kernel": 3, "padding": rate, "dilation": rate}, (24, 17), dtype=dtype, layout=layout)
    assert_equals_reference(dilated_conv2d, arguments, backend)
    assert_equals_reference(dilated_conv2d, with_residual(arguments), backend)


@on_every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_activations(backend, activation, dtype):
    arguments = layer({"kernel": 3, "padding": 2, "dilation": 2, "activation": activation}, dtype=dtype)
    for slope in (0.2, 0.0):
        for case in (arguments, with_residual(arguments)):
            assert_equals_reference(dilated_conv2d, {**case, "negative_slope": slope}, backend)
            assert_gradients_equal_reference(dilated_conv2d, {**case, "negative_slope": slope}, backend)


@on_every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual_layout", LAYOUTS)
def test_layouts(backend, layout, residual_layout):
    arguments = layer({"kernel": 3, "padding": 1}, (4, 6), layout=layout, dtype=torch.float32)
    assert_equals_reference(dilated_conv2d, with_residual(arguments, residual_layout), backend)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_run_on_the_portable_backend(groups):
    arguments = layer({"kernel": 3, "padding": 2, "dilation": 2, "groups": groups}, (4, 8))
    assert explain("dilated_conv2d", **arguments).chosen == "portable"
    assert_equals_reference(dilated_conv2d, with_residual(arguments), "portable")
    assert_gradients_equal_reference(dilated_conv2d, with_residual(arguments), "portable")


@on_every_backend
@in_both_layouts
@pytest.mark.parametrize("geometry", [ZEROS[5], ZEROS[8], ZEROS[11], BORDERS[1], BORDERS[9], *UPSAMPLED], ids=str)
def test_gradients(backend, layout, geometry):
    assert_gradients_equal_reference(dilated_conv2d, with_residual(layer(geometry, layout=layout)), backend)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_short_dtypes(backend, dtype, activation):
    arguments = layer({"kernel": 3, "padding": 2, "dilation": 2, "activation": activation}, (8, 6), dtype=dtype)
    assert_gradients_equal_reference(dilated_conv2d, with_residual(arguments), backend)


# Oracles that share nothing with the reference ------------------------------------------------------------------------


@with_the_reference_too
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_equals_loops_over_pixels_and_taps(backend, geometry):
    size = (8, 9) if geometry.get("padding", 0) != 12 else (13, 14)
    arguments = layer(geometry, (2, 3), size=size, batch=1)
    expected = naive_convolution(**arguments).clamp(min=0)
    torch.testing.assert_close(dilated_conv2d(**arguments, backend=backend), expected, rtol=1e-12, atol=1e-12)


@with_the_reference_too
def test_equals_torch(backend):
    """GLCIC's dilated layers: 3x3, rates 2 to 16, padding = rate."""
    for rate in (2, 4, 8, 16):
        arguments = layer({"kernel": 3, "padding": rate, "dilation": rate}, (16, 16), dtype=torch.float64)
        expected = F.relu(F.conv2d(**arguments))
        torch.testing.assert_close(dilated_conv2d(**arguments, backend=backend), expected, rtol=1e-12, atol=1e-12)


# Gradient -------------------------------------------------------------------------------------------------------------


@with_the_reference_too
@pytest.mark.parametrize("activation", ["elu", "leaky_relu", "none"])
def test_gradcheck(backend, activation):
    arguments = with_residual(layer({"kernel": 3, "padding": 2, "dilation": 2}, (2, 3), size=(5, 6), batch=1))
    x, weight, bias, residual = (arguments.pop(name).requires_grad_() for name in ("x", "weight", "bias", "residual"))

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        options: Arguments = {**arguments, "activation": activation, "backend": backend}
        return dilated_conv2d(x, weight, bias, residual=residual, **options)

    assert torch.autograd.gradcheck(call, (x, weight, bias, residual), fast_mode=True)


@with_the_reference_too
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
def test_one_gradient_alone(backend, wanted):
    arguments = with_residual(layer({"kernel": 3, "padding": 1}))
    expected = gradients(dilated_conv2d, arguments, "reference")[wanted]
    arguments[wanted].requires_grad_()
    y = dilated_conv2d(**arguments, backend=backend)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (got,) = torch.autograd.grad(y, arguments[wanted], weights)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@with_the_reference_too
@pytest.mark.parametrize("act", ["elu", "leaky_relu", "none"])
def test_second_gradient(backend, act):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 4, 3), (2, 2, 3, 3), (2,))
    leaves = [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]

    def call(x, weight, bias):
        return dilated_conv2d(x, weight, bias, padding=1, activation=act, backend=backend)

    assert torch.autograd.gradgradcheck(call, leaves)


def test_gradient_penalty_of_a_part_of_the_inputs():
    arguments = layer({"kernel": 3})
    x = arguments["x"].requires_grad_()
    weight = arguments["weight"].requires_grad_()
    results = []
    for backend in ("reference", None):
        y = dilated_conv2d(**arguments, backend=backend)
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), weight)[0])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_gradient_of_the_bare_op_with_a_residual_is_an_error():
    x, weight = torch.zeros(1, 2, 4, 4, requires_grad=True), torch.zeros(2, 2, 1, 1)
    op = torch.ops.inpaint_kernels.dilated_conv2d
    y = op(x, weight, None, (1, 1), (0, 0, 0, 0), (1, 1), 1, 1, False, "relu", 0.2, x.detach(), "portable")
    with pytest.raises(RuntimeError, match="the torch op has no gradient with a residual"):
        y.sum().backward()


# Memory, reproducibility ----------------------------------------------------------------------------------------------


@in_both_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_portable_holds_input_output_and_some_bands(monkeypatch, layout, dtype):
    arguments = layer(
        {"kernel": 3, "padding": 2, "dilation": 2}, (8, 16), size=(96, 64), batch=1, dtype=dtype, layout=layout
    )
    arguments = with_residual(arguments, layout)
    monkeypatch.setattr(_convolution, "BAND", 16 * 64 * 4)
    with PeakMemory() as memory:
        y = dilated_conv2d(**arguments, backend="portable")
    band = 4 * _convolution.BAND
    assert y.nbytes <= memory.peak <= y.nbytes + 3 * band
    assert 4 * y.numel() > 3 * band


def test_portable_result_does_not_depend_on_the_bands(monkeypatch):
    for geometry in GEOMETRIES:
        arguments = with_residual(layer(geometry))
        whole = dilated_conv2d(**arguments, backend="portable")
        for band in (1, 100, 300):
            monkeypatch.setattr(_convolution, "BAND", band)
            torch.testing.assert_close(dilated_conv2d(**arguments, backend="portable"), whole, rtol=1e-12, atol=1e-12)
        monkeypatch.undo()


@on_every_backend
@in_both_layouts
def test_same_bits_from_run_to_run_and_output_for_any_number_of_threads(backend, layout):
    arguments = layer(
        {"kernel": 3, "padding": 4, "dilation": 4}, (24, 48), size=(40, 36), dtype=torch.float32, layout=layout
    )
    arguments = with_residual(arguments, layout)
    expected = dilated_conv2d(**arguments, backend=backend)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(dilated_conv2d(**arguments, backend=backend), expected), threads
        first, second = (gradients(dilated_conv2d, arguments, backend) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first), threads


@on_every_backend
def test_uninitialised_memory_is_never_read(backend, poisoned_memory):
    for geometry in (ZEROS[4], ZEROS[1], ZEROS[10], BORDERS[3]):
        for layout in ("nchw", "channels_last"):
            arguments = with_residual(layer(geometry, layout=layout), layout)
            assert_equals_reference(dilated_conv2d, arguments, backend)
            assert_gradients_equal_reference(dilated_conv2d, arguments, backend)


@on_every_backend
def test_nan_reaches_only_what_sees_it(backend):
    arguments = layer({"kernel": 3, "padding": 2, "dilation": 2, "activation": "elu"}, (3, 12), dtype=torch.float32)
    arguments["x"][1, 2, 5, 7] = float("nan")
    y = dilated_conv2d(**arguments, backend=backend)
    seen = torch.zeros(2, 1, 13, 18, dtype=torch.bool)
    seen[1, :, 3:8:2, 5:10:2] = True
    assert torch.equal(y.isnan(), seen.expand_as(y))


@with_the_reference_too
def test_batch_of_zero(backend):
    arguments = with_residual(layer({"kernel": 3, "padding": 1}, batch=0))
    assert dilated_conv2d(**arguments, backend=backend).shape == (0, 4, 13, 18)
    assert gradients(dilated_conv2d, arguments, backend)["weight"].count_nonzero() == 0


@with_the_reference_too
def test_tensors_are_left_as_they_were(backend):
    arguments = with_residual(layer({"kernel": 3, "padding": 1}))
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    gradients(dilated_conv2d, arguments, backend)
    dilated_conv2d(**arguments, backend=backend)
    assert all(torch.equal(arguments[name], x) for name, x in before.items())


# Inside torch ---------------------------------------------------------------------------------------------------------


@with_the_reference_too
def test_opcheck(backend):
    op = torch.ops.inpaint_kernels.dilated_conv2d.default
    arguments = with_residual(layer({"kernel": 3, "padding": 2, "dilation": 2}, size=(6, 7), dtype=torch.float32))
    x, weight, bias, residual = (arguments[name] for name in ("x", "weight", "bias", "residual"))
    geometry = ((1, 1), (2, 2, 2, 2), (2, 2), 1, 1)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(op, (*leaves, *geometry, False, "elu", 0.2, None, backend))
    last = x.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(op, (last, weight, None, *geometry, True, "relu", 0.2, residual, backend))


@on_every_backend
def test_compiles_into_one_graph_for_all_sizes(backend):
    def call(x: Tensor, weight: Tensor) -> Tensor:
        y = dilated_conv2d(x, weight, padding=2, dilation=2, residual=x, backend=backend)
        return dilated_conv2d(y, weight, stride=2, padding_mode="same_tf", activation="elu", backend=backend)

    compiled, graphs = compiled_graphs(call)
    weight = torch.randn(2, 2, 3, 3)
    for size in ((12, 16), (21, 14), (17, 19)):
        x = torch.randn(3, 2, *size)
        torch.testing.assert_close(compiled(x, weight), call(x, weight))
    assert len(graphs) == 1


@on_every_backend
def test_compiled_gradient(backend):
    def call(x: Tensor, weight: Tensor) -> Tensor:
        return dilated_conv2d(x, weight, padding=2, dilation=2, residual=x, backend=backend).square().sum()

    leaves = torch.randn(1, 2, 8, 9, requires_grad=True), torch.randn(2, 2, 3, 3, requires_grad=True)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for got, expected in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, call)), strict=True):
        torch.testing.assert_close(got, expected)


@on_every_backend
def test_export_with_dynamic_sizes(backend):
    module = DilatedConv2d(3, 3, 3, padding=2, dilation=2, backend=backend)
    sizes = {2: torch.export.Dim("h", min=4, max=64), 3: torch.export.Dim("w", min=4, max=64)}
    program = torch.export.export(module, (torch.randn(1, 3, 16, 12),), dynamic_shapes=(sizes,))
    assert "inpaint_kernels.dilated_conv2d" in str(program.graph)
    x = torch.randn(1, 3, 21, 18)
    torch.testing.assert_close(program.module()(x), module(x))


@on_every_backend
def test_autocast_casts_as_a_convolution(backend):
    arguments = with_residual(layer({"kernel": 3, "padding": 1}, dtype=torch.float32))
    expected = dilated_conv2d(**in_dtype(arguments, torch.bfloat16), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dilated_conv2d(**arguments, backend=backend), expected)
        grads = gradients(dilated_conv2d, arguments, backend)
    assert all(grad.dtype == torch.float32 for grad in grads.values())


@on_every_backend
def test_inference_mode(backend):
    arguments = with_residual(layer({"kernel": 3, "padding": 1}))
    expected = dilated_conv2d(**arguments, backend=backend)
    with torch.inference_mode():
        assert torch.equal(dilated_conv2d(**arguments, backend=backend), expected)


def test_meta_tensors():
    x, weight = torch.empty(2, 3, 8, 9, device="meta"), torch.empty(4, 3, 3, 3, device="meta")
    last = x.contiguous(memory_format=torch.channels_last)
    y = dilated_conv2d(last, weight, padding=4, dilation=4)
    assert y.shape == (2, 4, 8, 9)
    assert_layout(y, last)


# The module -----------------------------------------------------------------------------------------------------------


def test_module_is_the_function_with_its_parameters():
    module = DilatedConv2d(4, 4, 3, padding=8, dilation=8, activation="elu", padding_mode="reflect")
    module.load_state_dict(torch.nn.Conv2d(4, 4, 3).state_dict())
    x = torch.randn(2, 4, 9, 10)
    options: Arguments = {"padding": 8, "dilation": 8, "activation": "elu", "padding_mode": "reflect"}
    assert torch.equal(module(x), dilated_conv2d(x, module.weight, module.bias, **options))
    assert torch.equal(module(x, x), dilated_conv2d(x, module.weight, module.bias, residual=x, **options))
    assert repr(module).endswith("padding_mode=reflect, activation='elu')")


# Errors ---------------------------------------------------------------------------------------------------------------

X, WEIGHT = torch.zeros(2, 3, 8, 9), torch.zeros(4, 3, 3, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[0]}, ValueError, "x: expected shape [B, Cin, H, W], got [3, 8, 9]"),
        ({"x": X.bool()}, TypeError, "x: expected torch.float16 or torch.bfloat16 or"),
        ({"weight": WEIGHT[:, :2]}, ValueError, "weight: expected shape [O, Cin/groups, kh, kw] with Cin/groups=3"),
        ({"weight": None}, TypeError, "weight: expected a torch.Tensor, got NoneType"),
        ({"bias": torch.zeros(3)}, ValueError, "bias: expected shape [O] with O=4, got [3]"),
        ({"weight": WEIGHT.half()}, TypeError, "x, weight: expected one dtype"),
        (
            {"residual": X},
            ValueError,
            "residual: expected shape [B, C, Ho, Wo] with B=2, C=4, Ho=6, Wo=7, got [2, 3, 8, 9]",
        ),
        ({"residual": torch.zeros(2, 4, 6, 7).half()}, TypeError, "x, residual: expected one dtype"),
        ({"residual": torch.zeros(2, 4, 6, 7).to("meta")}, ValueError, "x, residual: expected one device"),
        ({"stride": -1}, ValueError, "stride: expected a number >= 1, got -1"),
        ({"dilation": 0}, ValueError, "dilation: expected a number >= 1, got 0"),
        ({"dilation": 16}, ValueError, "x: expected, with its padding, at least the 33 x 33 pixels"),
        ({"padding": (0, 9), "padding_mode": "reflect"}, ValueError, "padding: expected less than the size 8 x 9"),
        ({"padding_mode": "replicate"}, ValueError, "padding_mode: expected one of"),
        ({"groups": 2}, ValueError, "groups: expected a divisor of the 3 channels of x, got 2"),
        ({"activation": "gelu"}, ValueError, "activation: expected one of"),
        ({"negative_slope": float("nan")}, ValueError, "negative_slope: expected a number >= 0, got nan"),
        ({"backend": "cuda"}, RuntimeError, "dilated_conv2d has no cuda kernel"),
    ],
    ids=lambda x: x.split(", got")[0] if isinstance(x, str) else "",
)
def test_errors_name_the_argument(change, error, message):
    arguments: dict[str, Any] = {"x": X, "weight": WEIGHT} | change
    with pytest.raises(error, match=re.escape(message)):
        dilated_conv2d(**arguments)
