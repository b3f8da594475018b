"""Every backend against the unmodified published layer: flags, outputs and gradients.

Optional: needs a folder with its checkout (``INPAINT_PEERS=DIR``, or ``--peers DIR`` where benches/ is collected too);
see benches/peers.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benches.peers import CSA_REPOSITORY, PublishedCSA, csa_checkout
from inpaint_kernels import coherent_semantic_attention
from inpaint_kernels.nn import CSA
from tests.coherent_maps import KINDS, features, hole
from tests.test_coherent_semantic_attention import WITH_REFERENCE

SIZES = [(24, 5, 5), (16, 12, 12), (256, 16, 16), (32, 10, 14), (512, 12, 20)]


@pytest.fixture(scope="module")
def layer(request: pytest.FixtureRequest) -> PublishedCSA:
    folder = request.config.getoption("--peers", None) or os.environ.get("INPAINT_PEERS")
    if not folder:
        pytest.skip("no checkouts of public ports (INPAINT_PEERS=DIR)")
    if csa_checkout(Path(folder)) is None:
        pytest.skip(f"no checkout of {CSA_REPOSITORY} in {folder}")
    return PublishedCSA(Path(folder))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["centre", "one", "scattered", "all_but_four", "corner"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_published_layer_in_float64(layer, kind, where, size):
    height, width = size[1:]
    # Positive: with few channels a ReLU leaves parallel and zero vectors; there known ones are not themselves.
    x = 0.1 + features(kind, 1, *size).abs()
    flags = hole(where, height, width)
    layer.set_flags(flags)
    g = torch.randn(1, *size, dtype=torch.float64)
    # The published gradient truncates attention weights; one that is 1 to rounding may be 1 here and 0 there.
    masked = flags.flatten().nonzero()[1:, 0]
    rows = coherent_semantic_attention(x, flags, return_attention=True, backend="reference").rows(0, masked)
    decided = (rows - rows.round()).abs().where(rows.round() != 0, 1).flatten().amin() > 1e-9 if rows.numel() else True
    with_gradient = height == width and decided
    expected, gradient = layer.forward_backward(x, g) if with_gradient else (layer.forward(x), None)
    for backend in WITH_REFERENCE:
        leaf = x.clone().requires_grad_()
        y = coherent_semantic_attention(leaf, flags, backend=backend)
        torch.testing.assert_close(y.detach(), expected, rtol=0, atol=1e-13 * x.max().item())
        if gradient is not None:
            torch.testing.assert_close(torch.autograd.grad(y, leaf, g)[0], gradient, rtol=0, atol=1e-12)
    if where == "one" or (where == "centre" and kind == "relu"):
        assert decided  # so that the gradients of some maps are compared


def test_float32_of_the_networks_size(layer):
    x, flags = features("relu", 1, 512, 32, 32, dtype=torch.float32), hole("centre", 32, 32)
    layer.set_flags(flags)
    published = layer.forward(x)
    for backend in WITH_REFERENCE:
        assert (coherent_semantic_attention(x, flags, backend=backend) - published).abs().max() <= 5e-6


@pytest.mark.parametrize("size", [(256, 256), (64, 120), (203, 77)], ids=str)
@pytest.mark.parametrize(("layers", "threshold"), [(3, 5 / 16), (1, 0.5), (2, 0.3), (4, 0.1)])
def test_flags_equal_the_published_ones(layer, size, layers, threshold):
    noise = F.avg_pool2d(torch.randn(1, 1, size[0] + 16, size[1] + 16), 17, 1)
    mask = (noise > noise.quantile(0.6)).float()
    expected = layer.set_mask(mask, layers, threshold).bool()
    assert torch.equal(CSA().set_mask(mask, layers, threshold)[0], expected)
    assert expected.any()
