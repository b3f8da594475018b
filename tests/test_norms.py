"""Instance norm in place: equal to torch's own and to float64, in every layout, at large means and on large maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inpaint_kernels.models._norms import InstanceNorm, instance_norm
from torch import Tensor

from benches.peer_models import relative_error

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def uneven(*shape: int) -> Tensor:
    """Maps whose halves have different means and deviations."""
    x = torch.randn(shape)
    x[:, :, : shape[2] // 2] *= 3
    return x + torch.arange(shape[3]) / shape[3]


def expected(x: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    doubles = [None if t is None else t.double() for t in (weight, bias)]
    y = F.instance_norm(x.double(), weight=doubles[0], bias=doubles[1])
    y = {"none": y, "relu": F.relu(y), "leaky_relu": F.leaky_relu(y, 0.2)}[activation]
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_every_combination_equals_float64(layout, activation, affine, with_residual):
    x = uneven(2, 12, 10, 14).contiguous(memory_format=layout)
    weight, bias = (torch.rand(12) + 0.5, torch.randn(12)) if affine else (None, None)
    residual = torch.randn_like(x) if with_residual else None
    reference = expected(x, weight, bias, activation, residual)
    recorded = instance_norm(x.clone(), weight, bias, activation=activation, residual=residual)
    with torch.no_grad():
        kept = x.clone(memory_format=torch.preserve_format)
        y = instance_norm(kept, weight, bias, activation=activation, residual=residual)
    assert relative_error(y, reference) < 3e-7
    assert relative_error(recorded, reference) < 3e-7
    assert y.is_contiguous(memory_format=layout)
    assert (y.data_ptr() == kept.data_ptr()) == (layout == torch.channels_last)


@pytest.mark.parametrize(("size", "mean"), [((512, 256), 0.0), ((64, 64), 300.0), ((2, 1), 0.0), ((1, 300), 1.0)])
@torch.no_grad()
def test_large_maps_and_means_lose_no_more_digits_than_torch(size, mean):
    x = (uneven(1, 4, *size) + mean).contiguous(memory_format=torch.channels_last)
    reference = F.instance_norm(x.double())
    error = relative_error(instance_norm(x.clone(memory_format=torch.preserve_format)), reference)
    assert error <= 3 * relative_error(F.instance_norm(x), reference) + 1e-7


@torch.no_grad()
def test_float64_and_short_dtypes():
    x = uneven(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    reference = F.instance_norm(x.double())
    assert relative_error(instance_norm(x.double()), reference) < 1e-14
    assert relative_error(instance_norm(x.bfloat16()), reference) < 1e-2


@torch.no_grad()
def test_a_single_pixel_is_refused_as_by_torch():
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        instance_norm(torch.zeros(1, 4, 1, 1))


def test_module_has_torchs_keys():
    assert InstanceNorm(3).state_dict().keys() == torch.nn.InstanceNorm2d(3, affine=True).state_dict().keys()
    assert not InstanceNorm(3, affine=False).state_dict()


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_norms_are_rounded_once(dtype, recorded):
    """Sums in a short dtype would lose all digits of maps whose mean is 300 times their deviation."""
    x, weight, bias = (300 + torch.randn(2, 4, 64, 64)).to(dtype), torch.rand(4), torch.rand(4)
    exact = F.instance_norm(x.double(), weight=weight.double(), bias=bias.double())
    with torch.set_grad_enabled(recorded), torch.autocast("cpu", dtype):
        found = instance_norm(x.contiguous(memory_format=torch.channels_last), weight, bias)
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= 0.55 * torch.finfo(dtype).eps * exact.abs().max()
