"""partial_conv2d: every backend against the float64 reference, the reference against loops and the public modules."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from benches.peers import import_file
from inpaint_kernels import PartialConv2dResult, explain, partial_conv2d
from inpaint_kernels.nn import PartialConv2d
from inpaint_kernels.portable import _convolution
from tests.convolutions import (
    LAYOUTS,
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
    peer_checkout,
)

BACKENDS = backends("partial_conv2d")
RULES = ("nvidia", "naoto", "paper")
MASKS = ("one", "each", "segments")

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
with_the_reference_too = pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
in_both_layouts = pytest.mark.parametrize("layout", ["nchw", "channels_last"])
under_every_rule = pytest.mark.parametrize("rule", RULES)


@pytest.fixture(autouse=True)
def _one_thread():
    """The maps here are too small for two, which would wait for each other on a busy machine."""
    torch.set_num_threads(1)


def masked_layer(
    geometry: Arguments,
    channels: tuple[int, int] = (6, 4),
    *,
    mask: str = "one",
    kind: str = "holes",
    per_sample: bool = True,
    **options: Any,
) -> Arguments:
    """Arguments of a call. ``mask``: how many channels it has. ``kind``: holes, bool, soft, none (known) or all."""
    arguments = layer(geometry, channels, **options)
    x = arguments["x"]
    count = {"one": 1, "each": channels[0], "segments": 3}[mask]
    known = torch.rand(x.shape[0] if per_sample else 1, count, x.shape[2], x.shape[3], dtype=torch.float64)
    if kind != "soft":
        known = (known > 0.5).double()
        known[:, :, 3:9, 4:12] = 0  # larger than a kernel: outputs that know nothing
    if kind in ("none", "all"):
        known.fill_(kind == "all")
    if mask == "segments":
        arguments["mask_channels"] = (channels[0] - 3, 1, 2)
    return {**arguments, "mask": known.bool() if kind == "bool" else known.to(x.dtype)}


# Against the reference ------------------------------------------------------------------------------------------------


@on_every_backend
@under_every_rule
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("geometry", ZEROS, ids=str)
def test_every_geometry_equals_the_reference(backend, rule, mask, geometry):
    for layout in ("nchw", "channels_last"):
        assert_equals_reference(
            partial_conv2d, masked_layer({**geometry, "rule": rule}, mask=mask, layout=layout), backend
        )


@on_every_backend
@under_every_rule
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["soft", "bool", "none", "all"])
@pytest.mark.parametrize("bias", [True, False])
def test_masks(backend, rule, mask, kind, bias):
    for per_sample in (True, False):
        arguments = masked_layer(
            {"kernel": 3, "padding": 1, "rule": rule}, mask=mask, kind=kind, per_sample=per_sample, bias=bias
        )
        assert_equals_reference(partial_conv2d, arguments, backend)


@on_every_backend
@in_both_layouts
@under_every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(backend, layout, rule, dtype):
    for channels, mask in (((3, 17), "one"), ((24, 16), "segments"), ((33, 5), "each")):
        geometry = {"kernel": 5, "padding": 2, "stride": 2, "rule": rule}
        assert_equals_reference(
            partial_conv2d, masked_layer(geometry, channels, mask=mask, dtype=dtype, layout=layout), backend
        )


@on_every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask_layout", LAYOUTS)
def test_layouts(backend, layout, mask_layout):
    for mask in MASKS:
        arguments = masked_layer({"kernel": 3, "padding": 1}, mask=mask, layout=layout, dtype=torch.float32)
        arguments["mask"] = LAYOUTS[mask_layout](arguments["mask"])
        assert_equals_reference(partial_conv2d, arguments, backend)


@pytest.mark.parametrize("rule", ["nvidia", "paper"])
@pytest.mark.parametrize("mask", MASKS)
def test_groups_run_on_the_portable_backend(rule, mask):
    arguments = masked_layer({"kernel": 3, "padding": 1, "groups": 2, "rule": rule}, mask=mask)
    assert explain("partial_conv2d", **arguments).chosen == "portable"
    assert_equals_reference(partial_conv2d, arguments, "portable")
    assert_gradients_equal_reference(partial_conv2d, arguments, "portable")


@on_every_backend
@under_every_rule
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["holes", "soft"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients(backend, rule, mask, kind, bias):
    for layout in ("nchw", "channels_last"):
        geometry = {"kernel": 3, "padding": 1, "stride": 2, "rule": rule}
        arguments = masked_layer(geometry, mask=mask, kind=kind, bias=bias, layout=layout)
        assert_gradients_equal_reference(partial_conv2d, arguments, backend)


@on_every_backend
@under_every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_dtypes(backend, rule, dtype):
    arguments = masked_layer({"kernel": 3, "padding": 1, "rule": rule}, (8, 12), dtype=dtype)
    assert_gradients_equal_reference(partial_conv2d, arguments, backend)


# Oracles that share nothing with the reference ------------------------------------------------------------------------


def published(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rule: str,
    eps: float,
    mask_channels: Any,
    **options: Any,
) -> PartialConv2dResult:
    """The three rules as their sources write them, with the convolutions in loops, and masks convolved in full."""
    counts = mask_channels or ([x.shape[1]] if mask.shape[1] == 1 else [1] * x.shape[1])
    full = torch.cat([mask[:, i : i + 1].repeat(1, n, 1, 1) for i, n in enumerate(counts)], 1).to(x.dtype)
    counted = mask.to(x.dtype) if rule == "nvidia" and mask.shape[1] == 1 else full
    window = counted.shape[1] * weight.shape[2] * weight.shape[3]
    sums = naive_convolution(counted, torch.ones(1, counted.shape[1], *weight.shape[2:], dtype=x.dtype), **options)
    raw = naive_convolution(x * full, weight, bias, **options)
    bias_view = torch.zeros(1, 1, 1, 1, dtype=x.dtype) if bias is None else bias.view(1, -1, 1, 1)
    if rule == "nvidia":
        ratio = window / (sums + eps)
        update = torch.clamp(sums, 0, 1)
        ratio = ratio * update
        output = raw * ratio if bias is None else ((raw - bias_view) * ratio + bias_view) * update
        return PartialConv2dResult(output, update)
    holes = sums == 0
    sums = sums.masked_fill(holes, 1.0)
    output = (raw - bias_view) / sums * (window if rule == "paper" else 1) + bias_view
    return PartialConv2dResult(output.masked_fill(holes, 0.0), (~holes).to(x.dtype))


@with_the_reference_too
@under_every_rule
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["holes", "soft"])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_published_formula_in_loops(backend, rule, mask, kind, bias):
    geometry = {"kernel": (3, 4), "padding": (2, 1), "stride": (2, 1), "dilation": (1, 2)}
    arguments = masked_layer(geometry, mask=mask, kind=kind, bias=bias, size=(9, 10), batch=2)
    spread = arguments.pop("mask_channels", None)
    expected = published(**arguments, rule=rule, eps=0.125, mask_channels=spread)
    got = partial_conv2d(**arguments, rule=rule, eps=0.125, mask_channels=spread, backend=backend)
    torch.testing.assert_close(got.output, expected.output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.mask, expected.mask, rtol=1e-12, atol=1e-12)


@with_the_reference_too
def test_rules_differ_by_what_the_specification_says(backend):
    """All is known: "paper" scales the border up; "naoto" with kh * kw * Cin times the weights is the same."""
    arguments = masked_layer({"kernel": 3, "padding": 1}, kind="all")
    paper = partial_conv2d(**arguments, rule="paper", backend=backend)
    nvidia = partial_conv2d(**arguments, rule="nvidia", backend=backend)
    naoto = partial_conv2d(**{**arguments, "weight": arguments["weight"] * 9 * 6}, rule="naoto", backend=backend)
    torch.testing.assert_close(paper.output, nvidia.output, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(paper.output, naoto.output, rtol=1e-12, atol=1e-12)
    plain = torch.nn.functional.conv2d(arguments["x"], arguments["weight"], padding=1)
    bias = arguments["bias"].view(-1, 1, 1)
    torch.testing.assert_close(paper.output[..., 1:-1, 1:-1], (plain + bias)[..., 1:-1, 1:-1])
    torch.testing.assert_close(paper.output[..., 0, 1:-1], (plain * 1.5 + bias)[..., 0, 1:-1])
    assert torch.equal(paper.mask, torch.ones_like(paper.mask))


@with_the_reference_too
@under_every_rule
def test_a_hole_shrinks_and_is_zero(backend, rule):
    arguments = masked_layer({"kernel": 3, "padding": 1, "rule": rule}, kind="all")
    arguments["mask"][:, :, 4:9, 5:11] = 0
    y, mask = partial_conv2d(**arguments, backend=backend)
    hole = torch.zeros_like(mask)
    hole[:, :, 5:8, 6:10] = 1
    assert torch.equal(mask, 1 - hole)
    assert y[(hole > 0).expand_as(y)].count_nonzero() == 0
    arguments["x"][:, :, 4:9, 5:11] = 1e3  # what is in the hole does not count
    assert torch.equal(partial_conv2d(**arguments, backend=backend).output, y)


@with_the_reference_too
def test_float16_keeps_an_eps_that_it_cannot_hold(backend):
    arguments = masked_layer({"kernel": 7, "padding": 3}, (4, 4), dtype=torch.float16, bias=False)
    arguments["mask"][:, :, :, :9] = 0  # 0 / (0 + 1e-8): with eps rounded to 0, a NaN
    y, _ = partial_conv2d(**arguments, eps=1e-8, backend=backend)
    assert y.isfinite().all()
    assert y[..., :6].count_nonzero() == 0
    small = partial_conv2d(**{**arguments, "mask": arguments["mask"] * 1e-4}, rule="paper", backend=backend)
    torch.testing.assert_close(small.output, y, rtol=2e-2, atol=2e-2)


@with_the_reference_too
def test_eps_of_zero_leaves_holes_zero(backend):
    arguments = masked_layer({"kernel": 3, "padding": 1}, kind="none")
    assert partial_conv2d(**arguments, eps=0.0, backend=backend).output.count_nonzero() == 0


def test_equals_nvidia(request):
    module = import_file(peer_checkout(request, "NVIDIA/partialconv"), "models/partialconv2d.py").PartialConv2d
    for multi_channel in (False, True):
        for bias in (False, True):
            for kernel, stride, padding, dilation in ((3, 1, 1, 1), (7, 2, 3, 2)):
                options = {"bias": bias, "multi_channel": multi_channel, "return_mask": True}
                peer = module(6, 5, kernel, stride, padding, dilation, **options).double()
                ours = PartialConv2d(6, 5, kernel, stride, padding, dilation, bias=bias, dtype=torch.float64)
                ours.load_state_dict(peer.state_dict())
                for kind in (None, "holes", "soft"):
                    arguments = masked_layer({"kernel": 1}, mask="each" if multi_channel else "one", kind=kind or "all")
                    call = (arguments["x"],) if kind is None else (arguments["x"], arguments["mask"])
                    (expected, expected_mask), (y, mask) = peer(*call), ours(*call)
                    torch.testing.assert_close(y, expected, rtol=1e-7, atol=1e-7)
                    torch.testing.assert_close(mask.expand_as(expected_mask), expected_mask, rtol=1e-7, atol=1e-7)
                    if kind is not None:
                        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_equals_naoto(request):
    checkout = peer_checkout(request, "naoto0804/pytorch-inpainting-with-partial-conv")
    module = import_file(checkout, "net.py", stand_ins=("torchvision",)).PartialConv
    for bias in (False, True):
        peer = module(6, 5, 5, 2, 2, bias=bias).double()
        ours = PartialConv2d(6, 5, 5, 2, 2, bias=bias, rule="naoto", dtype=torch.float64)
        ours.load_state_dict(peer.state_dict())
        for mask in MASKS:
            arguments = masked_layer({"kernel": 5}, mask=mask)
            ours.mask_channels = arguments.get("mask_channels")
            counts = torch.tensor(ours.mask_channels or [6 if mask == "one" else 1] * arguments["mask"].shape[1])
            expected, expected_mask = peer(arguments["x"], arguments["mask"].repeat_interleave(counts, 1))
            y, new_mask = ours(arguments["x"], arguments["mask"])
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
            assert torch.equal(new_mask.expand_as(expected_mask), expected_mask)


# Gradient -------------------------------------------------------------------------------------------------------------


@with_the_reference_too
@under_every_rule
def test_gradcheck(backend, rule):
    arguments = masked_layer(
        {"kernel": 3, "padding": 1, "rule": rule}, (4, 3), mask="segments", size=(5, 6), kind="soft"
    )
    x, weight, bias = (arguments.pop(name).requires_grad_() for name in ("x", "weight", "bias"))

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return partial_conv2d(x, weight=weight, bias=bias, **arguments, backend=backend).output

    assert torch.autograd.gradcheck(call, (x, weight, bias), fast_mode=True)


@with_the_reference_too
@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_one_gradient_alone(backend, wanted):
    arguments = masked_layer({"kernel": 3, "padding": 1})
    expected = gradients(partial_conv2d, arguments, "reference")[wanted]
    arguments[wanted].requires_grad_()
    y, mask = partial_conv2d(**arguments, backend=backend)
    assert not mask.requires_grad
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (got,) = torch.autograd.grad(y, arguments[wanted], weights)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@with_the_reference_too
@pytest.mark.parametrize("rule", ["nvidia", "naoto"])
def test_second_gradient(backend, rule):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 4, 3), (2, 2, 3, 3), (2,))
    leaves = [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]).double().view(1, 1, 4, 3)

    def call(x, weight, bias):
        return partial_conv2d(x, mask, weight, bias, padding=1, rule=rule, backend=backend).output

    assert torch.autograd.gradgradcheck(call, leaves)


# Memory, reproducibility ----------------------------------------------------------------------------------------------


@in_both_layouts
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_portable_holds_input_output_and_some_bands(monkeypatch, layout, mask, dtype):
    geometry = {"kernel": 3, "padding": 1}
    arguments = masked_layer(geometry, (8, 24), mask=mask, size=(96, 64), batch=1, dtype=dtype, layout=layout)
    monkeypatch.setattr(_convolution, "BAND", 24 * 64 * 4)
    with PeakMemory() as memory:
        y, new_mask = partial_conv2d(**arguments, backend="portable")
    of_masks = 5 * 4 * 98 * 66  # one-channel maps in float32
    band = 4 * _convolution.BAND
    assert y.nbytes + new_mask.nbytes <= memory.peak <= y.nbytes + of_masks + 3 * band
    assert 4 * y.numel() > 3 * band


def test_portable_result_does_not_depend_on_the_bands(monkeypatch):
    for geometry in ZEROS:
        for mask in MASKS:
            arguments = masked_layer(geometry, mask=mask, per_sample=mask != "each")
            whole = partial_conv2d(**arguments, backend="portable").output
            for band in (1, 100, 300):
                monkeypatch.setattr(_convolution, "BAND", band)
                got = partial_conv2d(**arguments, backend="portable").output
                torch.testing.assert_close(got, whole, rtol=1e-12, atol=1e-12)
            monkeypatch.undo()


@on_every_backend
@in_both_layouts
def test_same_bits_from_run_to_run_and_output_for_any_number_of_threads(backend, layout):
    geometry = {"kernel": 5, "padding": 2, "stride": 2}
    arguments = masked_layer(geometry, (24, 48), size=(60, 52), dtype=torch.float32, layout=layout)
    expected = partial_conv2d(**arguments, backend=backend)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        got = partial_conv2d(**arguments, backend=backend)
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True)), threads
        first, second = (gradients(partial_conv2d, arguments, backend) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first), threads


@on_every_backend
def test_uninitialised_memory_is_never_read(backend, poisoned_memory):
    for geometry in (ZEROS[1], ZEROS[4], ZEROS[10]):
        for mask in MASKS:
            arguments = masked_layer(geometry, mask=mask)
            assert_equals_reference(partial_conv2d, arguments, backend)
            assert_gradients_equal_reference(partial_conv2d, arguments, backend)


@with_the_reference_too
def test_batch_of_zero(backend):
    arguments = masked_layer({"kernel": 3, "padding": 1}, batch=0)
    y, mask = partial_conv2d(**arguments, backend=backend)
    assert (y.shape, mask.shape) == ((0, 4, 13, 18), (0, 1, 13, 18))
    one_mask = {**arguments, "mask": torch.ones(1, 1, 13, 18)}
    assert partial_conv2d(**one_mask, backend=backend).mask.shape == (1, 1, 13, 18)
    assert gradients(partial_conv2d, arguments, backend)["weight"].count_nonzero() == 0


@with_the_reference_too
@pytest.mark.parametrize("kind", ["holes", "bool"])
def test_tensors_are_left_as_they_were(backend, kind):
    arguments = masked_layer({"kernel": 3, "padding": 1}, kind=kind)
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    gradients(partial_conv2d, arguments, backend)
    partial_conv2d(**arguments, backend=backend)
    assert all(torch.equal(arguments[name], x) for name, x in before.items())


@on_every_backend
def test_nan_in_a_hole_stays_one_as_published(backend):
    arguments = masked_layer({"kernel": 3, "padding": 1}, kind="all", dtype=torch.float32)
    arguments["mask"][:, :, 5, 7] = 0
    arguments["x"][1, 2, 5, 7] = math.nan
    y = partial_conv2d(**arguments, backend=backend).output
    seen = torch.zeros(2, 1, 13, 18, dtype=torch.bool)
    seen[1, :, 4:7, 6:9] = True
    assert torch.equal(y.isnan(), seen.expand_as(y))


# Inside torch ---------------------------------------------------------------------------------------------------------


@with_the_reference_too
def test_opcheck(backend):
    op = torch.ops.inpaint_kernels.partial_conv2d.default
    geometry = ((1, 1), (1, 1, 1, 1), (1, 1), 1)
    x, mask, weight, bias = (
        torch.randn(2, 3, 6, 7),
        torch.rand(1, 1, 6, 7) > 0.5,
        torch.randn(4, 3, 3, 3),
        torch.randn(4),
    )
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(op, (leaves[0], mask, (3,), *leaves[1:], *geometry, "nvidia", 1e-8, backend))
    last, masks = x.contiguous(memory_format=torch.channels_last), torch.rand(2, 2, 6, 7)
    torch.library.opcheck(op, (last, masks, (1, 2), weight, None, *geometry, "paper", 1e-8, backend))


@on_every_backend
def test_compiles_into_one_graph_for_all_sizes(backend):
    def call(x: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        y, mask = partial_conv2d(x, mask, weight, stride=2, padding=1, backend=backend)
        both = torch.cat((mask, mask), 1)
        return partial_conv2d(y, both, weight, mask_channels=(1, 2), rule="paper", backend=backend).output

    compiled, graphs = compiled_graphs(call)
    weight = torch.randn(3, 3, 3, 3)
    for size in ((12, 16), (21, 14), (17, 19)):
        x, mask = torch.randn(2, 3, *size), (torch.rand(2, 1, *size) > 0.5).float()
        torch.testing.assert_close(compiled(x, mask, weight), call(x, mask, weight))
    assert len(graphs) == 1


@on_every_backend
def test_compiled_gradient(backend):
    mask = (torch.rand(1, 1, 8, 9) > 0.5).float()

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return partial_conv2d(x, mask, weight, padding=1, backend=backend).output.square().sum()

    leaves = torch.randn(1, 2, 8, 9, requires_grad=True), torch.randn(4, 2, 3, 3, requires_grad=True)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for got, expected in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, call)), strict=True):
        torch.testing.assert_close(got, expected)


@on_every_backend
def test_export_with_dynamic_sizes(backend):
    module = PartialConv2d(3, 4, 3, 2, 1, backend=backend)
    sizes = {2: torch.export.Dim("h", min=8, max=64), 3: torch.export.Dim("w", min=8, max=64)}
    example = (torch.randn(1, 3, 16, 12), torch.ones(1, 1, 16, 12))
    program = torch.export.export(module, example, dynamic_shapes=(sizes, sizes))
    assert "inpaint_kernels.partial_conv2d" in str(program.graph)
    x, mask = torch.randn(1, 3, 21, 18), (torch.rand(1, 1, 21, 18) > 0.5).float()
    for got, expected in zip(program.module()(x, mask), module(x, mask), strict=True):
        torch.testing.assert_close(got, expected)


@on_every_backend
def test_autocast_casts_as_a_convolution(backend):
    arguments = masked_layer({"kernel": 3, "padding": 1}, dtype=torch.float32, kind="soft")
    expected = partial_conv2d(**in_dtype(arguments, torch.bfloat16), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        y, mask = partial_conv2d(**arguments, backend=backend)
        grads = gradients(partial_conv2d, arguments, backend)
    assert torch.equal(y, expected.output)
    assert torch.equal(mask, expected.mask)
    assert mask.dtype == torch.float32
    assert all(grad.dtype == torch.float32 for grad in grads.values())


@on_every_backend
def test_inference_mode(backend):
    arguments = masked_layer({"kernel": 3, "padding": 1})
    expected = partial_conv2d(**arguments, backend=backend)
    with torch.inference_mode():
        got = partial_conv2d(**arguments, backend=backend)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_meta_tensors():
    x, weight = torch.empty(2, 3, 8, 9, device="meta"), torch.empty(4, 3, 3, 3, device="meta")
    last = x.contiguous(memory_format=torch.channels_last)
    y, mask = partial_conv2d(last, torch.empty(1, 1, 8, 9, dtype=torch.bool, device="meta"), weight)
    assert (y.shape, mask.shape, mask.dtype) == ((2, 4, 6, 7), (1, 1, 6, 7), torch.bool)
    assert_layout(y, last)


# The module -----------------------------------------------------------------------------------------------------------


def test_module_is_the_function_with_its_parameters():
    module = PartialConv2d(5, 3, 3, 2, 1, rule="paper", mask_channels=[4, 1])
    x, mask = torch.randn(2, 5, 9, 10), (torch.rand(2, 2, 9, 10) > 0.5).float()
    expected = partial_conv2d(x, mask, module.weight, module.bias, 2, 1, rule="paper", mask_channels=(4, 1))
    assert all(torch.equal(*pair) for pair in zip(module(x, mask), expected, strict=True))
    ones = partial_conv2d(x, torch.ones(1, 1, 9, 10), module.weight, module.bias, 2, 1, rule="paper")
    torch.testing.assert_close(module(x).output, ones.output)
    assert list(module.state_dict()) == ["weight", "bias"]
    assert repr(module).endswith("rule='paper', mask_channels=(4, 1))")
    with pytest.raises(ValueError, match="rule: expected one of 'nvidia', 'naoto', 'paper', got 'mean'"):
        PartialConv2d(5, 3, 3, rule="mean")


@pytest.mark.parametrize("dialect", ["nvidia", "mmagic", "naoto"])
def test_module_loads_published_names(dialect):
    model, conv = torch.nn.Module(), PartialConv2d(4, 3, 5)
    model.add_module("enc_1", conv)
    weight, bias, ones = torch.randn(3, 4, 5, 5), torch.randn(3), torch.ones(3, 4, 5, 5)
    name = "enc_1.input_conv" if dialect == "naoto" else "enc_1"
    state = {f"{name}.weight": weight, f"{name}.bias": bias}
    constants = {"naoto": "enc_1.mask_conv.weight", "mmagic": "enc_1.weight_mask_updater"}
    if dialect in constants:
        state[constants[dialect]] = ones
    model.load_state_dict(state)
    assert torch.equal(conv.weight, weight)


# Errors ---------------------------------------------------------------------------------------------------------------

X, MASK, WEIGHT = torch.zeros(2, 3, 8, 9), torch.ones(2, 1, 8, 9), torch.zeros(4, 3, 3, 3)
TWO = torch.ones(2, 2, 8, 9)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[0]}, ValueError, "x: expected shape [B, Cin, H, W], got [3, 8, 9]"),
        ({"mask": MASK[:, 0]}, ValueError, "mask: expected shape [B|1, M, H, W] with B=2, H=8, W=9, got [2, 8, 9]"),
        ({"mask": MASK[:, :, :7]}, ValueError, "mask: expected shape [B|1, M, H, W] with B=2, H=8, W=9, got"),
        ({"mask": torch.ones(3, 1, 8, 9)}, ValueError, "mask: expected shape [B|1, M, H, W] with B=2"),
        ({"mask": TWO}, ValueError, "mask: expected 1 or 3 channels, one for all of x or one for each"),
        ({"mask": MASK.int()}, TypeError, "mask: expected torch.bool or a floating-point dtype, got torch.int32"),
        ({"mask": None}, TypeError, "mask: expected a torch.Tensor, got NoneType"),
        ({"mask": MASK.to("meta")}, ValueError, "x, mask: expected one device, got x on cpu, mask on meta"),
        (
            {"mask": MASK.clone().requires_grad_()},
            ValueError,
            "mask: expected a tensor that requires no gradient (there is none; detach it)",
        ),
        (
            {"mask": TWO, "mask_channels": (2, 2)},
            ValueError,
            "mask_channels: expected 2 numbers, one for each channel of mask, with the sum 3, the channels of x; "
            "got (2, 2)",
        ),
        ({"mask": TWO, "mask_channels": (3,)}, ValueError, "mask_channels: expected 2 numbers"),
        ({"mask": TWO, "mask_channels": (3, 0)}, ValueError, "mask_channels: expected a number >= 1, got 0"),
        ({"mask": TWO, "mask_channels": (1.5, 1.5)}, TypeError, "mask_channels: expected an integer, got float"),
        ({"weight": WEIGHT[:, :2]}, ValueError, "weight: expected shape [O, Cin/groups, kh, kw] with Cin/groups=3"),
        ({"weight": WEIGHT.half()}, TypeError, "x, weight: expected one dtype"),
        ({"bias": torch.zeros(3)}, ValueError, "bias: expected shape [O] with O=4, got [3]"),
        ({"stride": 0}, ValueError, "stride: expected a number >= 1, got 0"),
        ({"padding": (1, -1)}, ValueError, "padding: expected a number >= 0, got -1"),
        ({"dilation": 9}, ValueError, "x: expected, with its padding, at least the 19 x 19 pixels"),
        ({"rule": "mean"}, ValueError, "rule: expected one of 'nvidia', 'naoto', 'paper', got 'mean'"),
        ({"eps": -1e-8}, ValueError, "eps: expected a number >= 0, got -1e-08"),
        ({"groups": 3, "weight": WEIGHT[:3, :1], "rule": "naoto"}, ValueError, "groups: expected 1 with rule='naoto'"),
        ({"backend": "cuda"}, RuntimeError, "partial_conv2d has no cuda kernel"),
    ],
    ids=lambda x: x.split(", got")[0] if isinstance(x, str) else "",
)
def test_errors_name_the_argument(change, error, message):
    arguments: dict[str, Any] = {"x": X, "mask": MASK, "weight": WEIGHT} | change
    with pytest.raises(error, match=re.escape(message)):
        partial_conv2d(**arguments)
