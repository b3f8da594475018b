"""contextual_attention: what it says about arguments that it cannot take."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from inpaint_kernels import contextual_attention

X = torch.zeros(2, 3, 8, 12)
MASK = torch.zeros(2, 1, 8, 12)
PER_KEY = torch.zeros(2, 4, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"f": X[0]}, "f: expected shape [B, C, H, W], got [3, 8, 12]"),
        ({"b": X[:1]}, "b: expected shape [B, C, Hb, Wb] with B=2, C=3, got [1, 3, 8, 12]"),
        ({"b": X[:, :2]}, "b: expected shape [B, C, Hb, Wb] with B=2, C=3, got [2, 2, 8, 12]"),
        ({"value": X[0]}, "value: expected shape [B, Cv, Hv, Wv] with B=2, got [3, 8, 12]"),
        ({"f": X[:, :, :7]}, "f: expected H and W divisible by rate=2"),
        ({"b": X[:, :, :, :11]}, "b: expected H and W divisible by rate=2"),
        ({"b": X[:, :, :1], "odd_sizes": True}, "b: expected H and W of at least rate=2"),
        ({"mask": MASK[:, 0]}, "mask: expected shape [B|1, 1, Hm, Wm] with B=2, got [2, 8, 12]"),
        ({"mask": MASK[:, :, :6]}, "mask: expected the size of b, 8 x 12, or a whole multiple of it, got 6 x 12"),
        ({"mask": torch.zeros(3, 1, 8, 12)}, "mask: expected shape [B|1, 1, Hm, Wm] with B=2, got [3, 1, 8, 12]"),
        ({"queries": (0, 0, 5, 6)}, "queries: expected a box (y0, x0, y1, x1) inside 4 x 6, got (0, 0, 5, 6)"),
        ({"queries": (3, 0, 2, 6)}, "queries: expected a box (y0, x0, y1, x1) inside 4 x 6, got (3, 0, 2, 6)"),
        ({"queries": (0, 0, 4)}, "queries: expected a box (y0, x0, y1, x1) inside 4 x 6, got (0, 0, 4)"),
        ({"queries": torch.ones(8, 12) > 0}, "queries: expected shape [hq, wq] with hq=4, wq=6, got [8, 12]"),
        ({"key_scale": PER_KEY[:, :3]}, "key_scale: expected shape [B|1, hk, wk] with B=2, hk=4, wk=6, got [2, 3, 6]"),
        ({"key_bias": PER_KEY[0]}, "key_bias: expected shape [B|1, hk, wk] with B=2, hk=4, wk=6, got [4, 6]"),
        (
            {"key_bias": torch.zeros(1, 4, 6, requires_grad=True)},
            "key_bias: expected a tensor that requires no gradient (there is none; detach it)",
        ),
        ({"preset": "deepfill"}, "preset: expected one of 'official', "),
        ({"norm": "l1"}, "norm: expected one of 'max', 'sum', 'add', 'none', got 'l1'"),
        ({"masking": "zero"}, "masking: expected one of 'multiply', 'inf', 'fill', got 'zero'"),
        ({"grid": "nearest"}, "grid: expected one of "),
        ({"mask_batch": "last"}, "mask_batch: expected one of 'each', 'first', got 'last'"),
        ({"patch": 0}, "patch: expected a number >= 1, got 0"),
        ({"rate": 0}, "rate: expected a number >= 1, got 0"),
        ({"fuse": 4}, "fuse: expected an odd size, or 0 for none, got 4"),
        ({"fuse": -1}, "fuse: expected a number >= 0, got -1"),
        ({"eps": -1.0}, "eps: expected a number >= 0, got -1.0"),
        ({"divisor": -4.0}, "divisor: expected a number >= 0, got -4.0"),
        ({"pad_put": -1}, "pad_put: expected a number >= 0, got -1"),
        ({"paste_size": 1}, "paste_size: expected a number >= 2, got 1"),
        ({"backend": "fastest"}, "backend: expected one of "),
    ],
    ids=lambda x: x.split(", got")[0] if isinstance(x, str) else "",
)
def test_wrong_values(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        contextual_attention(**{"f": X, "b": X, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"f": "photo.png"}, "f: expected a torch.Tensor, got str"),
        ({"b": None}, "b: expected a torch.Tensor, got NoneType"),
        ({"f": X.int()}, "f: expected a floating-point tensor, got torch.int32"),
        ({"b": X.double()}, "f, b: expected one dtype, got f torch.float32, b torch.float64"),
        ({"value": X.half()}, "expected one dtype, got f torch.float32, value torch.float16"),
        ({"queries": torch.ones(4, 6)}, "queries: expected dtype torch.bool, got torch.float32"),
        ({"preset": 3}, "preset: expected a name or a ContextualAttentionPreset, got int"),
        ({"fuze": 3}, "contextual_attention: unexpected argument 'fuze', not a field of the preset"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_types(arguments, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        contextual_attention(**{"f": X, "b": X, **arguments})


def test_tensors_on_different_devices():
    meta = X.to("meta")
    for name, x in (("b", meta), ("value", meta), ("mask", MASK.to("meta")), ("key_bias", PER_KEY.to("meta"))):
        arguments: dict[str, Any] = {"f": X, "b": X, name: x}
        with pytest.raises(ValueError, match=rf"{name}.*: expected one device, got .*{name} on meta"):
            contextual_attention(**arguments)


def test_backend_that_cannot_run():
    with pytest.raises(RuntimeError, match="contextual_attention: backend 'triton' was requested and cannot run"):
        contextual_attention(X, X, backend="triton")
