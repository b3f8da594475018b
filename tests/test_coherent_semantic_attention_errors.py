"""coherent_semantic_attention: what it says about arguments that it cannot take."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
import torch

from inpaint_kernels import coherent_semantic_attention
from inpaint_kernels.nn import CSA

X = torch.zeros(2, 3, 8, 12)
FLAGS = torch.eye(8, 12)[None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, "x: expected shape [B, C, H, W], got [3, 8, 12]"),
        ({"mask_flags": FLAGS[0, :4]}, "mask_flags: expected shape [H, W] with H=8, W=12, got [4, 12]"),
        (
            {"mask_flags": FLAGS.expand(3, 8, 12)},
            "mask_flags: expected shape [B|1, H, W] with B=2, H=8, W=12, got [3, 8, 12]",
        ),
        (
            {"mask_flags": FLAGS.expand(2, 3, 8, 12)},
            "mask_flags: expected shape [B|1, 1, H, W] with B=2, H=8, W=12, got [2, 3, 8, 12]",
        ),
        ({"mask_flags": FLAGS[0, 0]}, "mask_flags: expected shape [B|1, 1, H, W] with B=2, H=8, W=12, got [12]"),
        ({"mask_flags": FLAGS.to("meta")}, "mask_flags: expected the CPU or the device of x, cpu, got meta"),
        (
            {"mask_flags": torch.ones(8, 12)},
            "mask_flags: expected a known position in every sample, got none in sample 0",
        ),
        (
            {"mask_flags": torch.stack([FLAGS[0], torch.ones(8, 12)])},
            "mask_flags: expected a known position in every sample, got none in sample 1",
        ),
        ({"variant": "published"}, "variant: expected one of 'official', 'paper', got 'published'"),
        ({"gradient": "true"}, "gradient: expected one of 'official', 'straight', 'exact', got 'true'"),
        ({"triple_weight": float("nan")}, "triple_weight: expected a number that is not NaN, got nan"),
        ({"backend": "fastest"}, "backend: expected one of "),
    ],
    ids=lambda x: x.split(", got")[0] if isinstance(x, str) else "",
)
@pytest.mark.parametrize("return_attention", [False, True])
def test_wrong_values(arguments, message, return_attention):
    with pytest.raises(ValueError, match=re.escape(message)):
        coherent_semantic_attention(**{"x": X, "mask_flags": FLAGS, "return_attention": return_attention, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": "photo.png"}, "x: expected a torch.Tensor, got str"),
        ({"x": X.int()}, "x: expected a floating-point tensor, got torch.int32"),
        ({"mask_flags": (1, 2)}, "mask_flags: expected a torch.Tensor, got tuple"),
        ({"triple_weight": "1"}, "triple_weight: expected a number, got str"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_types(arguments, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        coherent_semantic_attention(**{"x": X, "mask_flags": FLAGS, **arguments})


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_backend_that_cannot_run(backend):
    message = f"coherent_semantic_attention: backend {backend!r} was requested and cannot run"
    with pytest.raises(RuntimeError, match=message):
        coherent_semantic_attention(X, FLAGS, backend=backend)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"mask": torch.zeros(3, 64, 64)},
            ValueError,
            "mask: expected shape [H, W] or [B|1, 1, H, W], got [3, 64, 64]",
        ),
        ({"mask": torch.zeros(1, 3, 64, 64)}, ValueError, "mask: expected shape [H, W] or [B|1, 1, H, W], got [1, 3,"),
        ({"mask": torch.zeros(7, 64)}, ValueError, "mask: expected H and W of at least 2^layers = 8, got [7, 64]"),
        ({"mask": None}, TypeError, "mask: expected a torch.Tensor, got NoneType"),
        ({"layers": 0}, ValueError, "layers: expected a number >= 1 and <= 6, got 0"),
        ({"layers": 1.5}, TypeError, "layers: expected an integer, got float"),
        ({"threshold": 1.0}, ValueError, "threshold: expected a number >= 0 and < 1, got 1.0"),
        ({"threshold": float("nan")}, ValueError, "threshold: expected a number >= 0 and < 1, got nan"),
        ({"threshold": Fraction(-1, 3)}, ValueError, "threshold: expected a number >= 0 and < 1, got -1/3"),
    ],
    ids=lambda x: x.split(", got")[0] if isinstance(x, str) else "",
)
def test_wrong_masks(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        CSA().set_mask(**{"mask": torch.zeros(64, 64), **arguments})


def test_a_module_checks_its_options():
    with pytest.raises(ValueError, match="variant: expected one of"):
        CSA(variant="published")
    with pytest.raises(ValueError, match="gradient: expected one of"):
        CSA(gradient="none")


def test_a_mask_of_another_size_is_named():
    csa = CSA(torch.ones(70, 70).tril())
    with pytest.raises(ValueError, match=re.escape("mask_flags: expected shape [B|1, H, W] with B=2, H=9, W=9")):
        csa(torch.zeros(2, 3, 9, 9))  # ceil(70 / 8); the flags have floor(70 / 8)
