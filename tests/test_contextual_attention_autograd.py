"""contextual_attention: gradients, and its life inside torch (opcheck, compile, export, autocast, inference mode)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from inpaint_kernels import PRESETS, contextual_attention
from inpaint_kernels.portable import contextual_attention as portable
from tests.compare import assert_close_to_reference
from tests.test_contextual_attention import (
    LAYOUTS,
    WITH_REFERENCE,
    for_every_preset,
    in_dtype,
    make_inputs,
    on_every_backend,
)

MAPS = ("f", "b", "value")


def gradients(arguments: dict[str, Any], backend: str) -> list[Tensor]:
    """Gradients of f, b (and value) of the output's product with a fixed random tensor."""
    maps = {name: arguments[name].clone().requires_grad_() for name in MAPS if name in arguments}
    output = contextual_attention(**{**arguments, **maps}, backend=backend)
    weight = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad(output, list(maps.values()), weight.to(output.dtype)))


def assert_gradients_equal_reference(arguments: dict[str, Any], backend: str) -> None:
    judge = gradients(in_dtype(arguments, torch.float64), "reference")
    eager = gradients(arguments, "reference")
    for got, expected, plain in zip(gradients(arguments, backend), judge, eager, strict=True):
        assert got.dtype == arguments["f"].dtype
        assert_close_to_reference(got, expected, plain, kind="gradient")


# Gradients ------------------------------------------------------------------------------------------------------------


@on_every_backend
@for_every_preset
def test_gradients_of_every_preset(backend, preset):
    assert_gradients_equal_reference(make_inputs(preset, (8, 12), (10, 8)), backend)


@on_every_backend
@pytest.mark.parametrize(
    "overrides",
    [
        {"fuse": 5, "patch": 2},
        {"norm": "add", "eps": 0.5},
        {"norm": "none", "fuse": 0},
        {"eps": 2.0},  # some norms are clamped
        {"floor": 2e-2},  # some probabilities are clamped
        {"masking": "fill", "fill": -0.1},
        {"rate": 3, "paste_size": 4, "pad_put": 0, "divisor": 0.0},
        {"rate": 1, "paste_size": 3, "divisor": 0.0},
        {"queries": (1, 1, 3, 4)},
        {"key_scale": torch.linspace(0.5, 1.5, 20).view(1, 4, 5), "rate": 3},
    ],
    ids=str,
)
def test_gradients_of_general_parameters(backend, overrides):
    assert_gradients_equal_reference(
        {**make_inputs("nipponjo", (12, 18), (12, 15 if "key_scale" in overrides else 12)), **overrides}, backend
    )


@on_every_backend
@pytest.mark.parametrize("preset", ["nipponjo", "mmagic", "daa233"])
def test_float32_gradients_are_as_exact_as_plain_torch(backend, preset):
    assert_gradients_equal_reference(make_inputs(preset, (24, 32), channels=32, dtype=torch.float32), backend)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradients(backend, dtype):
    assert_gradients_equal_reference(in_dtype(make_inputs(channels=8), dtype), backend)


@pytest.mark.parametrize("backend", WITH_REFERENCE)
@pytest.mark.parametrize("preset", ["nipponjo", "daa233", "mmagic", "hifill"])
def test_gradcheck(backend, preset):
    arguments = make_inputs(preset, (4, 6), (6, 4), batch=2, channels=2)
    f, b = (arguments.pop(name).requires_grad_() for name in ("f", "b"))
    value = torch.randn(2, 1, 6, 4, dtype=torch.float64, requires_grad=True)

    def call(f: Tensor, b: Tensor, value: Tensor) -> Tensor:
        return contextual_attention(f, b, **{**arguments, "value": value}, backend=backend)

    assert torch.autograd.gradcheck(call, (f, b, value), fast_mode=True)


@on_every_backend
def test_gradient_of_self_attention(backend):
    x = (0.4 * torch.randn(1, 3, 10, 12, dtype=torch.float64)).requires_grad_()
    got, expected = (
        torch.autograd.grad(contextual_attention(x, x, backend=name).square().sum(), x)[0]
        for name in (backend, "reference")
    )
    assert_close_to_reference(got, expected, kind="gradient")


@pytest.mark.parametrize("backend", WITH_REFERENCE)
@pytest.mark.parametrize("preset", ["nipponjo", "mmagic", "selflein", "daa233", "pennet"])
def test_all_zero_patches_have_gradient_zero(backend, preset):
    arguments = make_inputs(preset, (16, 16), mask="none")
    arguments["b"][:, :, :10] = 0
    for got in gradients(arguments, backend):
        assert got.isfinite().all()
    arguments["f"].zero_()
    arguments["b"].zero_()
    query_grad, key_grad, *rest = gradients({"value": torch.zeros_like(arguments["b"]), **arguments}, backend)
    assert torch.equal(query_grad, torch.zeros_like(query_grad))
    assert torch.equal(key_grad, torch.zeros_like(key_grad))
    assert all(x.isfinite().all() for x in rest)


@on_every_backend
@pytest.mark.parametrize("masking", ["multiply", "inf"])
def test_nothing_valid_gives_gradient_zero(backend, masking):
    for got in gradients({**make_inputs(mask="all"), "masking": masking}, backend):
        assert torch.equal(got, torch.zeros_like(got))


@on_every_backend
def test_queries_outside_get_no_gradient(backend):
    """A gradient that arrives at pixels that were not asked for is ignored: they are constant 0."""
    arguments = {**make_inputs(f_size=(20, 24)), "queries": (3, 4, 5, 7)}
    f = arguments["f"].clone().requires_grad_()
    output = contextual_attention(**{**arguments, "f": f}, backend=backend)
    outside = torch.ones_like(output)
    outside[:, :, 6:10, 8:14] = 0
    (grad,) = torch.autograd.grad(output, f, outside)
    assert torch.equal(grad, torch.zeros_like(f))


@on_every_backend
def test_offsets_and_maximum_are_not_differentiable(backend):
    arguments = make_inputs()
    arguments["f"].requires_grad_()
    result = contextual_attention(**arguments, return_offsets=True, backend=backend)
    assert result.output.requires_grad
    assert not result.offsets.requires_grad
    assert not result.maximum.requires_grad


@pytest.mark.parametrize("backend", WITH_REFERENCE)
def test_second_backward_says_that_there_is_none(backend):
    f = torch.randn(1, 2, 8, 8, requires_grad=True)
    output = contextual_attention(f, f, backend=backend)
    (grad,) = torch.autograd.grad(output.square().sum(), f, create_graph=True)
    with pytest.raises(RuntimeError, match="contextual_attention: double backward is not implemented"):
        grad.sum().backward()


@on_every_backend
def test_gradient_bits_do_not_depend_on_run_or_threads(backend):
    arguments = make_inputs("nipponjo", (28, 36), channels=16, dtype=torch.float32)
    expected = gradients(arguments, backend)
    for threads in (2, 1, 3):
        torch.set_num_threads(threads)
        got = gradients(arguments, backend)
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True)), f"{threads} threads"


@on_every_backend
def test_backward_never_reads_uninitialised_memory(backend, poisoned_memory):
    for preset in ("nipponjo", "hifill", "pennet"):
        assert_gradients_equal_reference(make_inputs(preset, (8, 12)), backend)


def test_portable_gradient_does_not_depend_on_the_tiles(monkeypatch):
    arguments = make_inputs("hifill", (8, 12), batch=1)
    whole = gradients(arguments, "portable")
    for queries in (1, 6):
        monkeypatch.setattr(portable, "LARGEST_TILE", queries)
        for got, expected in zip(gradients(arguments, "portable"), whole, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


# Inside torch ---------------------------------------------------------------------------------------------------------


def op_arguments(backend: str, layout: str | None, preset: str = "nipponjo") -> tuple[Any, ...]:
    """Arguments of the torch op itself."""
    maps = [0.4 * torch.randn(2, 3, *size) for size in ((4, 6), (5, 4), (10, 8))]
    if layout is not None:
        maps = [LAYOUTS[layout](x) for x in maps]
    query, key, value = (x.requires_grad_() for x in maps)
    s = PRESETS[preset]
    valid = torch.rand(1, 5, 4) > 0.3
    selected = torch.rand(4, 6) > 0.3
    semantics = (s.patch, s.norm, s.eps, s.fuse, s.scale, s.masking, s.fill, s.floor)
    paste = (s.rate, s.paste_size, s.pad_cut, s.pad_put, s.divisor)
    return (
        query,
        key,
        value,
        valid,
        torch.rand(1, 5, 4),
        torch.rand(2, 5, 4),
        selected,
        *semantics,
        *paste,
        True,
        backend,
    )


@pytest.mark.parametrize("backend", WITH_REFERENCE)
@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_opcheck(backend, layout):
    torch.library.opcheck(torch.ops.inpaint_kernels.contextual_attention.default, op_arguments(backend, layout))


@on_every_backend
def test_opcheck_without_optional_arguments(backend):
    query, key, value, _, _, _, _, *rest = op_arguments(backend, None, "mmagic")
    arguments = (query, key, value, None, None, None, None, *rest)
    torch.library.opcheck(torch.ops.inpaint_kernels.contextual_attention.default, arguments)


@on_every_backend
def test_compiles_into_one_graph_for_all_sizes(backend):
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def call(f: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        return 2 * contextual_attention(f, b, mask, backend=backend)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=count)
    for size in ((12, 16), (20, 14), (16, 18)):
        arguments = make_inputs(f_size=size, b_size=(size[1], size[0]))
        inputs = (arguments["f"], arguments["b"], arguments["mask"])
        torch.testing.assert_close(compiled(*inputs), call(*inputs))
    assert len(graphs) == 1


@on_every_backend
def test_compiled_gradient(backend):
    def call(f: Tensor) -> Tensor:
        return contextual_attention(f, f, preset="mmagic", backend=backend).square().sum()

    f = torch.randn(1, 3, 12, 10, requires_grad=True)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    (got,), (expected,) = (torch.autograd.grad(function(f), f) for function in (compiled, call))
    torch.testing.assert_close(got, expected)


@pytest.mark.slow
def test_inductor():
    def call(f: Tensor, mask: Tensor) -> Tensor:
        return contextual_attention(f.relu(), f.relu(), mask).square()

    f, mask = torch.randn(1, 3, 16, 12), torch.zeros(1, 1, 16, 12)
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(f, mask), call(f, mask))


@on_every_backend
def test_export_with_dynamic_sizes(backend):
    class Layer(torch.nn.Module):
        def forward(self, f: Tensor, mask: Tensor) -> Tensor:
            return contextual_attention(f, f, mask, backend=backend)

    height, width = 2 * torch.export.Dim("h", min=4, max=64), 2 * torch.export.Dim("w", min=4, max=64)
    sizes = {2: height, 3: width}
    example = (torch.randn(1, 3, 16, 12), torch.zeros(1, 1, 16, 12))
    program = torch.export.export(Layer(), example, dynamic_shapes=(sizes, sizes))
    assert "inpaint_kernels.contextual_attention" in str(program.graph)
    f, mask = torch.randn(1, 3, 20, 18), (torch.rand(1, 1, 20, 18) > 0.8).float()
    torch.testing.assert_close(program.module()(f, mask), Layer()(f, mask))


@on_every_backend
def test_autocast_computes_in_float32(backend):
    arguments = in_dtype(make_inputs(), torch.float32)
    expected = contextual_attention(**arguments, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contextual_attention(**arguments, backend=backend), expected)
        mixed = contextual_attention(**in_dtype(arguments, torch.bfloat16), backend=backend)
    assert mixed.dtype == torch.float32


@on_every_backend
def test_inference_mode(backend):
    arguments = make_inputs()
    expected = contextual_attention(**arguments, return_offsets=True, backend=backend)
    with torch.inference_mode():
        inside = make_inputs()
        result = contextual_attention(**arguments, return_offsets=True, backend=backend)
        contextual_attention(**inside, queries=(1, 1, 3, 3), backend=backend)
    assert all(torch.equal(*pair) for pair in zip(result, expected, strict=True))


@on_every_backend
def test_deterministic_mode(backend):
    arguments = make_inputs()
    expected = gradients(arguments, backend)
    torch.use_deterministic_algorithms(True)
    try:
        got = gradients(arguments, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
