"""coherent_semantic_attention: the three gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inpaint_kernels import coherent_semantic_attention
from tests.coherent_maps import HOLES, KINDS, features, hole
from tests.compare import assert_close_to_reference
from tests.test_coherent_semantic_attention import BACKENDS, VARIANTS, WITH_REFERENCE, needs_cpu_kernels, run

GRADIENTS = ("official", "straight", "exact")
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def gradient_of(x: Tensor, flags: Tensor, g: Tensor, **options) -> Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(coherent_semantic_attention(leaf, flags, **options), leaf, g)[0]


def official_gradient(g: Tensor, x: Tensor, flags: Tensor, weights: tuple[Tensor, ...], backend: str) -> Tensor:
    """The op's backward for index, alpha, beta and total as given."""
    op = torch.ops.inpaint_kernels.coherent_semantic_attention_backward
    return op(g, x, flags, torch.zeros_like(x), *weights, "official", "official", 1.0, backend)


@pytest.mark.parametrize("backend", WITH_REFERENCE)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("where", ["centre", "one", "all_but_four"])
def test_gradcheck_of_exact(backend, variant, where):
    x, flags = 0.3 + features("relu", 1, 4, 4, 4), hole(where, 4, 4)
    torch.autograd.gradcheck(
        lambda x: coherent_semantic_attention(x, flags, variant=variant, gradient="exact", backend=backend),
        x.requires_grad_(),
    )


@on_every_backend
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(backend, variant, gradient, dtype, kind, poisoned_memory):
    shape = (3, 37, 11, 14)
    x = features(kind, *shape, dtype=dtype)
    flags = torch.stack([hole(where, *shape[2:]) for where in ("centre", "scattered", "corner")])
    g = torch.randn(shape).to(dtype)
    options = {"variant": variant, "gradient": gradient, "triple_weight": 0.7}
    expected_forward, forward = (run(y, flags, b, variant) for y, b in ((x.double(), "reference"), (x, backend)))
    if not torch.equal(forward.index, expected_forward.index):
        pytest.skip("rounding made two keys equally good, and another one has another gradient")
    expected = gradient_of(x.double(), flags, g.double(), backend="reference", **options)
    eager = gradient_of(x, flags, g, backend="reference", **options)
    got = gradient_of(x, flags, g, backend=backend, **options)
    assert got.dtype == dtype
    assert_close_to_reference(got, expected, eager, kind="gradient")


@pytest.mark.parametrize("backend", WITH_REFERENCE)
@pytest.mark.parametrize("gradient", ["official", "straight"])
@pytest.mark.parametrize("where", HOLES)
@pytest.mark.parametrize("triple_weight", [1.0, 0.0, -2.5])
def test_closed_form(backend, gradient, where, triple_weight):
    """g + w A^T g with the attention rows expanded one by one, truncated or not."""
    x, flags, g = features("relu", 1, 20, 9, 12), hole(where, 9, 12), torch.randn(1, 20, 9, 12, dtype=torch.float64)
    rows = run(x, flags, "reference").rows(0, torch.arange(108))
    if gradient == "official":
        rows = (rows + 1e-12).trunc()  # a weight of 1 may come out as 1 - 1e-16 of another order of products
    expected = g[0].flatten(1) + triple_weight * g[0].flatten(1) @ rows
    got = gradient_of(x, flags, g, gradient=gradient, triple_weight=triple_weight, backend=backend)
    torch.testing.assert_close(got[0].flatten(1), expected, rtol=1e-12, atol=1e-12)
    if gradient == "official" and where == "centre":  # what published code trains with: 2 g, g, and the first row's
        assert (rows[flags.flatten()] != 0).sum() == 1


def wild_weights(flags: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Index, alpha, beta and total of rows whose weights leave [0, 1], run on one index, restart, and die out."""
    masked, known = flags.flatten().nonzero()[:, 0], (~flags).flatten().nonzero()[:, 0]
    count = masked.numel()
    alpha = torch.rand(count, dtype=torch.float64) * 1.2 - 0.1
    alpha[count // 3 : count // 2] = torch.randn(count // 2 - count // 3).double() * 2
    alpha[count // 2 : 2 * count // 3] = 0.5
    chosen = known[torch.randint(known.numel(), (count,))]
    chosen[count // 2 : 2 * count // 3] = known[3]  # 1 - 0.5^n rounds to 1
    alpha[[0, count // 4]] = 0
    alpha, total = alpha.to(dtype), torch.ones(count, dtype=dtype)
    beta = 1 - alpha
    total[[0, count // 4]] = torch.inf

    def spread(values: Tensor, other: float) -> Tensor:
        out = torch.full(flags.shape, other, dtype=values.dtype).flatten()
        out[masked] = values
        return out.view(1, *flags.shape)

    return spread(chosen, -1), spread(alpha, 0), spread(beta, 0), spread(total, 0)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_truncation_follows_every_rounding(backend, dtype):
    """A weight that rounds to 1 counts fully and one just below not at all: the recurrence has to be bit-equal."""
    flags = hole("scattered", 24, 40)
    weights = wild_weights(flags, dtype)
    x, g = torch.zeros(1, 3, 24, 40, dtype=dtype), torch.randint(-8, 9, (1, 3, 24, 40)).to(dtype)
    expected = official_gradient(g, x, flags[None], weights, "reference")
    known = ~flags
    assert ((expected - 2 * g)[0, 0][known] != 0).sum() > 20
    got = official_gradient(g, x, flags[None], weights, backend)
    torch.testing.assert_close(got, expected, rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=1e-6)


@on_every_backend
def test_a_long_run_of_one_index_becomes_whole(backend):
    """1 - 0.5^n is 1 in float32 from n = 25 on, and then counts; the row after it does too."""
    flags = torch.zeros(1, 40, dtype=torch.bool)
    flags[0, 4:] = True
    index = torch.full((1, 1, 40), -1)
    index[0, 0, 4:] = 2
    alpha = torch.where(flags, 0.5, 0.0)[None]
    alpha[0, 0, 4] = 0
    beta, total = torch.where(flags, 1 - alpha, 0.0), torch.where(flags, 1.0, 0.0)[None]
    index[0, 0, 5] = 0  # the first row is whole, the second is not
    x, g = torch.zeros(1, 1, 1, 40), torch.ones(1, 1, 1, 40)
    got = official_gradient(g, x, flags[None], (index, alpha, beta, total), backend)[0, 0, 0]
    expected = official_gradient(g, x, flags[None], (index, alpha, beta, total), "reference")[0, 0, 0]
    assert torch.equal(got, expected)
    assert got[0] == 2
    assert 2 < got[2] < 2 + 36  # the rows between do not count


@on_every_backend
@pytest.mark.parametrize("gradient", ["straight", "exact"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_restarts_and_zero_vectors_have_finite_gradients(backend, gradient, variant):
    x, flags = features("relu", 1, 12, 8, 9), hole("centre", 8, 9)
    masked = flags.flatten().nonzero()[:, 0]
    x.view(12, -1)[:, masked[3]] = x.view(12, -1)[:, masked[0]] = 0
    x[..., 0, 0] = 0  # the key of both of them
    g = torch.randn_like(x)
    options = {"variant": variant, "gradient": gradient}
    expected = gradient_of(x, flags, g, backend="reference", **options)
    assert expected.isfinite().all()
    torch.testing.assert_close(gradient_of(x, flags, g, backend=backend, **options), expected, rtol=1e-11, atol=1e-12)


@on_every_backend
@pytest.mark.parametrize("gradient", ["straight", "exact"])
def test_long_memory(backend, gradient):
    """The gradient of the last row reaches the first ones."""
    x, flags = 1 + 0.2 * features("relu", 1, 16, 20, 20), torch.zeros(20, 20, dtype=torch.bool)
    flags[2:] = True
    x = x * torch.where(flags, 0.02, 1)
    g = torch.zeros_like(x)
    g[..., -1, -1] = 1
    expected = gradient_of(x, flags, g, gradient=gradient, backend="reference")
    got = gradient_of(x, flags, g, gradient=gradient, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13 * expected.abs().max().item())


@needs_cpu_kernels
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_same_bits_for_any_number_of_threads(gradient):
    x, flags = features("relu", 2, 130, 20, 23, dtype=torch.float32), hole("scattered", 20, 23)
    g = torch.randn_like(x)
    expected = gradient_of(x, flags, g, gradient=gradient, backend="cpu")
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(gradient_of(x, flags, g, gradient=gradient, backend="cpu"), expected)


@on_every_backend
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_layouts_of_the_input_and_of_the_gradient(backend, gradient):
    x, flags = features("relu", 2, 21, 9, 16, dtype=torch.float32), hole("centre", 9, 16)
    g = torch.randn_like(x)
    expected = gradient_of(x, flags, g, gradient=gradient, backend=backend)
    moved = [
        x.contiguous(memory_format=torch.channels_last),
        x.repeat_interleave(2, 3)[..., ::2],
        x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
    ]
    for one in moved:
        got = gradient_of(one, flags, g, gradient=gradient, backend=backend)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    one = torch.ones(1).expand_as(g)  # what .sum() sends back: no element of its own
    assert gradient_of(x, flags, one, gradient=gradient, backend=backend).isfinite().all()
    last = g.contiguous(memory_format=torch.channels_last)
    got = gradient_of(moved[0], flags, last, gradient=gradient, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@on_every_backend
def test_known_and_masked_positions_of_the_published_gradient(backend):
    """2 g at known positions, g at masked ones; only the first row's key gets more."""
    x, flags = features("smooth", 1, 30, 10, 10, dtype=torch.float32), hole("centre", 10, 10)
    g = torch.randn_like(x)
    got = gradient_of(x, flags, g, backend=backend)
    first = int(run(x, flags, backend).index[0][flags][0])
    expected = g * torch.where(flags, 1, 2)
    expected.view(30, -1)[:, first] += g[0].flatten(1)[:, int(flags.flatten().nonzero()[0])]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", WITH_REFERENCE)
def test_there_is_no_second_gradient(backend):
    x, flags = features("relu", 1, 4, 5, 6).requires_grad_(), hole("centre", 5, 6)
    y = coherent_semantic_attention(x, flags, gradient="exact", backend=backend)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="coherent_semantic_attention: double backward is not implemented"):
        gradient.sum().backward()


@on_every_backend
def test_trains_under_autocast(backend):
    x, flags = features("relu", 1, 8, 8, 8, dtype=torch.bfloat16).requires_grad_(), hole("centre", 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = coherent_semantic_attention(x, flags, gradient="exact", backend=backend)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    expected = gradient_of(x.detach().float(), flags, torch.ones(y.shape), gradient="exact", backend=backend)
    torch.testing.assert_close(x.grad, expected.bfloat16())
