"""hog's gradient: numerical differences, and autograd through the reference's own operations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from inpaint_kernels import explain
from inpaint_kernels import hog as public_hog
from inpaint_kernels.reference import hog as reference
from tests.compare import assert_close_to_reference

BACKENDS = explain("hog", torch.zeros(24, 24)).usable
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
hog: Any = public_hog  # what it returns depends on its arguments
NORMS = ("L1", "L1-sqrt", "L2", "L2-Hys")


def total(outputs: tuple[Tensor, Tensor | None], weights: list[Tensor]) -> Tensor:
    """A scalar that depends on all outputs."""
    terms = [(x.double() * w).sum() for x, w in zip(outputs, weights, strict=False) if x is not None]
    return torch.stack(terms).sum()


@on_every_backend
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("visualize", [False, True])
def test_numerical_gradients(backend, norm, visualize):
    """Random images of float64: no angle is within the step of a border, no two channels are equally long."""
    for channels, cell, block, transform_sqrt in [(1, (4, 4), (2, 2), False), (2, (3, 5), (1, 2), True)]:
        images = torch.rand(1, channels, 10, 11, dtype=torch.float64).add_(0.1).requires_grad_()

        def call(images: Tensor, cell=cell, block=block, transform_sqrt=transform_sqrt):
            return hog(images, 5, cell, block, norm, visualize, transform_sqrt, backend=backend)

        assert torch.autograd.gradcheck(call, images, eps=1e-7, atol=1e-5, fast_mode=True)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cells", [False, True])
def test_equals_autograd_through_the_reference(backend, dtype, cells):
    for norm, transform_sqrt, visualize in itertools.product(NORMS, [False, True], [False, True]):
        images = torch.rand(2, 3, 41, 50, dtype=torch.float64).add_(0.05).to(dtype)
        target = "cells" if cells else "blocks"
        ours = images.clone().requires_grad_()
        got = hog(ours, 9, (8, 7), (2, 3), norm, visualize, transform_sqrt, False, target, backend=backend)
        outputs = got if visualize else (got, None)
        weights = [torch.randn(x.shape, dtype=torch.float64) for x in outputs if x is not None]
        total(outputs, weights).backward()
        # The reference rounds as the dtype does, to take the same bins; from the differences on it is float64.
        theirs = images.clone().requires_grad_()
        total(reference.hog(theirs, 9, (8, 7), (2, 3), norm, transform_sqrt, cells, visualize), weights).backward()
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.dtype == dtype
        # Autograd rounds each of a short dtype's sums; one rounding of ours is enough.
        eager = None if dtype in (torch.float32, torch.float64) else theirs.grad
        assert_close_to_reference(ours.grad, theirs.grad.double(), eager=eager, kind="gradient")


@on_every_backend
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("transform_sqrt", [False, True])
def test_no_nan_where_there_is_no_gradient(backend, norm, transform_sqrt):
    images = torch.zeros(1, 3, 32, 40)
    images[:, :, 10:14, 11:30] = 0.5
    images.requires_grad_()
    features, image = hog(images, block_norm=norm, visualize=True, transform_sqrt=transform_sqrt, backend=backend)
    (features.sum() + image.sum()).backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert (images.grad != 0).any()


@on_every_backend
def test_only_one_of_the_outputs_is_used(backend):
    images = torch.rand(1, 3, 32, 40, dtype=torch.float64, requires_grad=True)
    features, image = hog(images, visualize=True, backend=backend)
    of_features, of_image = (torch.autograd.grad(x.sum(), images, retain_graph=True)[0] for x in (features, image))
    both = torch.autograd.grad(features.sum() + image.sum(), images)[0]
    torch.testing.assert_close(of_features + of_image, both)
    (alone,) = torch.autograd.grad(hog(images, backend=backend).sum(), images)
    torch.testing.assert_close(alone, of_features)


@on_every_backend
def test_gradients_of_other_layouts(backend):
    images = torch.rand(2, 3, 32, 41)
    weights = torch.randn(2, 972 // 3)
    grads = []
    for moved in (images, images.contiguous(memory_format=torch.channels_last), images.transpose(2, 3).contiguous()):
        leaf = moved.clone(memory_format=torch.preserve_format).requires_grad_()
        view = leaf.transpose(2, 3) if leaf.shape[2] == 41 else leaf
        (hog(view, backend=backend)[:, : weights.shape[1]] * weights).sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad if leaf.shape[2] == 32 else leaf.grad.transpose(2, 3))
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@on_every_backend
def test_a_loss_of_features_goes_down(backend):
    """What the gradient is for: an image is changed until its features are those of another one."""
    generator = torch.Generator().manual_seed(0)
    wanted = hog(torch.rand(1, 1, 32, 32, generator=generator), backend=backend)
    image = torch.rand(1, 1, 32, 32, generator=generator).requires_grad_()
    optimiser = torch.optim.Adam([image], 0.01)
    losses = []
    for _ in range(40):
        loss = (hog(image, backend=backend) - wanted).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@on_every_backend
def test_double_backward_is_an_error(backend):
    images = torch.rand(1, 1, 24, 24, requires_grad=True)
    (grad,) = torch.autograd.grad(hog(images, backend=backend).square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="hog: double backward is not implemented"):
        grad.sum().backward()


def test_images_without_gradient_get_none():
    assert not hog(torch.rand(1, 1, 24, 24)).requires_grad
    with torch.no_grad():
        assert not hog(torch.rand(1, 1, 24, 24, requires_grad=True)).requires_grad
