"""Every check: what it accepts, and the words of its errors."""

import warnings

import pytest
import torch

from inpaint_kernels._checks import (
    check_choice,
    check_dtype,
    check_floating,
    check_range,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
)


def test_tensor():
    check_tensor("f", torch.zeros(1))
    with pytest.raises(TypeError, match=r"^f: expected a torch.Tensor, got list$"):
        check_tensor("f", [1.0])


def test_shape_returns_the_sizes_by_symbol():
    assert check_shape("f", torch.zeros(2, 3, 4, 5), "B C H W") == {"B": 2, "C": 3, "H": 4, "W": 5}
    assert check_shape("mask", torch.zeros(2, 1, 4, 5), "B 1 H W", B=2) == {"B": 2, "H": 4, "W": 5}
    assert check_shape("valid", torch.zeros(1, 4, 4), "B|1 N N", B=7, Q=3) == {"B": 7, "N": 4, "Q": 3}
    assert check_shape("x", torch.zeros(0, 3), "B 3") == {"B": 0}


@pytest.mark.parametrize(
    ("size", "shape", "known", "message"),
    [
        (
            (2, 3, 64, 64),
            "B 1 H W",
            {"B": 2, "H": 64, "W": 64},
            "mask: expected shape [B, 1, H, W] with B=2, H=64, W=64, got [2, 3, 64, 64]",
        ),
        ((2, 3), "B C H W", {}, "mask: expected shape [B, C, H, W], got [2, 3]"),
        ((3, 4), "N N", {}, "mask: expected shape [N, N], got [3, 4]"),
        ((3, 4), "B|1 W", {"B": 2, "C": 9}, "mask: expected shape [B|1, W] with B=2, got [3, 4]"),
        ((4,), "3", {}, "mask: expected shape [3], got [4]"),
    ],
)
def test_shape_errors_name_expected_and_got(size, shape, known, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole text is compared)
        check_shape("mask", torch.zeros(size), shape, **known)
    assert str(error.value) == message


def test_shape_rejects_what_is_no_tensor():
    with pytest.raises(TypeError, match=r"f: expected a torch.Tensor, got NoneType"):
        check_shape("f", None, "B C")  # type: ignore[arg-type]


def test_dtypes():
    check_floating("f", torch.zeros(1, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"^f: expected a floating-point tensor, got torch.int64$"):
        check_floating("f", torch.zeros(1, dtype=torch.int64))
    check_dtype("mask", torch.zeros(1, dtype=torch.bool), (torch.bool, torch.uint8))
    with pytest.raises(TypeError, match=r"^mask: expected torch.bool or torch.uint8, got torch.float32$"):
        check_dtype("mask", torch.zeros(1), (torch.bool, torch.uint8))


def test_tensors_agree():
    a, b = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    check_same_dtype(f=a, b=a, mask=None)
    with pytest.raises(TypeError, match=r"^f, b: expected one dtype, got f torch.float32, b torch.float64$"):
        check_same_dtype(f=a, b=b)
    check_same_device(f=a, b=b, mask=None)
    with pytest.raises(ValueError, match=r"^f, b: expected one device, got f on cpu, b on meta$"):
        check_same_device(f=a, b=b.to("meta"))


def test_choice():
    check_choice("norm", "max", ("max", "sum"))
    with pytest.raises(ValueError, match=r"^norm: expected one of 'max', 'sum', got 'mean'$"):
        check_choice("norm", "mean", ("max", "sum"))


def test_range():
    check_range("patch", 3, 1, integer=True)
    check_range("eps", 0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"^patch: expected a number >= 1, got 0$"):
        check_range("patch", 0, 1, integer=True)
    with pytest.raises(ValueError, match=r"^eps: expected a number >= 0 and <= 1, got 2.0$"):
        check_range("eps", 2.0, 0, 1)
    with pytest.raises(ValueError, match=r"^eps: expected a number that is not NaN, got nan$"):
        check_range("eps", float("nan"))
    with pytest.raises(TypeError, match=r"^patch: expected an integer, got float$"):
        check_range("patch", 3.0, 1, integer=True)
    with pytest.raises(TypeError, match=r"^patch: expected an integer, got bool$"):
        check_range("patch", True, 1, integer=True)
    with pytest.raises(TypeError, match=r"^eps: expected a number, got str$"):
        check_range("eps", "1")  # type: ignore[arg-type]


@pytest.mark.parametrize("dynamic", [False, True])
def test_checks_leave_no_trace_in_a_compiled_graph(dynamic):
    def doubled(x):
        sizes = check_shape("x", x, "B|1 C 4")
        check_floating("x", x)
        check_same_device(x=x, y=x)
        check_same_dtype(x=x, y=x)
        check_choice("mode", "a", ("a", "b"))
        check_range("B", sizes["B"], 1, integer=True)
        return x * 2

    torch.compiler.reset()
    compiled = torch.compile(doubled, fullgraph=True, dynamic=dynamic, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (2, 3):
            x = torch.ones(size, 5, 4)
            assert torch.equal(compiled(x), 2 * x)
