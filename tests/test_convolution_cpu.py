"""The CPU kernel behind gated_conv2d, dilated_conv2d and partial_conv2d: its three ways, its tiles, its conversions."""

from __future__ import annotations

import gc
import itertools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from inpaint_kernels import _native, dilated_conv2d, gated_conv2d, partial_conv2d
from inpaint_kernels._packed_weights import PACKED_WEIGHTS
from inpaint_kernels.ops import _convolution
from inpaint_kernels.portable._convolution import Geometry, convolution_backward
from tests.compare import FLOOR, relative_error
from tests.convolutions import LAYOUTS, Arguments

pytestmark = pytest.mark.skipif(
    not _native.available("gated_conv2d", "CPU"), reason=str(_native.why_not("gated_conv2d", "CPU"))
)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# What rounding once may cost; float32 sums of a few hundred products.
LIMIT = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
SETTINGS = 60


def some_setting(seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, Arguments]:
    """x, weight, bias and geometry; channels and sizes around what panels, tiles, chunks and strips are made of."""
    choose = random.Random(f"{seed} {dtype}")
    generator = torch.Generator().manual_seed(seed)
    channels, rows = choose.choice([1, 3, 5, 16, 17, 24, 32, 48, 96]), 2 * choose.choice([1, 3, 8, 12, 16, 24, 40, 48])
    height, width = choose.choice([5, 9, 16, 23, 40]), choose.choice([4, 7, 16, 33, 50])
    kernel, dilation = choose.choice([1, 3, 3, 3, 3, 5]), choose.choice([1, 1, 2, 4, 16])
    reach = dilation * (kernel - 1)
    padding = choose.choice([reach // 2, reach // 2 + 1, max(0, (reach + 2 - min(height, width)) // 2 + 1)])
    if 2 * padding + min(height, width) <= reach:
        padding = reach
    x = torch.randn(choose.choice([1, 2]), channels, height, width, generator=generator).to(dtype)
    weight = (torch.randn(rows, channels, kernel, kernel, generator=generator) * (channels * kernel**2) ** -0.5).to(
        dtype
    )
    bias = torch.randn(rows, generator=generator).to(dtype) if choose.random() < 0.7 else None
    geometry = {"stride": choose.choice([1, 1, 1, 2]), "padding": padding, "dilation": dilation}
    return LAYOUTS[choose.choice(list(LAYOUTS))](x), weight, bias, geometry


def in_double(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_sizes_equal_the_reference(dtype):
    for seed in range(SETTINGS):
        x, weight, bias, geometry = some_setting(seed, dtype)
        for op in (gated_conv2d, dilated_conv2d):
            out = op(x, weight, bias, **geometry, backend="cpu")
            expected = op(x.double(), weight.double(), in_double(bias), **geometry, backend="reference")
            error = relative_error(out, expected)
            assert error <= LIMIT[dtype], (
                f"{op.__name__} {seed}: {error:.1e}, {list(x.shape)} {list(weight.shape)} {geometry}"
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_masks_equal_the_reference(dtype):
    for seed in range(SETTINGS // 2):
        x, weight, bias, geometry = some_setting(seed, dtype)
        channels = x.shape[1]
        split = (
            (channels,) if seed % 3 == 0 or channels < 2 else (1, channels - 1) if seed % 3 == 1 else (1,) * channels
        )
        generator = torch.Generator().manual_seed(seed)
        mask = (torch.rand(1, len(split), *x.shape[2:], generator=generator) < 0.6).to(dtype)
        settings = {**geometry, "mask_channels": split, "rule": "paper"}
        out, known = partial_conv2d(x, mask, weight, bias, **settings, backend="cpu")
        expected, expected_known = partial_conv2d(
            x.double(), mask.double(), weight.double(), in_double(bias), **settings, backend="reference"
        )
        assert torch.equal(known.double(), expected_known)
        error = relative_error(out, expected)
        assert error <= LIMIT[dtype], f"{seed}: {error:.1e}, {list(x.shape)} {list(weight.shape)} {geometry}"


@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_winograd_rounds_like_the_direct_sum(dtype, dilation):
    """Of maps with a mean far from 0 too, where its differences cancel most."""
    generator = torch.Generator().manual_seed(7)
    for offset in (0.0, 3.0):
        x = (torch.randn(1, 96, 37, 41, generator=generator) + offset).to(dtype)
        weight = (torch.randn(48, 96, 3, 3, generator=generator) / 30).to(dtype)
        settings = {"padding": dilation, "dilation": dilation}
        out = dilated_conv2d(x, weight, **settings, activation="none", backend="cpu")
        expected = F.conv2d(x.double(), weight.double(), **settings)
        eager = F.conv2d(x, weight, **settings)
        assert relative_error(out, expected) <= max(FLOOR[dtype], 1.5 * relative_error(eager, expected))
        if dtype.itemsize == 2:
            rounded = relative_error(expected.to(dtype), expected)
            assert relative_error(out, expected) <= 1.1 * rounded, "more than the rounding of the result"


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("factor", [1.0, 1 / 3, 2.0**-10, 40.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_short_float_is_read_and_rounded_as_torch_does(dtype, factor, layout):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    x = LAYOUTS[layout](bits.view(dtype).view(8, 8, 32, 32))
    weight = (torch.eye(8) * factor).to(dtype)[:, :, None, None]
    # Channel by channel: a product with the zeros beside it would turn an infinity into NaN.
    expected = (x.float() * weight[0, 0].float()).to(dtype)
    for channel in range(8):
        own = x[:, channel : channel + 1].contiguous()
        out = dilated_conv2d(own, weight[:1, :1], activation="none", backend="cpu")
        want = expected[:, channel : channel + 1]
        # The instruction that multiplies pairs of bfloat16 takes subnormal numbers as 0.
        tiny = torch.finfo(torch.bfloat16).tiny
        counted = torch.ones_like(want, dtype=torch.bool)
        if dtype == torch.bfloat16:
            counted = ~((own.abs() < tiny) | (want.abs() < 2 * tiny))
        same = (out == want) | (out.isnan() & want.isnan())
        assert same[counted].all()


def test_infinity_stays_near():
    """A tile of Winograd's mixes its 4 x 4 or 6 x 6 inputs; nothing farther away is touched."""
    x = torch.randn(1, 32, 40, 40)
    clean = dilated_conv2d(x, torch.ones(16, 32, 3, 3), padding=1, activation="none", backend="cpu")
    x[0, 5, 20, 20] = torch.inf
    out = dilated_conv2d(x, torch.ones(16, 32, 3, 3), padding=1, activation="none", backend="cpu")
    assert not out[0, :, 19:22, 19:22].isfinite().any()
    far = torch.ones(40, 40, dtype=torch.bool)
    far[17:24, 17:24] = False
    assert torch.equal(out[..., far], clean[..., far])


@pytest.mark.parametrize("activation", ["elu", "relu", "leaky_relu", "none"])
def test_epilogue_over_the_whole_range(activation):
    """Activation and sigmoid of large, small and tiny numbers, to the last digits."""
    numbers = torch.cat([torch.linspace(-120, 120, 4001), torch.logspace(-30, 2, 500), -torch.logspace(-30, 2, 500)])
    for dtype, limit in ((torch.float32, 5e-7), (torch.float64, 2e-15)):
        features = numbers.to(dtype)[None, :].expand(len(numbers) // 250, -1)
        gate = numbers[::250].to(dtype)[: len(features), None].expand_as(features)
        x = torch.stack([features, gate])[None].contiguous()
        weight = torch.eye(2, dtype=dtype)[:, :, None, None]
        out = gated_conv2d(x, weight, activation=activation, backend="cpu")
        expected = gated_conv2d(x.double(), weight.double(), activation=activation, backend="reference")
        # Below the smallest normal number of the exponential nothing is promised.
        error = (out.double() - expected).abs() / (expected.abs() + 1e-28)
        assert error.max() <= limit, f"{dtype}: {error.max():.1e}"


def test_strips_and_bands_do_not_show():
    """A map so wide that rows are cut into strips, with every stride: the same as its parts."""
    for stride, kernel in itertools.product((1, 2), (3, 5)):
        x, weight = torch.randn(1, 48, 9, 1500), torch.randn(24, 48, kernel, kernel) / 30
        out = dilated_conv2d(x, weight, stride=stride, padding=kernel // 2, activation="none", backend="cpu")
        expected = F.conv2d(x.double(), weight.double(), stride=stride, padding=kernel // 2)
        assert (out - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_outputs_equal_the_reference(dtype, monkeypatch):
    """Maps of few outputs under a large weight go another way; here every map does."""
    monkeypatch.setattr(_convolution, "_LARGE_WEIGHT", 0)
    monkeypatch.setattr(_convolution, "_FEW_OUTPUTS", 10**6)
    monkeypatch.setattr(_convolution, "_FEW_WINOGRAD_OUTPUTS", 10**6)
    for seed in range(SETTINGS // 2):
        x, weight, bias, geometry = some_setting(seed, dtype)
        for op in (gated_conv2d, dilated_conv2d):
            out = op(x, weight, bias, **geometry, backend="cpu")
            expected = op(x.double(), weight.double(), in_double(bias), **geometry, backend="reference")
            error = relative_error(out, expected)
            assert error <= LIMIT[dtype], (
                f"{op.__name__} {seed}: {error:.1e}, {list(x.shape)} {list(weight.shape)} {geometry}"
            )


def test_the_number_of_outputs_decides_the_way(monkeypatch):
    weight = torch.randn(512, 256, 3, 3) / 50
    packings: list[Any] = []
    monkeypatch.setattr(_convolution, "PACKED_WEIGHTS", _Recorder(packings))
    for side, stride in ((64, 2), (66, 2), (8, 1), (9, 1)):
        x = torch.randn(1, 256, side, side)
        out = dilated_conv2d(x, weight, None, stride, 1, activation="none", backend="cpu")
        assert relative_error(out, F.conv2d(x.double(), weight.double(), stride=stride, padding=1)) < 2e-6
    assert [packing.few_outputs for packing in packings] == [True, False, True, False]
    assert [packing.unit_stride for packing in packings] == [False, False, True, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_that_are_kept_for_a_large_weight(dtype):
    """Winograd's weights of 4 MB and more are read once for all tiles of all samples."""
    generator = torch.Generator().manual_seed(3)
    weight = (torch.randn(256, 256, 3, 3, generator=generator) / 48).to(dtype)
    for shape, layout, padding in (((2, 256, 11, 13), "nchw", 1), ((1, 256, 16, 16), "channels_last", 2)):
        x = LAYOUTS[layout](torch.randn(shape, generator=generator).to(dtype))
        bias = torch.randn(256, generator=generator).to(dtype)
        variants: tuple[Arguments, ...] = ({}, {"padding_mode": "reflect", "upsample": 2})
        for settings in variants:
            out = gated_conv2d(x, weight, bias, padding=padding, **settings, backend="cpu")
            expected = gated_conv2d(
                x.double(), weight.double(), bias.double(), padding=padding, **settings, backend="reference"
            )
            assert relative_error(out, expected) <= LIMIT[dtype]


class _Recorder:
    def __init__(self, packings):
        self.packings = packings

    def get(self, weight, packing, pack, digest, keep):
        self.packings.append(packing)
        return pack(weight, packing)


# ---- Packed weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_change_of_a_weight_is_seen(layout):
    """Also those that torch counts no version for, as an average of weights in another model makes them."""
    x, weight = torch.randn(1, 16, 9, 9), torch.nn.Parameter(LAYOUTS[layout](torch.randn(8, 16, 3, 3)))
    changes = [
        lambda: weight.data.mul_(0.9),
        lambda: weight.data.neg_(),
        lambda: weight.data.copy_(weight.data.flip(0)),
        lambda: weight.data[-1, -1, -1, -1].add_(1.0),
        lambda: weight.data[0, 0, 0, 0].neg_(),
        lambda: setattr(weight, "data", torch.randn(8, 16, 3, 3)),
    ]
    with torch.no_grad():
        for change in changes:
            before = dilated_conv2d(x, weight, activation="none", backend="cpu")
            change()
            after = dilated_conv2d(x, weight, activation="none", backend="cpu")
            assert not torch.equal(before, after)
            assert relative_error(after, F.conv2d(x.double(), weight.double())) < 2e-6


def test_a_weight_is_packed_once_and_forgotten_with_it():
    PACKED_WEIGHTS.clear()
    x, weight = torch.randn(1, 16, 9, 9), torch.randn(8, 16, 3, 3)
    packings = []
    pack = _convolution._pack_cpu_weight

    def recorded(weight: torch.Tensor, packing: Any) -> torch.Tensor:
        packings.append(packing)
        return pack(weight, packing)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_convolution, "_pack_cpu_weight", recorded)
        first = dilated_conv2d(x, weight, backend="cpu")
        assert torch.equal(dilated_conv2d(x, weight, backend="cpu"), first)
        assert len(packings) == 1
        gated_conv2d(x, weight, backend="cpu")  # another packing of the same weight
        dilated_conv2d(x, weight, stride=2, backend="cpu")
        assert len(packings) == 3
        with torch.inference_mode():
            dilated_conv2d(x, weight, backend="cpu")
        assert len(packings) == 3
    assert len(PACKED_WEIGHTS) == 1
    del weight
    gc.collect()
    assert len(PACKED_WEIGHTS) == 0


def test_no_copy_is_kept_of_a_weight_that_is_trained():
    PACKED_WEIGHTS.clear()
    x, weight = torch.randn(1, 16, 9, 9), torch.nn.Parameter(torch.randn(8, 16, 3, 3))
    dilated_conv2d(x, weight, backend="cpu").sum().backward()
    assert len(PACKED_WEIGHTS) == 0
    with torch.no_grad():
        expected = dilated_conv2d(x, weight, backend="cpu")
    assert len(PACKED_WEIGHTS) == 1
    assert torch.equal(dilated_conv2d(x, weight, backend="cpu"), expected)  # with the copy that is there
    frozen = torch.randn(8, 16, 3, 3)
    dilated_conv2d(x.clone().requires_grad_(), frozen, backend="cpu").sum().backward()
    assert len(PACKED_WEIGHTS) == 2


def test_digests_of_changed_weights_differ():
    digest = torch.ops.inpaint_native.convolution_weight_digest
    for size in (1, 3, 64, 130):
        weight = torch.randn(size, 3, 1, 1)
        words = weight.view(-1).view(torch.int32)
        seen = {digest(weight)}
        for index in range(len(words)):
            for bit in range(32):
                words[index] ^= 1 << bit if bit < 31 else -(2**31)
                seen.add(digest(weight))
                words[index] ^= 1 << bit if bit < 31 else -(2**31)
        assert len(seen) == 1 + 32 * len(words)
    # Two changes that must not cancel: signs of whole rows, exchanged rows, an exchanged layout.
    weight = torch.randn(8, 16, 3, 3)
    variants = [
        weight,
        -weight,
        weight.flip(0),
        weight.roll(1, 1),
        weight.contiguous(memory_format=torch.channels_last),
    ]
    for i, j in itertools.combinations(range(8), 2):
        signs = torch.ones(8, 1, 1, 1)
        signs[[i, j]] = -1
        variants.append(weight * signs)
    assert len({digest(variant) for variant in variants}) == len(variants)


# The gradient of the weight -------------------------------------------------------------------------------------------


def some_gradient(seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Geometry]:
    """grad, x, weight and geometry, around what the kernel's blocks, strips, tiles and bands are made of."""
    choose, generator = random.Random(f"{seed} {dtype}"), torch.Generator().manual_seed(seed)
    channels = choose.choice([1, 3, 5, 16, 17, 24, 40, 200])
    rows = choose.choice([1, 2, 7, 16, 24, 31, 40, 48, 198])
    kernel = choose.choice([(1, 1), (3, 3), (3, 3), (3, 3), (5, 5), (2, 3), (4, 4)])
    dilation, stride = (
        choose.choice([(1, 1), (1, 1), (2, 2), (3, 2), (9, 9)]),
        choose.choice([(1, 1), (1, 1), (2, 2), (1, 3)]),
    )
    upsample, reflect = choose.choice([1, 1, 2]), choose.random() < 0.3
    size = choose.choice([5, 8, 13, 30]), choose.choice([5, 9, 16, 33, 150])
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    pad: Any = []
    for axis in (0, 1):
        enough = max(0, reach[axis] - size[axis] * upsample)  # not every tap is inside for a single output
        before = choose.choice([0, reach[axis] // 2, reach[axis] // 3])
        pad += [before, max(enough - before, choose.choice([0, reach[axis] // 2, 1]))]
        reflect = reflect and max(pad[-2:]) < size[axis] * upsample
    geometry = Geometry(stride, tuple(pad), dilation, 1, upsample, reflect)
    x = torch.randn(choose.choice([1, 1, 2]), channels, *size, generator=generator)
    weight = torch.randn(rows, channels, *kernel, generator=generator)
    grad = torch.randn(x.shape[0], rows, *geometry.output_of(x, weight), generator=generator)
    layouts = [LAYOUTS[choose.choice(["nchw", "channels_last"])] for _ in range(2)]
    return layouts[0](grad.to(dtype)), layouts[1](x.to(dtype)), weight.to(dtype), geometry


def weight_gradient_in_float64(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: Geometry
) -> tuple[torch.Tensor, torch.Tensor]:
    grad, x, weight = (t.double().contiguous() for t in (grad, x, weight))
    _, of_weight, of_bias = convolution_backward(grad, x, weight, geometry, [False, True, True])
    assert of_weight is not None
    assert of_bias is not None
    return of_weight, of_bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_gradient_of_a_weight_equals_that_in_float64(dtype):
    for seed in range(2 * SETTINGS):
        grad, x, weight, geometry = some_gradient(seed, dtype)
        got = _convolution._cpu_weight_gradient(grad, x, weight, geometry)
        expected = weight_gradient_in_float64(grad, x, weight, geometry)
        # What rounding costs is in proportion to the terms, of which a sum may cancel most.
        terms = max(grad.double().abs().sum((0, 2, 3)).norm().item(), 1e-30)
        assert got[0].dtype == got[1].dtype == dtype
        assert relative_error(got[0], expected[0]) < LIMIT[dtype], (seed, geometry, x.shape, weight.shape)
        assert (got[1].double() - expected[1]).norm() < LIMIT[dtype] * terms, (seed, geometry, x.shape, weight.shape)


def test_gradient_of_a_weight_is_the_same_for_any_number_of_threads(poisoned_memory):
    before = torch.get_num_threads()
    try:
        for seed in range(12):
            case = some_gradient(seed, torch.float32)
            results = []
            for threads in (1, 2, 3, 1):
                torch.set_num_threads(threads)
                results.append(_convolution._cpu_weight_gradient(*case))
            for result in results[1:]:
                assert all(map(torch.equal, result, results[0]))
    finally:
        torch.set_num_threads(before)


def test_gradient_of_a_weight_over_many_pixels_rounds_no_more_than_a_short_sum():
    """Sums of sums: one long sum in float32 loses ten times as much."""
    x, grad = torch.randn(1, 16, 256, 256), torch.randn(1, 16, 256, 256)
    weight, geometry = torch.randn(16, 16, 3, 3), Geometry((1, 1), (1, 1, 1, 1), (1, 1))
    expected = weight_gradient_in_float64(grad, x, weight, geometry)
    for ours, theirs in zip(_convolution._cpu_weight_gradient(grad, x, weight, geometry), expected, strict=True):
        assert relative_error(ours, theirs) < 1e-6


def test_gradient_of_the_weight_is_not_torchs(monkeypatch):
    """Nor does the op copy its maps: only the gradient of x may still be torch's."""
    arguments: Arguments = {"x": torch.randn(1, 4, 6, 7), "weight": torch.randn(8, 4, 3, 3).requires_grad_()}
    wanted: list[list[bool]] = []

    def record(*args: Any) -> tuple[None, None, None]:
        wanted.append(list(args[-1]))
        return None, None, None

    monkeypatch.setattr(_convolution, "convolution_backward", record)
    for op in (gated_conv2d, dilated_conv2d):
        op(**arguments, padding=1, backend="cpu").sum().backward()
    assert wanted == []


def test_gradient_of_a_weight_of_another_dtype_is_an_error():
    """Its memory is too small for what would be written."""
    x, grad = torch.randn(1, 2, 4, 4), torch.randn(1, 3, 4, 4)
    short = torch.empty(3, 2, 1, 1, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="expected the dtype of x"):
        torch.ops.inpaint_native.convolution_weight_gradient(grad, x, 1, 1, 0, 0, 1, 1, 1, False, short, None)


# Padding on four sides ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [(1, 0, 2, 0), (0, 2, 0, 1), (2, 1, 0, 3)])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("backend", ["cpu", "portable", "reference"])
@pytest.mark.parametrize("op", [dilated_conv2d, gated_conv2d, partial_conv2d])
def test_padding_on_four_sides_is_that_of_a_padded_input(op, backend, stride, mode, padding):
    if op is partial_conv2d and mode == "reflect":
        pytest.skip("partial convolutions pad with zeros")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 11, 13, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 5, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    top, bottom, left, right = padding
    padded = F.pad(x, (left, right, top, bottom), mode="constant" if mode == "zeros" else mode)
    if op is partial_conv2d:
        mask = (torch.rand(2, 1, 11, 13, generator=generator) > 0.4).double()
        actual = op(x, mask, weight, None, stride, padding, backend=backend).output
        expected = op(padded, F.pad(mask, (left, right, top, bottom)), weight, None, stride, backend="reference").output
    else:
        actual = op(x, weight, None, stride, padding, padding_mode=mode, backend=backend)
        expected = op(padded, weight, None, stride, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    cotangent = torch.randn(actual.shape, generator=generator, dtype=torch.float64)
    for gradient, wanted in zip(
        torch.autograd.grad(actual, (x, weight), cotangent),
        torch.autograd.grad(expected, (x, weight), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-11)


def test_padding_on_four_sides_is_checked():
    x, weight = torch.rand(1, 3, 8, 9), torch.rand(4, 3, 3, 3)
    with pytest.raises(ValueError, match="padding: expected a number >= 0, got -1"):
        dilated_conv2d(x, weight, padding=(1, 1, -1, 1))
    with pytest.raises(ValueError, match="padding: expected less than the size 8 x 9"):
        dilated_conv2d(x, weight, padding=(1, 8, 1, 1), padding_mode="reflect")
