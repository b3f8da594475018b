"""gated_conv2d: every backend against the float64 reference, the reference against loops and against public modules."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from benches.peers import import_file
from inpaint_kernels import explain, gated_conv2d
from inpaint_kernels.nn import GatedConv2d
from inpaint_kernels.ops import _convolution as ops
from inpaint_kernels.portable import _convolution
from inpaint_kernels.portable import gated_conv2d as portable
from inpaint_kernels.portable._convolution import Activation, Geometry
from tests.convolutions import (
    BORDERS,
    LAYOUTS,
    UPSAMPLED,
    ZEROS,
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
    peer_checkout,
)

BACKENDS = backends("gated_conv2d")
GEOMETRIES = [*ZEROS, *BORDERS, *UPSAMPLED]
ACTIVATIONS = ("elu", "relu", "leaky_relu", "none")

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
with_the_reference_too = pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
in_both_layouts = pytest.mark.parametrize("layout", ["nchw", "channels_last"])


@pytest.fixture(autouse=True)
def _one_thread():
    """The maps here are too small for two, which would wait for each other on a busy machine."""
    torch.set_num_threads(1)


# Against the reference ------------------------------------------------------------------------------------------------


@on_every_backend
@in_both_layouts
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_geometry_equals_the_reference(backend, layout, geometry):
    for channels in ((3, 4), (9, 22)):
        assert_equals_reference(gated_conv2d, layer(geometry, channels, layout=layout), backend)


@on_every_backend
@in_both_layouts
@pytest.mark.parametrize("channels", [(5, 48), (24, 24), (24, 96), (33, 34), (1, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_channels_and_dtypes(backend, layout, channels, dtype):
    for geometry in ({"kernel": 3, "padding": 1}, {"kernel": 3, "padding_mode": "same_tf", "stride": 2}):
        assert_equals_reference(gated_conv2d, layer(geometry, channels, dtype=dtype, layout=layout), backend)


@on_every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate_order", ["feature_first", "gate_first"])
def test_activations_and_gate_orders(backend, activation, gate_order):
    arguments = layer({"kernel": 3, "padding": 1, "activation": activation, "gate_order": gate_order})
    assert_equals_reference(gated_conv2d, {**arguments, "negative_slope": 0.1}, backend)
    assert_gradients_equal_reference(gated_conv2d, {**arguments, "negative_slope": 0.1}, backend)


@on_every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    arguments = layer({"kernel": 3, "padding": 1}, (4, 6), layout=layout, dtype=torch.float32)
    assert_equals_reference(gated_conv2d, arguments, backend)
    moved = {**arguments, "weight": arguments["weight"].contiguous(memory_format=torch.channels_last)}
    assert_equals_reference(gated_conv2d, moved, backend)


def test_groups_run_on_the_portable_backend():
    arguments = layer({"kernel": 3, "padding": 1, "groups": 2}, (4, 8))
    explanation = explain("gated_conv2d", **arguments)
    assert explanation.chosen == "portable"
    assert "groups=1" in "".join(explanation.cannot["cpu"])
    assert_equals_reference(gated_conv2d, arguments, "portable")
    assert_gradients_equal_reference(gated_conv2d, arguments, "portable")


@on_every_backend
@pytest.mark.parametrize("biases", ["both", "neither", "features", "gate"])
def test_two_weights_are_the_halves_of_one(backend, biases):
    arguments = layer({"kernel": 3, "padding": 1})
    weight, bias = arguments.pop("weight"), arguments.pop("bias")
    bias[: 0 if biases in ("both", "features") else 2] = 0
    bias[4 if biases in ("both", "gate") else 2 :] = 0
    expected = gated_conv2d(weight=weight, bias=bias, **arguments, backend=backend)
    got = gated_conv2d(
        weight=weight[:2],
        gate_weight=weight[2:],
        bias=bias[:2] if biases in ("both", "features") else None,
        gate_bias=bias[2:] if biases in ("both", "gate") else None,
        **arguments,
        backend=backend,
    )
    assert torch.equal(got, expected)


@on_every_backend
@in_both_layouts
@pytest.mark.parametrize("geometry", [ZEROS[5], ZEROS[8], ZEROS[11], BORDERS[1], BORDERS[9], *UPSAMPLED], ids=str)
def test_gradients(backend, layout, geometry):
    assert_gradients_equal_reference(gated_conv2d, layer(geometry, layout=layout), backend)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_dtypes(backend, dtype):
    for layout in ("nchw", "channels_last"):
        arguments = layer({"kernel": 3, "padding": 1}, (8, 12), dtype=dtype, layout=layout)
        assert_gradients_equal_reference(gated_conv2d, arguments, backend)


@on_every_backend
def test_gradients_of_two_weights(backend):
    arguments = layer({"kernel": 3, "padding": 1}, (3, 2))
    arguments |= {"gate_weight": torch.randn_like(arguments["weight"]), "gate_bias": torch.randn(2).double()}
    assert_gradients_equal_reference(gated_conv2d, arguments, backend)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    upsample=st.integers(1, 2),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 9)),
    rows_per_band=st.integers(1, 5),
)
def test_any_geometry_with_the_padding_of_tensorflow(size, kernel, stride, dilation, upsample, channels, rows_per_band):
    geometry = {"kernel": kernel, "stride": stride, "dilation": dilation, "upsample": upsample}
    arguments = layer({**geometry, "padding_mode": "same_tf"}, (channels[0], 2 * channels[1]), size=size)
    before = _convolution.BAND
    _convolution.BAND = rows_per_band * 2 * channels[1] * upsample * size[1]
    try:
        for backend in BACKENDS:
            assert_equals_reference(gated_conv2d, arguments, backend)
    finally:
        _convolution.BAND = before


# Oracles that share nothing with the reference ------------------------------------------------------------------------


@with_the_reference_too
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_equals_loops_over_pixels_and_taps(backend, geometry):
    size = (8, 9) if geometry.get("padding", 0) != 12 else (13, 14)
    arguments = layer(geometry, (2, 4), size=size, batch=1)
    features, gate = naive_convolution(**arguments).chunk(2, 1)
    expected = torch.where(features > 0, features, features.exp() - 1) / (1 + (-gate).exp())
    torch.testing.assert_close(gated_conv2d(**arguments, backend=backend), expected, rtol=1e-12, atol=1e-12)


@with_the_reference_too
def test_groups_equal_loops(backend):
    if backend == "cpu":
        pytest.skip("the kernel takes one group")
    arguments = layer({"kernel": 3, "padding": 1, "groups": 2}, (4, 4), size=(5, 6))
    features, gate = naive_convolution(**arguments).chunk(2, 1)
    expected = F.elu(features) * gate.sigmoid()
    torch.testing.assert_close(gated_conv2d(**arguments, backend=backend), expected)


@pytest.mark.parametrize("size", [(12, 16), (13, 17)])
@pytest.mark.parametrize(("kernel", "stride", "rate"), [(5, 1, 1), (3, 2, 1), (3, 1, 16), (4, 2, 3)])
def test_equals_nipponjo(request, size, kernel, stride, rate):
    checkout = peer_checkout(request, "nipponjo/deepfillv2-pytorch")
    module = import_file(checkout, "model/networks_tf.py").GConv(5, 6, kernel, stride, rate).double()
    ours = GatedConv2d(5, 6, kernel, stride, 0, rate, padding_mode="same_tf", dtype=torch.float64)
    ours.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    torch.testing.assert_close(ours(x), module(x), rtol=1e-12, atol=1e-12)


def test_equals_nipponjo_upsampled(request):
    checkout = peer_checkout(request, "nipponjo/deepfillv2-pytorch")
    module = import_file(checkout, "model/networks_tf.py").GDeConv(5, 6).double()
    ours = GatedConv2d(5, 6, 3, padding_mode="same_tf", upsample=2, dtype=torch.float64)
    ours.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), module(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("theirs", "ours"), [("zero", "zeros"), ("reflect", "reflect")])
@pytest.mark.parametrize(("act", "activation"), [("elu", "elu"), ("lrelu", "leaky_relu"), ("none", "none")])
@pytest.mark.parametrize("separate_gate", [False, True])
def test_equals_csqiangwen(request, theirs, ours, act, activation, separate_gate):
    checkout = peer_checkout(request, "csqiangwen/DeepFillv2_Pytorch")
    module = import_file(checkout, "network_module.py", stand_ins=("torchvision", "cv2", "network"))
    peer = module.GatedConv2d(4, 5, 3, 1, 2, 2, pad_type=theirs, activation=act).double()
    mine = GatedConv2d(
        *(4, 5, 3, 1, 2, 2),
        padding_mode=ours,
        activation=activation,
        separate_gate=separate_gate,
        dtype=torch.float64,
    )
    mine.load_state_dict(peer.state_dict())
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64)
    torch.testing.assert_close(mine(x), peer(x), rtol=1e-12, atol=1e-12)


# Gradient -------------------------------------------------------------------------------------------------------------


@with_the_reference_too
@pytest.mark.parametrize("geometry", [{"kernel": 3, "padding": 1}, BORDERS[3], UPSAMPLED[2]], ids=str)
def test_gradcheck(backend, geometry):
    arguments = layer(geometry, (2, 4), size=(5, 6), batch=1)
    x, weight, bias = (arguments.pop(name).requires_grad_() for name in ("x", "weight", "bias"))

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return gated_conv2d(x, weight, bias, **arguments, backend=backend)

    assert torch.autograd.gradcheck(call, (x, weight, bias), fast_mode=True)


@with_the_reference_too
@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_one_gradient_alone(backend, wanted):
    arguments = layer({"kernel": 3, "padding": 1})
    expected = gradients(gated_conv2d, arguments, "reference")[wanted]
    arguments[wanted].requires_grad_()
    y = gated_conv2d(**arguments, backend=backend)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (got,) = torch.autograd.grad(y, arguments[wanted], weights)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@with_the_reference_too
@pytest.mark.parametrize("act", ["elu", "leaky_relu", "none"])
def test_second_gradient(backend, act):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 4, 3), (4, 2, 3, 3), (4,))
    leaves = [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]

    def call(x, weight, bias):
        return gated_conv2d(x, weight, bias, padding=1, activation=act, backend=backend)

    assert torch.autograd.gradgradcheck(call, leaves)


def test_gradient_penalty_of_a_part_of_the_inputs():
    arguments = layer({"kernel": 3})
    x = arguments["x"].requires_grad_()
    weight = arguments["weight"].requires_grad_()
    results = []
    for backend in ("reference", None):
        y = gated_conv2d(**arguments, backend=backend)
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), weight)[0])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@on_every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_where_gates_and_features_are_extreme(backend, activation, dtype):
    """Open and shut gates, and features at the limit of an elu: what is kept must still tell them apart."""
    arguments = layer({"kernel": 1, "activation": activation}, (4, 12), dtype=torch.float64)
    for scale in (0.1, 4.0, 20.0):
        scaled = {**arguments, "weight": arguments["weight"] * scale, "bias": arguments["bias"] * scale}
        assert_gradients_equal_reference(gated_conv2d, in_dtype(scaled, dtype), backend)


@on_every_backend
def test_gradient_where_the_sigmoid_underflows_is_zero(backend):
    x = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2).requires_grad_()
    weight, bias = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1), torch.tensor([0.0, -200.0])
    for activation in ACTIVATIONS:
        y = gated_conv2d(x, weight, bias, activation=activation, backend=backend)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 1e-30


@with_the_reference_too
def test_autograd_keeps_output_and_gates(backend):
    """Not what came out of the convolution, which is twice as wide."""
    arguments = layer({"kernel": 3, "padding": 1}, (3, 8), batch=1, dtype=torch.float32)
    for name in ("x", "weight", "bias"):
        arguments[name].requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = gated_conv2d(**arguments, backend=backend)
    own = {id(arguments[name]) for name in ("x", "weight", "bias")}
    others = [tensor for tensor in kept if id(tensor) not in own]
    assert [tensor.shape for tensor in others] == [y.shape, y.shape]
    assert [tensor.untyped_storage().nbytes() for tensor in others] == [y.nbytes, y.nbytes]
    assert others[0].data_ptr() == y.data_ptr()


@with_the_reference_too
def test_output_changed_in_place_before_its_gradient_is_an_error(backend):
    arguments = layer({"kernel": 3})
    arguments["x"].requires_grad_()
    y = gated_conv2d(**arguments, backend=backend)
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradient_of_the_bare_op_without_keep_is_an_error():
    x, weight = torch.zeros(1, 2, 4, 4, requires_grad=True), torch.zeros(2, 2, 1, 1)
    geometry = ((1, 1), (0, 0, 0, 0), (1, 1), 1, 1, False)
    op = torch.ops.inpaint_kernels.gated_conv2d
    y, gates = op(x, weight, None, *geometry, "elu", 0.2, False, False, "portable")
    assert gates.numel() == 0
    with pytest.raises(RuntimeError, match="the gradient needs what keep=True returns"):
        y.sum().backward()


# Memory, reproducibility ----------------------------------------------------------------------------------------------


@in_both_layouts
@pytest.mark.parametrize("geometry", [ZEROS[2], BORDERS[9], *UPSAMPLED[:3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_portable_holds_input_output_and_some_bands(monkeypatch, layout, geometry, dtype):
    arguments = layer(geometry, (8, 16), size=(96, 64), batch=1, dtype=dtype, layout=layout)
    monkeypatch.setattr(_convolution, "BAND", 16 * 64 * 4)
    with PeakMemory() as memory:
        y = gated_conv2d(**arguments, backend="portable")
    assert memory.peak >= y.nbytes
    band = 4 * _convolution.BAND * arguments.get("upsample", 1)
    assert memory.peak <= y.nbytes + 4 * band
    whole = 4 * 2 * y.numel()  # the convolution's result in float32, which is never there
    assert whole > 4 * band


def test_portable_gate_gradient_holds_some_bands(monkeypatch):
    monkeypatch.setattr(_convolution, "BAND", 16 * 64 * 4)
    grad, y, gates = torch.randn(3, 1, 8, 96, 64)
    with PeakMemory() as memory:
        result = portable.gated_conv2d_gate_backward(grad, y, gates, Activation("elu"), False)
    assert memory.peak <= result.nbytes + 4 * 4 * _convolution.BAND


def test_portable_result_does_not_depend_on_the_bands(monkeypatch):
    for geometry in GEOMETRIES:
        arguments = layer(geometry)
        whole = gated_conv2d(**arguments, backend="portable")
        grads = gradients(gated_conv2d, arguments, "portable")
        for band in (1, 200, 700):
            monkeypatch.setattr(_convolution, "BAND", band)
            torch.testing.assert_close(gated_conv2d(**arguments, backend="portable"), whole, rtol=1e-12, atol=1e-12)
            for name, got in gradients(gated_conv2d, arguments, "portable").items():
                torch.testing.assert_close(got, grads[name], rtol=1e-11, atol=1e-11)
        monkeypatch.undo()


@on_every_backend
@in_both_layouts
def test_same_bits_from_run_to_run_and_output_for_any_number_of_threads(backend, layout):
    arguments = layer({"kernel": 3, "padding": 1}, (24, 48), size=(40, 36), dtype=torch.float32, layout=layout)
    expected = gated_conv2d(**arguments, backend=backend)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(gated_conv2d(**arguments, backend=backend), expected), threads
        first, second = (gradients(gated_conv2d, arguments, backend) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first), threads


@on_every_backend
def test_uninitialised_memory_is_never_read(backend, poisoned_memory):
    for geometry in (ZEROS[4], ZEROS[1], BORDERS[3], UPSAMPLED[1]):
        for layout in ("nchw", "channels_last"):
            assert_gradients_equal_reference(gated_conv2d, layer(geometry, layout=layout), backend)


@on_every_backend
def test_nan_reaches_only_what_sees_it(backend):
    arguments = layer({"kernel": 3, "padding": 1}, (3, 12), dtype=torch.float32)
    arguments["x"][1, 2, 5, 7] = float("nan")
    y = gated_conv2d(**arguments, backend=backend)
    seen = torch.zeros(2, 1, 13, 18, dtype=torch.bool)
    seen[1, :, 4:7, 6:9] = True
    assert torch.equal(y.isnan(), seen.expand_as(y))


@with_the_reference_too
def test_batch_of_zero(backend):
    arguments = layer({"kernel": 3, "padding": 1}, batch=0)
    assert gated_conv2d(**arguments, backend=backend).shape == (0, 2, 13, 18)
    assert gradients(gated_conv2d, arguments, backend)["weight"].count_nonzero() == 0


@with_the_reference_too
def test_tensors_are_left_as_they_were(backend):
    arguments = layer({"kernel": 3, "padding": 1})
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    gradients(gated_conv2d, arguments, backend)
    gated_conv2d(**arguments, backend=backend)
    assert all(torch.equal(arguments[name], x) for name, x in before.items())


# Inside torch ---------------------------------------------------------------------------------------------------------

SQUARE = ((1, 1), (1, 1, 1, 1), (1, 1), 1)


@with_the_reference_too
def test_opcheck(backend):
    op = torch.ops.inpaint_kernels.gated_conv2d.default
    arguments = layer({"kernel": 3}, size=(6, 7), dtype=torch.float32)
    x, weight, bias = arguments["x"], arguments["weight"], arguments["bias"]
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(op, (*leaves, *SQUARE, 2, False, "elu", 0.2, False, True, backend))
    last = x.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(op, (last, weight, None, *SQUARE, 1, True, "relu", 0.2, True, False, backend))


@on_every_backend
def test_compiles_into_one_graph_for_all_sizes(backend):
    def call(x: Tensor, weight: Tensor) -> Tensor:
        y = gated_conv2d(x, weight, stride=2, dilation=2, padding_mode="same_tf", backend=backend)
        return gated_conv2d(y, weight, padding=1, padding_mode="reflect", upsample=2, backend=backend)

    compiled, graphs = compiled_graphs(call)
    weight = torch.randn(4, 2, 3, 3)
    for size in ((12, 16), (21, 14), (17, 19)):
        x = torch.randn(3, 2, *size)
        torch.testing.assert_close(compiled(x, weight), call(x, weight))
    assert len(graphs) == 1


def test_settings_may_be_arguments_of_what_is_compiled():
    def call(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
        return gated_conv2d(x, weight, None, stride, padding, groups=groups)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    for settings_now in ((1, 3, 2), (2, 1, 2), (1, 1, 1)):
        x, weight = torch.randn(1, 4, 8, 9), torch.randn(4, 4 // settings_now[2], 3, 3)
        torch.testing.assert_close(compiled(x, weight, *settings_now), call(x, weight, *settings_now))


def test_reasons_of_triton_can_be_compiled():
    """On a CUDA device they ask the driver, which torch.compile must not try to trace."""

    def call(x: Tensor) -> Tensor:
        return x + len(ops._triton_lacks(x.device, x.dtype))

    x = torch.zeros(2, dtype=torch.float64)
    assert torch.equal(torch.compile(call, fullgraph=True, dynamic=True, backend="eager")(x), call(x))
    assert any("float64" in reason for reason in ops._triton_lacks(x.device, x.dtype))


@pytest.mark.parametrize(("channels", "way"), [(48, "inside an implicit GEMM: 48"), (256, "behind cuDNN: 256")])
def test_explain_says_which_way_triton_would_go(monkeypatch, channels, way):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(ops, "_triton_lacks", lambda device, dtype: ())
    sizes = (1, 8, 9, 9), (channels, 8, 3, 3), (channels, 4, 3, 3)
    with FakeTensorMode():
        x, weight, grouped = (torch.empty(size, device="cuda", dtype=torch.bfloat16) for size in sizes)
        explanation = explain("gated_conv2d", x, weight)
        alone = explain("gated_conv2d", x, grouped, groups=2)
    assert explanation.usable == ("triton", "portable", "reference")
    assert f"triton runs it {way}" in str(explanation)
    assert "triton runs it" not in str(alone)
    assert "groups=1" in "".join(alone.cannot["triton"])


def test_cuda_tensors_without_a_cuda_device_are_explained():
    with FakeTensorMode():
        x, weight = (torch.empty(size, device="cuda") for size in ((1, 8, 9, 9), (4, 8, 3, 3)))
        explanation = explain("gated_conv2d", x, weight)
    if not torch.cuda.is_available():
        assert "sees no CUDA device" in "".join(explanation.cannot["triton"])
        assert explanation.chosen == "portable"


@on_every_backend
def test_compiled_gradient(backend):
    def call(x: Tensor, weight: Tensor) -> Tensor:
        return gated_conv2d(x, weight, padding=1, backend=backend).square().sum()

    leaves = torch.randn(1, 2, 8, 9, requires_grad=True), torch.randn(4, 2, 3, 3, requires_grad=True)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for got, expected in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, call)), strict=True):
        torch.testing.assert_close(got, expected)


@on_every_backend
def test_export_with_dynamic_sizes(backend):
    module = torch.nn.Sequential(
        GatedConv2d(3, 4, 5, padding_mode="same_tf", backend=backend),
        GatedConv2d(4, 4, 3, 2, padding_mode="same_tf", backend=backend),
        GatedConv2d(4, 2, 3, padding=1, upsample=2, backend=backend),
    )
    sizes = {2: torch.export.Dim("h", min=4, max=64), 3: torch.export.Dim("w", min=4, max=64)}
    program = torch.export.export(module, (torch.randn(1, 3, 16, 12),), dynamic_shapes=(sizes,))
    assert str(program.graph).count("inpaint_kernels.gated_conv2d") == 3
    x = torch.randn(1, 3, 21, 18)
    torch.testing.assert_close(program.module()(x), module(x))


@on_every_backend
def test_autocast_casts_as_a_convolution(backend):
    arguments = layer({"kernel": 3, "padding": 1}, dtype=torch.float32)
    expected = gated_conv2d(**in_dtype(arguments, torch.bfloat16), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated_conv2d(**arguments, backend=backend), expected)
        assert torch.equal(gated_conv2d(**{**arguments, "x": arguments["x"].bfloat16()}, backend=backend), expected)
        grads = gradients(gated_conv2d, arguments, backend)
        assert gated_conv2d(**layer({"kernel": 1}), backend=backend).dtype == torch.float64
    assert all(grad.dtype == torch.float32 for grad in grads.values())


@on_every_backend
def test_inference_mode(backend):
    arguments = layer({"kernel": 3, "padding": 1})
    expected = gated_conv2d(**arguments, backend=backend)
    with torch.inference_mode():
        assert torch.equal(gated_conv2d(**arguments, backend=backend), expected)
        gated_conv2d(**layer({"kernel": 3}), backend=backend)


def test_meta_tensors():
    x, weight = torch.empty(2, 3, 8, 9, device="meta"), torch.empty(4, 3, 3, 3, device="meta")
    assert gated_conv2d(x, weight, stride=2, padding_mode="same_tf", upsample=2).shape == (2, 2, 8, 9)
    last = x.contiguous(memory_format=torch.channels_last)
    assert_layout(gated_conv2d(last, weight.requires_grad_()), last)


# The module -----------------------------------------------------------------------------------------------------------


def test_module_is_the_function_with_its_parameters():
    module = GatedConv2d(4, 3, (3, 5), 2, (1, 2), 1, 1, activation="leaky_relu", gate_order="gate_first")
    x = torch.randn(2, 4, 9, 10)
    expected = gated_conv2d(
        *(x, module.weight, module.bias, 2, (1, 2)), activation="leaky_relu", gate_order="gate_first"
    )
    assert torch.equal(module(x), expected)
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {
        "weight": (6, 4, 3, 5),
        "bias": (6,),
    }
    assert "activation='leaky_relu', gate_order='gate_first'" in repr(module)


def test_module_with_a_gate_of_its_own():
    module = GatedConv2d(4, 3, 3, separate_gate=True)
    assert list(module.state_dict()) == ["weight", "bias", "gate_weight", "gate_bias"]
    assert repr(module).endswith("separate_gate=True)")
    assert module.out_channels == 3
    module(torch.randn(1, 4, 5, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    old = [parameter.detach().clone() for parameter in module.parameters()]
    module.reset_parameters()
    assert not any(torch.equal(*pair) for pair in zip(old, module.parameters(), strict=True))
    assert GatedConv2d(4, 3, 3, bias=False, separate_gate=True).gate_bias is None


@pytest.mark.parametrize("prefix", ["conv", "conv.conv"])
def test_module_loads_published_names(prefix):
    model, conv = torch.nn.Module(), GatedConv2d(4, 3, 3)
    model.add_module("conv1", conv)
    weight, bias = torch.randn(6, 4, 3, 3), torch.randn(6)
    model.load_state_dict({f"conv1.{prefix}.weight": weight, f"conv1.{prefix}.bias": bias})
    assert torch.equal(conv.weight, weight)
    assert conv.bias is not None
    assert torch.equal(conv.bias, bias)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({"conv1.weight": weight, "conv1.bias": bias, "conv1.mask.weight": bias})


@pytest.mark.parametrize("gate_order", ["feature_first", "gate_first"])
def test_module_loads_two_published_convolutions(gate_order):
    published = {
        **{f"conv2d.{name}": value for name, value in torch.nn.Conv2d(4, 3, 3).state_dict().items()},
        **{f"mask_conv2d.{name}": value for name, value in torch.nn.Conv2d(4, 3, 3).state_dict().items()},
    }
    joined = GatedConv2d(4, 3, 3, gate_order=gate_order)
    separate = GatedConv2d(4, 3, 3, separate_gate=True)
    joined.load_state_dict(published)
    separate.load_state_dict(published)
    x = torch.randn(1, 4, 7, 8)
    torch.testing.assert_close(joined(x), separate(x))
    assert len(published) == 4


# Errors ---------------------------------------------------------------------------------------------------------------

X, WEIGHT, BIAS = torch.zeros(2, 3, 8, 9), torch.zeros(4, 3, 3, 3), torch.zeros(4)
HALF = torch.zeros(2, 3, 3, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[0]}, ValueError, "x: expected shape [B, Cin, H, W], got [3, 8, 9]"),
        ({"x": "photo.png"}, TypeError, "x: expected a torch.Tensor, got str"),
        ({"x": X.int()}, TypeError, "x: expected torch.float16 or torch.bfloat16 or"),
        (
            {"weight": WEIGHT[:, :2]},
            ValueError,
            "weight: expected shape [O, Cin/groups, kh, kw] with Cin/groups=3, got [4, 2, 3, 3]",
        ),
        ({"weight": WEIGHT[0]}, ValueError, "weight: expected shape [O, Cin/groups, kh, kw]"),
        ({"weight": WEIGHT[:3]}, ValueError, "weight: expected 2C output channels, features and gates, got 3"),
        ({"bias": BIAS[:3]}, ValueError, "bias: expected shape [O] with O=4, got [3]"),
        ({"weight": WEIGHT.double()}, TypeError, "x, weight: expected one dtype"),
        ({"bias": BIAS.half()}, TypeError, "x, weight, bias: expected one dtype"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "x, weight: expected one device, got x on cpu, weight on meta"),
        ({"stride": 0}, ValueError, "stride: expected a number >= 1, got 0"),
        ({"stride": (1, 2, 3)}, ValueError, "stride: expected an integer or a pair (rows, columns), got (1, 2, 3)"),
        ({"stride": 1.5}, TypeError, "stride: expected an integer, got float"),
        ({"dilation": (1, 0)}, ValueError, "dilation: expected a number >= 1, got 0"),
        ({"padding": -1}, ValueError, "padding: expected a number >= 0, got -1"),
        ({"padding": "same"}, TypeError, "padding: expected an integer, got str"),
        ({"padding": 1, "padding_mode": "same_tf"}, ValueError, "padding: expected 0 with padding_mode='same_tf'"),
        ({"padding": 8, "padding_mode": "reflect"}, ValueError, "padding: expected less than the size 8 x 9"),
        ({"padding_mode": "circular"}, ValueError, "padding_mode: expected one of 'zeros', 'reflect', 'same_tf', got"),
        ({"dilation": 4}, ValueError, "x: expected, with its padding, at least the 9 x 9 pixels that the kernel spans"),
        ({"groups": 2}, ValueError, "groups: expected a divisor of the 3 channels of x, got 2"),
        ({"groups": 3, "weight": WEIGHT[:, :1]}, ValueError, "groups: expected a divisor of the 4 channels of weight"),
        ({"groups": 0}, ValueError, "groups: expected a number >= 1, got 0"),
        ({"upsample": 3}, ValueError, "upsample: expected one of 1, 2, got 3"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of 'elu', 'relu', 'leaky_relu', 'none', got"),
        ({"negative_slope": -0.1}, ValueError, "negative_slope: expected a number >= 0, got -0.1"),
        ({"gate_order": "last"}, ValueError, "gate_order: expected one of 'feature_first', 'gate_first', got 'last'"),
        ({"gate_bias": BIAS}, ValueError, "gate_bias: expected none without gate_weight"),
        ({"weight": HALF, "gate_weight": WEIGHT}, ValueError, "gate_weight: expected shape [C, Cin, kh, kw] with C=2"),
        (
            {"weight": HALF, "gate_weight": HALF, "gate_bias": BIAS},
            ValueError,
            "gate_bias: expected shape [C] with C=2, got [4]",
        ),
        ({"weight": HALF, "gate_weight": HALF.double()}, TypeError, "weight, gate_weight: expected one dtype"),
        (
            {"weight": HALF, "gate_weight": HALF.to("meta")},
            ValueError,
            "weight, gate_weight: expected one device, got weight on cpu",
        ),
        (
            {"weight": HALF, "gate_weight": HALF, "gate_order": "gate_first"},
            ValueError,
            "gate_order: expected 'feature_first' with gate_weight, got 'gate_first'",
        ),
        (
            {"x": X[:, :2], "weight": HALF[:, :1], "gate_weight": HALF[:, :1], "groups": 2},
            ValueError,
            "groups: expected 1 with gate_weight, got 2",
        ),
        ({"backend": "cuda"}, RuntimeError, "gated_conv2d has no cuda kernel"),
        ({"backend": "triton"}, RuntimeError, "the tensors are on cpu, not on a CUDA device"),
        ({"backend": "fastest"}, ValueError, "backend: expected one of"),
    ],
    ids=lambda x: x.split(", got")[0] if isinstance(x, str) else "",
)
def test_errors_name_the_argument(change, error, message):
    arguments: dict[str, Any] = {"x": X, "weight": WEIGHT} | change
    with pytest.raises(error, match=re.escape(message)):
        gated_conv2d(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "activation: expected one of"),
        ({"padding_mode": "circular"}, "padding_mode: expected one of"),
        ({"gate_order": "last"}, "gate_order: expected one of"),
    ],
)
def test_module_rejects_what_the_function_would(change, message):
    with pytest.raises(ValueError, match=message):
        GatedConv2d(3, 4, 3, **change)


def test_geometry_of_even_kernels_under_tensorflow():
    """Size 5, stride 2, kernel 4: three outputs, one zero in front and two behind."""
    x, weight = torch.arange(1.0, 6).view(1, 1, 1, 5).double(), torch.ones(2, 1, 1, 4).double()
    y = gated_conv2d(x, weight, stride=(1, 2), padding_mode="same_tf", activation="none", backend="reference")
    sums = torch.tensor([0 + 1 + 2 + 3, 2 + 3 + 4 + 5, 4 + 5 + 0 + 0], dtype=torch.float64)
    torch.testing.assert_close(y.flatten(), sums * sums.sigmoid())
    assert Geometry((1, 2), (0, 0, 1, 2), (1, 1)).output_size((1, 5), (1, 4)) == (1, 3)
