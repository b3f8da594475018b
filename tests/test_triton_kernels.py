"""The convolutions' Triton kernels, one by one: in Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from inpaint_kernels._packed_weights import PACKED_WEIGHTS, PackedWeights
from inpaint_kernels.portable._convolution import Activation, Geometry
from inpaint_kernels.triton_kernels import _launch, _launch_config, dilated_conv2d, gated_conv2d, partial_conv2d
from inpaint_kernels.triton_kernels._availability import reasons
from inpaint_kernels.triton_kernels._launch_config import LaunchConfig, Layer, Precision, in_gemm, launch_config
from inpaint_kernels.triton_kernels._packed_weights import Packing, pack
from tests.compare import assert_close_to_reference, relative_error

pytest.importorskip("triton")
from inpaint_kernels.triton_kernels import _implicit_gemm as gemm

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
NONE = Activation("none")
ACTIVATIONS = [Activation("elu"), Activation("relu"), Activation("leaky_relu", 0.1), NONE]

NCHW, CHANNELS_LAST = torch.contiguous_format, torch.channels_last

# The interpreter has no bfloat16.
half_dtypes = pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
dtypes_and_layouts = pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, NCHW),
        (torch.float32, CHANNELS_LAST),
        (torch.float16, CHANNELS_LAST),
        pytest.param(torch.float16, NCHW, marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, NCHW, marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, CHANNELS_LAST, marks=pytest.mark.gpu),
    ],
)
layouts = pytest.mark.parametrize("layout", [NCHW, CHANNELS_LAST])


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch):
    """Float32 is float32 on a GPU too; one test is about tf32."""
    monkeypatch.setattr(_launch_config, "convolutions_may_use_tf32", lambda: False)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32, layout: Any = NCHW) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype).contiguous(memory_format=layout)


def random_weight(columns: int, channels: int, kernel: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return random(columns, channels, *kernel, dtype=dtype) / (channels * kernel[0] * kernel[1]) ** 0.5


def sums(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution by torch's own operations, in the dtype of ``x``."""
    if geometry.upsample > 1:
        x = F.interpolate(x, scale_factor=geometry.upsample, mode="nearest")
    top, bottom, left, right = geometry.pad
    x = F.pad(x, (left, right, top, bottom), mode="reflect" if geometry.reflect else "constant")
    return F.conv2d(x, weight, bias, geometry.stride, 0, geometry.dilation)


def expected_sums(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The same in float64."""
    bias = None if bias is None else bias.detach().cpu().double()
    return sums(x.cpu().double(), weight.detach().cpu().double(), bias, geometry)


def act(x: Tensor, activation: Activation) -> Tensor:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "elu": F.elu,
        "relu": F.relu,
        "leaky_relu": lambda x: F.leaky_relu(x, activation.slope),
        "none": lambda x: x,
    }
    return functions[activation.name](x)


def assert_close(out: Tensor, reference: Tensor, eager: Tensor | None = None) -> None:
    """A half dtype may lose what one or two roundings lose; float32 what plain torch loses in it."""
    eager = reference.to(out.dtype) if eager is None else eager
    assert_close_to_reference(out, reference, eager)


# ---- The sums --------------------------------------------------------------------------------------------------------

one = (1, 1)
GEOMETRIES = {
    "1x1": (Geometry(one, (0, 0, 0, 0), one), (1, 1), 16, 24),
    "3x3": (Geometry(one, (1, 1, 1, 1), one), (3, 3), 24, 48),
    "3x3-48": (Geometry(one, (1, 1, 1, 1), one), (3, 3), 48, 96),
    "4x4-stride-2": (Geometry((2, 2), (1, 1, 1, 1), one), (4, 4), 16, 12),
    "5x5-of-5-channels": (Geometry(one, (2, 2, 2, 2), one), (5, 5), 5, 48),
    "7x7-of-3-channels": (Geometry((2, 2), (3, 3, 3, 3), one), (7, 7), 3, 6),
    "same-uneven": (Geometry((2, 2), (0, 1, 0, 1), one), (3, 3), 24, 96),
    "four-pads": (Geometry(one, (0, 3, 2, 1), one), (3, 3), 5, 3),
    "stride-2-1": (Geometry((2, 1), (1, 1, 1, 1), one), (3, 3), 16, 192),
    "dilation-2": (Geometry(one, (2, 2, 2, 2), (2, 2)), (3, 3), 48, 24),
    "dilation-4": (Geometry(one, (4, 4, 4, 4), (4, 4)), (3, 3), 16, 48),
    "dilation-16": (Geometry(one, (16, 16, 16, 16), (16, 16)), (3, 3), 24, 12),
    "dilation-2-3": (Geometry(one, (2, 2, 3, 3), (2, 3)), (3, 3), 3, 48),
    "upsample": (Geometry(one, (1, 1, 1, 1), one, upsample=2), (3, 3), 5, 24),
    "upsample-3-stride-2": (Geometry((2, 2), (1, 0, 2, 1), one, upsample=3), (4, 3), 5, 6),
    "reflect": (Geometry(one, (2, 2, 2, 2), one, reflect=True), (5, 5), 5, 12),
    "reflect-uneven-dilated": (Geometry(one, (4, 3, 4, 2), (2, 3), reflect=True), (3, 3), 16, 24),
    "reflect-upsample": (Geometry(one, (3, 3, 3, 3), one, upsample=2, reflect=True), (7, 7), 3, 6),
    "rows-only": (Geometry(one, (0, 0, 0, 0), one), (3, 1), 24, 160),
    "wide-kernel": (Geometry(one, (0, 0, 4, 4), one), (1, 9), 3, 5),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_sums_of_every_geometry(name, poisoned_memory):
    check_sums(name, torch.float32)


@pytest.mark.parametrize("name", ["3x3-48", "5x5-of-5-channels", "same-uneven", "dilation-2", "reflect-upsample"])
@half_dtypes
def test_sums_of_half_precision(name, dtype, poisoned_memory):
    check_sums(name, dtype)


def check_sums(name: str, dtype: torch.dtype) -> None:
    geometry, kernel, channels, columns = GEOMETRIES[name]
    size = (18, 17) if geometry.dilation[0] > 4 else (7, 5)  # no tap but the middle one sees a smaller input
    x, weight = random(2, channels, *size, dtype=dtype), random_weight(columns, channels, kernel, dtype)
    bias = random(columns, dtype=dtype)
    y = dilated_conv2d.activation_in_gemm(x, weight, bias, geometry, NONE, None)
    eager = sums(x.cpu(), weight.cpu(), bias.cpu(), geometry) if dtype == torch.float32 else None
    assert_close(y, expected_sums(x, weight, bias, geometry), eager)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bfloat16", "tf32", "float32"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_sums_of_every_geometry_on_a_gpu(name, precision, monkeypatch):
    """More pixels than the interpreter could take, and all that tensor cores multiply."""
    monkeypatch.setattr(_launch_config, "convolutions_may_use_tf32", lambda: precision == "tf32")
    geometry, kernel, channels, columns = GEOMETRIES[name]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    x, weight = random(3, channels, 70, 61, dtype=dtype), random_weight(columns, channels, kernel, dtype)
    bias = random(columns, dtype=dtype)
    y = dilated_conv2d.activation_in_gemm(x, weight, bias, geometry, NONE, None)
    reference = expected_sums(x, weight, bias, geometry)
    if precision == "tf32":
        assert relative_error(y, reference) < 2e-3
    else:
        assert_close(y, reference, sums(x, weight, bias, geometry))


@pytest.mark.parametrize(
    "config",
    [
        LaunchConfig(16, 16, 1, 16, 4, 1),
        LaunchConfig(32, 16, 3, 32, 4, 2),
        LaunchConfig(64, 32, 3, 64, 4, 2),
        LaunchConfig(128, 64, 3, 16, 8, 2),
        LaunchConfig(64, 64, 2, 32, 8, 2),
        LaunchConfig(16, 128, 1, 32, 4, 3),
    ],
    ids=str,
)
def test_sums_with_every_kind_of_tile(config, monkeypatch, poisoned_memory):
    monkeypatch.setattr(gemm, "launch_config", lambda layer, capability: config)
    geometry = Geometry((1, 2), (1, 1, 1, 1), (1, 1))
    for channels, columns in ((32, 48), (5, 102)):
        x, weight = random(1, channels, 4, 9), random_weight(columns, channels, (3, 3))
        y, kept = gated_conv2d.gate_in_gemm(x, weight, None, geometry, NONE, False, True)
        features, gates = expected_sums(x, weight, None, geometry).chunk(2, 1)
        eager = sums(x.cpu(), weight.cpu(), None, geometry)
        assert_close(kept, gates, eager.chunk(2, 1)[1])
        assert_close(y, features * gates.sigmoid())


def test_tf32(monkeypatch):
    """The interpreter multiplies in float32 here; a GPU rounds the operands to 11 digits."""
    monkeypatch.setattr(_launch_config, "convolutions_may_use_tf32", lambda: True)
    geometry = Geometry((1, 1), (1, 1, 1, 1), (1, 1))
    x, weight, bias = random(1, 24, 9, 8), random_weight(48, 24, (3, 3)), random(48)
    assert _launch_config.layer_of(x, weight, geometry).precision == "tf32"
    y = dilated_conv2d.dilated_conv2d(x, weight, bias, geometry, NONE, None)
    assert (y.cpu() - expected_sums(x, weight, bias, geometry)).abs().max() < (1e-2 if HAS_GPU else 1e-5)


def test_tf32_follows_torch(monkeypatch):
    monkeypatch.undo()
    cudnn: Any = torch.backends.cudnn
    before = cudnn.allow_tf32
    try:
        for allowed in (True, False):
            cudnn.allow_tf32 = allowed
            assert _launch_config.precision_of(torch.float32) == ("tf32" if allowed else "float32")
    finally:
        cudnn.allow_tf32 = before
    assert _launch_config.precision_of(torch.float16) == "float16"
    assert _launch_config.precision_of(torch.bfloat16) == "bfloat16"


def test_offsets_of_64_bits(monkeypatch, poisoned_memory):
    monkeypatch.setattr(_launch, "_LARGEST_INT32_TENSOR", 0)
    geometry = Geometry((1, 1), (2, 2, 2, 2), (2, 2), upsample=2)
    x, weight, bias = random(2, 5, 6, 7), random_weight(12, 5, (3, 3)), random(12)
    expected = expected_sums(x, weight, bias, geometry)
    features, gates = expected.chunk(2, 1)
    for gate in (gated_conv2d.gate_in_gemm, gated_conv2d.gate_behind_cudnn):
        y, kept = gate(x, weight, bias, geometry, NONE, False, True)
        assert_close(kept, gates)
        assert_close(y, features * gates.sigmoid())


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_padding_of_a_sum_reads_nothing():
    """The depth of 3 is padded to 16; what lies beyond in memory must not be multiplied by the zeros there."""
    x = torch.full((1, 3, 4, 4), torch.inf, device=DEVICE)
    x[:, :, 1::2, ::2] = 1.0
    y = dilated_conv2d.activation_in_gemm(
        x, torch.ones(2, 3, 1, 1, device=DEVICE), None, Geometry((1, 1), (0, 0, 0, 0), (1, 1)), NONE, None
    )
    assert torch.equal(y, x[:, :2] * 3)


# ---- Epilogues -------------------------------------------------------------------------------------------------------

SAME_3 = Geometry((1, 1), (2, 2, 2, 2), (2, 2))


@pytest.mark.parametrize("convolution", [dilated_conv2d.activation_in_gemm, dilated_conv2d.activation_behind_cudnn])
@pytest.mark.parametrize(
    ("activation", "with_bias", "with_residual"),
    [
        (Activation("elu"), True, True),
        (Activation("relu"), True, False),
        (Activation("leaky_relu", 0.1), False, True),
        (NONE, False, False),
    ],
    ids=str,
)
@dtypes_and_layouts
def test_activation_and_residual(convolution, activation, with_bias, with_residual, dtype, layout, poisoned_memory):
    x, weight = random(2, 5, 5, 6, dtype=dtype, layout=layout), random_weight(24, 5, (3, 3), dtype)
    bias = random(24, dtype=dtype) if with_bias else None
    residual = random(2, 24, 5, 6, dtype=dtype) if with_residual else None
    y = convolution(x, weight, bias, SAME_3, activation, residual)
    reference = act(expected_sums(x, weight, bias, SAME_3), activation)
    assert_close(y, reference if residual is None else reference + residual.cpu().double())
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("gate", [gated_conv2d.gate_in_gemm, gated_conv2d.gate_behind_cudnn])
@pytest.mark.parametrize(
    ("activation", "gate_first", "keep", "columns", "with_bias"),
    [
        (Activation("elu"), False, True, 48, True),
        (Activation("elu"), True, False, 96, True),
        (Activation("relu"), True, True, 6, False),
        (Activation("leaky_relu", 0.1), False, False, 192, False),
        (NONE, True, True, 2, True),
    ],
    ids=str,
)
@dtypes_and_layouts
def test_gate(gate, activation, gate_first, keep, columns, with_bias, dtype, layout, poisoned_memory):
    x, weight = random(2, 5, 6, 5, dtype=dtype, layout=layout), random_weight(columns, 5, (3, 3), dtype)
    bias = random(columns, dtype=dtype) if with_bias else None
    y, kept = gate(x, weight, bias, SAME_3, activation, gate_first, keep)
    expected = expected_sums(x, weight, bias, SAME_3)
    features, gates = reversed(expected.chunk(2, 1)) if gate_first else expected.chunk(2, 1)
    assert_close(y, act(features, activation) * gates.sigmoid())
    assert y.is_contiguous(memory_format=layout)
    if keep:
        assert_close(kept, gates)
        assert kept.is_contiguous(memory_format=layout)
    else:
        assert kept.numel() == 0


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("gate_first", [False, True])
@dtypes_and_layouts
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_gate_backward(activation, gate_first, dtype, layout, poisoned_memory):
    sums = random(2, 12, 9, 16, dtype=dtype)
    sums[:, :, 0, :2] = torch.tensor(
        [0.0, -1e-4], device=DEVICE
    )  # where torch chooses a side; where exp(x) - 1 is tiny
    sums[:, :, 0, 2:4] = torch.tensor([200.0, -200.0], device=DEVICE)  # where the sigmoid is 1, where it underflows
    grad_y = random(2, 6, 9, 16, dtype=dtype)
    leaf = sums.cpu().double().requires_grad_()
    features, gates = reversed(leaf.chunk(2, 1)) if gate_first else leaf.chunk(2, 1)
    y = act(features, activation) * gates.sigmoid()
    kept_y, kept_gates = (t.detach().to(DEVICE, dtype).contiguous(memory_format=layout) for t in (y, gates))
    for grad in (grad_y, grad_y.contiguous(memory_format=CHANNELS_LAST), grad_y[:1, :1, :1, :1].expand(2, 6, 9, 16)):
        (expected,) = torch.autograd.grad(y, leaf, grad.cpu().double(), retain_graph=True)
        grad_sums = gated_conv2d.gated_conv2d_gate_backward(grad, kept_y, kept_gates, activation, gate_first)
        assert_close(grad_sums, expected)
        assert grad_sums.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("convolution", [partial_conv2d.renormalised_in_gemm, partial_conv2d.renormalised_behind_cudnn])
@pytest.mark.parametrize(
    ("mask_channels", "mask_batch", "with_bias"),
    [((24,), 1, True), ((24,), 2, False), ((8, 16), 2, True), ((1,) * 5, 1, True)],
    ids=["one", "one-of-each-sample", "two", "each"],
)
@dtypes_and_layouts
def test_mask_and_scale(convolution, mask_channels, mask_batch, with_bias, dtype, layout, poisoned_memory):
    channels = sum(mask_channels)
    x, weight = random(2, channels, 7, 8, dtype=dtype, layout=layout), random_weight(12, channels, (3, 3), dtype)
    bias = random(12, dtype=dtype) if with_bias else None
    geometry = Geometry((2, 1), (1, 1, 1, 1), (1, 1))
    mask = (torch.rand(mask_batch, len(mask_channels), 7, 8) > 0.4).to(DEVICE)
    mask = mask if mask_batch == 1 else mask.to(dtype)
    scale = torch.rand(mask_batch, 1, *geometry.output_size((7, 8), (3, 3))).mul_(9).to(DEVICE)
    scale[..., 0] = 0
    shift = (scale > 3).float()
    y = convolution(x, mask, mask_channels, weight, bias, geometry, scale, shift)
    known = mask.cpu().double().repeat_interleave(torch.tensor(mask_channels), dim=1)
    reference = expected_sums(x.cpu().double() * known, weight, None, geometry) * scale.cpu().double()
    if bias is not None:
        reference += (bias.view(-1, 1, 1) * shift).cpu().double()
    assert_close(y, reference)
    assert y.is_contiguous(memory_format=layout)


def test_soft_mask():
    x, weight, mask = random(1, 3, 5, 6), random_weight(4, 3, (3, 3)), torch.rand(1, 1, 5, 6).to(DEVICE)
    geometry, ones = Geometry((1, 1), (1, 1, 1, 1), (1, 1)), torch.ones(1, 1, 5, 6, device=DEVICE)
    y = partial_conv2d.renormalised_in_gemm(x, mask, (3,), weight, None, geometry, ones, ones)
    assert_close(y, expected_sums(x * mask, weight, None, geometry))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_nan_stays(activation):
    x = torch.ones(1, 1, 1, 3, device=DEVICE)
    x[..., 1] = torch.nan
    for convolution in (dilated_conv2d.activation_in_gemm, dilated_conv2d.activation_behind_cudnn):
        weight = torch.ones(1, 1, 1, 1, device=DEVICE)
        y = convolution(x, weight, None, Geometry((1, 1), (0, 0, 0, 0), (1, 1)), activation, None)
        assert y.isnan().flatten().tolist() == [False, True, False]
    y, ones = torch.ones(1, 1, 1, 2, device=DEVICE), torch.ones(1, 1, 1, 2, device=DEVICE)
    y[0, 0, 0, 0] = torch.nan
    grad_sums = gated_conv2d.gated_conv2d_gate_backward(ones, y, ones, activation, False)
    assert grad_sums.isnan()[0, 1, 0].tolist() == [True, False]
    assert grad_sums.isnan()[0, 0, 0].tolist() == [activation.name == "elu", False]


@pytest.mark.parametrize("value", [-1e-3, -0.029, -0.031, -1.0, -20.0])
def test_elu_is_accurate_near_zero(value):
    x = torch.full((1, 1, 1, 1), value, device=DEVICE)
    geometry = Geometry((1, 1), (0, 0, 0, 0), (1, 1))
    y = dilated_conv2d.activation_behind_cudnn(x, torch.ones_like(x), None, geometry, Activation("elu"), None)
    assert y.item() == pytest.approx(F.elu(x.double()).item(), rel=5e-6)


# ---- Shapes and layouts ----------------------------------------------------------------------------------------------

WAYS = [True, False]


def choose(monkeypatch: pytest.MonkeyPatch, inside: bool) -> None:
    for module in (gated_conv2d, dilated_conv2d, partial_conv2d):
        monkeypatch.setattr(module, "in_gemm", lambda layer, capability: (inside, ""))


def all_three(x: Tensor, columns: int, bias: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """(result, reference) of each op."""
    weight, size = random_weight(columns, x.shape[1], (3, 3), x.dtype), tuple(x.shape[2:])
    geometry = Geometry((1, 1), (1, 1, 1, 1), (1, 1))
    ones = torch.ones(1, 1, *size, device=DEVICE)
    expected = expected_sums(x, weight, bias, geometry)
    features, gates = expected.chunk(2, 1)
    y, kept = gated_conv2d.gated_conv2d(x, weight, bias, geometry, NONE, False, True)
    return [
        (y, features * gates.sigmoid()),
        (kept, gates),
        (dilated_conv2d.dilated_conv2d(x, weight, bias, geometry, NONE, None), expected),
        (partial_conv2d.partial_conv2d(x, ones, (x.shape[1],), weight, bias, geometry, ones, ones), expected),
    ]


@pytest.mark.parametrize("inside", WAYS)
@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 4, 1, 1), (2, 1, 5, 6), (1, 1, 1, 1), (1, 3, 1, 9)], ids=str)
@layouts
def test_few_samples_pixels_or_channels(inside, shape, layout, monkeypatch, poisoned_memory):
    choose(monkeypatch, inside)
    for y, expected in all_three(random(*shape, layout=layout), 2, random(2)):
        assert_close(y, expected)


@pytest.mark.parametrize("inside", WAYS)
def test_input_with_gaps(inside, monkeypatch, poisoned_memory):
    """Neither NCHW nor channels_last: the result is NCHW."""
    choose(monkeypatch, inside)
    wide = random(2, 4, 7, 12)
    for x in (wide[..., ::2], wide.transpose(2, 3), wide[:, 1:3, :, :7].contiguous(memory_format=CHANNELS_LAST)):
        for y, expected in all_three(x, 6, None):
            assert_close(y, expected)
            layout = CHANNELS_LAST if x.shape[1] == 2 else NCHW
            assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("inside", WAYS)
def test_same_bits_twice(inside, monkeypatch):
    choose(monkeypatch, inside)
    x = random(1, 24, 5, 5)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append([y for y, _ in all_three(x, 48, None)])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


# ---- Choices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 3, 24, 48, 96, 100, 192, 384, 512])
@pytest.mark.parametrize("channels", [3, 12, 24, 64, 96, 512])
@pytest.mark.parametrize("precision", ["bfloat16", "tf32", "float32"])
def test_launch_config_fits(columns, channels, precision):
    for capability in ((8, 0), (8, 6), (9, 0), (10, 0)):
        for outputs in (1, 5000, 4_000_000):
            layer = Layer(outputs, channels, 9, columns, precision, masked=capability == (8, 6)).padded
            config = launch_config(layer, capability)
            assert config.shared_bytes(layer) <= _launch_config.SHARED_BUDGET
            for size in (config.block_m, config.block_n, config.block_k):
                assert size >= 16
                assert size & (size - 1) == 0
            per_thread = config.block_m * config.width / (32 * config.warps)
            assert per_thread <= 96
            assert config.tiles in (1, 3)
            assert config.stages >= 1


def test_tiles_fit_channels_of_three_times_a_power_of_two():
    for columns in (48, 96, 192, 384):
        config = launch_config(Layer(4_000_000, 48, 9, columns, "bfloat16"), (8, 0))
        assert columns % config.width == 0


@pytest.mark.parametrize(
    ("channels", "precision", "padded"),
    [
        (3, "bfloat16", 8),
        (5, "float16", 8),
        (12, "bfloat16", 12),
        (3, "tf32", 4),
        (6, "tf32", 6),
        (100, "float16", 100),
    ],
)
def test_pixels_are_padded_to_whole_vectors(channels, precision, padded):
    assert Layer(100, channels, 9, 48, precision).padded.channels_in == padded


def test_in_gemm_where_memory_decides_or_cudnn_is_slow():
    cases: list[tuple[int, Precision, int, bool]] = [
        (48, "bfloat16", 1, True),
        (96, "tf32", 1, True),
        (192, "float16", 1, True),
        (192, "tf32", 8, False),
        (256, "bfloat16", 8, False),
        (256, "bfloat16", 16, True),
        (48, "float32", 16, False),
    ]
    for columns, precision, dilation, expected in cases:
        inside, reason = in_gemm(Layer(4_000_000, 48, 9, columns, precision, dilation=dilation), (9, 0))
        assert inside is expected
        assert "decide" in reason


def test_automatic_way_is_that_of_the_rule(monkeypatch):
    x, weight = random(1, 3, 4, 4, dtype=torch.float16), random_weight(4, 3, (1, 1), torch.float16)
    for inside in WAYS:
        choose(monkeypatch, inside)
        for module, way in ((gated_conv2d, "gate"), (dilated_conv2d, "activation"), (partial_conv2d, "renormalised")):
            called: list[str] = []
            for name in (f"{way}_in_gemm", f"{way}_behind_cudnn"):
                monkeypatch.setattr(module, name, lambda *args, name=name, called=called: called.append(name))
            arguments: dict[str, Any] = {
                "gated_conv2d": (weight, None, SAME_3, NONE, False, False),
                "dilated_conv2d": (weight, None, SAME_3, NONE, None),
                "partial_conv2d": (None, (3,), weight, None, SAME_3, None, None),
            }
            op = module.__name__.rsplit(".", 1)[1]
            getattr(module, op)(x, *arguments[op])
            assert called == [f"{way}_in_gemm" if inside else f"{way}_behind_cudnn"]


def test_reasons(monkeypatch):
    x = torch.empty(1, 4, 4, 4, dtype=torch.float64)
    found = reasons(x, 2)
    assert found == [
        "x is on cpu, Triton's kernels run on CUDA",
        "torch.float64 is not among float32, float16, bfloat16",
        "groups is 2, the kernels take 1",
    ]
    monkeypatch.setattr("inpaint_kernels.triton_kernels._availability._triton_is_installed", lambda: False)
    assert reasons(x, 2) == ["the package triton is not installed", *found]


@pytest.mark.gpu
def test_no_reasons_on_a_gpu():
    assert reasons(random(1, 4, 4, 4), 1) == []


# ---- Packed weights --------------------------------------------------------------------------------------------------

PLAIN = Packing(channels=3, depth=32, columns=16, interleaved=False, gate_first=False, depth_contiguous=True)


def test_packed_weights_are_a_matrix_of_taps_and_channels():
    weight = random(6, 3, 3, 3)
    columns = weight.permute(0, 2, 3, 1).reshape(6, 27).t()
    for packing in (PLAIN, PLAIN._replace(depth_contiguous=False)):
        packed = pack(weight, packing)
        assert packed.shape == (32, 16)
        assert packed.stride(0 if packing.depth_contiguous else 1) == 1
        assert torch.equal(packed[:27, :6], columns)
        assert not packed[27:].any()
        assert not packed[:, 6:].any()
    padded = pack(weight, PLAIN._replace(channels=4, depth=48))
    assert torch.equal(padded[:36, :6].unflatten(0, (9, 4))[:, :3].flatten(0, 1), columns)
    assert not padded[3::4].any()
    for gate_first, order in ((False, [0, 3, 1, 4, 2, 5]), (True, [3, 0, 4, 1, 5, 2])):
        packed = pack(weight, PLAIN._replace(interleaved=True, gate_first=gate_first))
        assert torch.equal(packed[:27, :6], columns[:, order])


def test_weights_are_packed_once_per_version():
    cache, weight = PackedWeights(), torch.nn.Parameter(random(6, 3, 3, 3))
    first = cache.get(weight, PLAIN, pack)
    assert cache.get(weight, PLAIN, pack) is first
    other = cache.get(weight, PLAIN._replace(columns=32), pack)
    assert other.shape == (32, 32)
    assert cache.get(weight, PLAIN, pack) is first

    with torch.no_grad():
        weight.mul_(2)
    changed = cache.get(weight, PLAIN, pack)
    assert torch.equal(changed, 2 * first)
    assert cache.get(weight, PLAIN, pack) is changed
    assert len(cache) == 1

    weight.data = random(6, 3, 3, 3)  # the same object, other memory
    assert torch.equal(cache.get(weight, PLAIN, pack), pack(weight, PLAIN))
    assert not cache.get(weight, PLAIN, pack).requires_grad
    cache.clear()
    assert len(cache) == 0


def test_an_optimizer_step_is_noticed_by_the_kernels():
    conv = torch.nn.Conv2d(3, 4, 3).to(DEVICE)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.5)
    x, geometry = random(1, 3, 6, 6), Geometry((1, 1), (0, 0, 0, 0), (1, 1))
    for _ in range(3):
        y = dilated_conv2d.activation_in_gemm(x, conv.weight, conv.bias, geometry, NONE, None)
        assert_close(y, expected_sums(x, conv.weight, conv.bias, geometry))
        optimizer.zero_grad()
        conv(x).square().sum().backward()
        optimizer.step()


def test_freed_weights_are_forgotten():
    cache = PackedWeights()
    weights = [random(2, 3, 1, 1) for _ in range(3)]
    for weight in weights:
        cache.get(weight, PLAIN, pack)
    assert len(cache) == 3
    del weight
    weights.pop()
    gc.collect()
    assert len(cache) == 2
    weights.clear()
    gc.collect()
    assert len(cache) == 0


def test_kernels_keep_no_weight_alive():
    PACKED_WEIGHTS.clear()
    weight = random_weight(4, 3, (1, 1))
    geometry = Geometry((1, 1), (0, 0, 0, 0), (1, 1))
    dilated_conv2d.activation_in_gemm(random(1, 3, 4, 4), weight, None, geometry, NONE, None)
    assert len(PACKED_WEIGHTS) == 1
    del weight
    gc.collect()
    assert len(PACKED_WEIGHTS) == 0


def test_packed_weights_are_bounded():
    cache = PackedWeights(limit=2, copies=2)
    weights = [random(2, 3, 1, 1) for _ in range(3)]
    first = cache.get(weights[0], PLAIN, pack)
    cache.get(weights[1], PLAIN, pack)
    assert cache.get(weights[0], PLAIN, pack) is first  # the one used least recently is now the other
    cache.get(weights[2], PLAIN, pack)
    assert len(cache) == 2
    assert cache.get(weights[0], PLAIN, pack) is first
    for columns in (32, 48):
        cache.get(weights[0], PLAIN._replace(columns=columns), pack)
    assert cache.get(weights[0], PLAIN, pack) is not first


def test_weights_without_a_version_are_packed_anew():
    cache = PackedWeights()
    with torch.inference_mode():
        weight = random(2, 3, 1, 1)
        cache.get(weight, PLAIN, pack)
        weight.zero_()
        assert not cache.get(weight, PLAIN, pack).any()
    with FakeTensorMode():
        fake = torch.empty(2, 3, 1, 1)
        assert cache.get(fake, PLAIN, pack).shape == (32, 16)
    assert len(cache) == 0


def test_packed_weights_from_many_threads():
    cache, weights = PackedWeights(limit=3), [random(4, 3, 3, 3) for _ in range(6)]
    wrong: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for step in range(60):
                weight = weights[(seed * step) % 6]
                assert torch.equal(cache.get(weight, PLAIN, pack), pack(weight, PLAIN))
                cache.get(torch.zeros(2, 3, 1, 1), PLAIN, pack)  # freed at once
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(cache) <= 3


@pytest.mark.gpu
def test_a_replayed_graph_sees_new_weights():
    geometry = Geometry((1, 1), (1, 1, 1, 1), (1, 1))
    x, weight = random(1, 24, 16, 16, dtype=torch.float16), random_weight(48, 24, (3, 3), torch.float16)
    dilated_conv2d.activation_in_gemm(x, weight, None, geometry, NONE, None)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dilated_conv2d.activation_in_gemm(x, weight, None, geometry, NONE, None)
    weight.neg_()
    graph.replay()
    assert_close(y, expected_sums(x, weight, None, geometry))


@pytest.mark.gpu
def test_another_stream_packs_its_own():
    cache, weight = PackedWeights(), random(2, 3, 1, 1)
    first = cache.get(weight, PLAIN, pack)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert cache.get(weight, PLAIN, pack) is not first
    assert cache.get(weight, PLAIN, pack) is first
