"""Argument checks: errors name the argument, what was expected and what came.

Wrong types and dtypes are a TypeError, wrong shapes and values a ValueError. All checks are plain Python on shapes and
metadata; none reads a tensor's values, so they cost no synchronisation and torch.compile traces through them.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import NoReturn

import torch

from inpaint_kernels._compile import constant_for_compile


def check_tensor(name: str, x: object) -> None:
    """Raises TypeError unless `x` is a torch.Tensor."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")


def check_shape(name: str, x: torch.Tensor, shape: str, **known: int) -> dict[str, int]:
    """Matches a tensor's shape against a symbolic one and returns the sizes by symbol.

    Args:
        name: Name of the argument, for the message.
        x: The tensor to check; anything else is a TypeError.
        shape: Dimensions separated by blanks: a symbol (`H`), which must have one size wherever it stands; a number
            (`3`); or `B|1`, which a size of 1 satisfies too.
        **known: Sizes of symbols that are already known from other arguments.

    Returns:
        Size of every symbol of `shape`, with those of `known`.

    Raises:
        TypeError: `x` is not a tensor.
        ValueError: The number of dimensions or a size differs.

    Example:
        >>> check_shape("mask", torch.zeros(2, 1, 64, 64), "B|1 1 H W", B=2)
        {'B': 2, 'H': 64, 'W': 64}
    """
    check_tensor(name, x)
    dims = _parse_shape(shape)
    if x.dim() != len(dims):
        _raise_shape(name, x, shape, known)
    sizes = dict(known)
    for (symbol, number, or_one), size in zip(dims, x.shape):  # noqa: B905 (equal lengths; strict costs 10 %)
        expected = number if number is not None else sizes.setdefault(symbol, size)
        if size != expected and not (or_one and size == 1):
            _raise_shape(name, x, shape, known)
    return sizes


# A constant for torch.compile, which would trace into the parser and warn about the cache otherwise.
@constant_for_compile
def _parse_shape(shape: str) -> tuple[tuple[str, int | None, bool], ...]:
    return _parse_shape_once(shape)


@functools.cache
def _parse_shape_once(shape: str) -> tuple[tuple[str, int | None, bool], ...]:
    """For each dimension: its symbol, its value if that is a number, and whether it may be 1 instead."""
    symbols = [(dim.removesuffix("|1"), dim.endswith("|1")) for dim in shape.split()]
    return tuple((symbol, int(symbol) if symbol.isdigit() else None, or_one) for symbol, or_one in symbols)


def _raise_shape(name: str, x: torch.Tensor, shape: str, known: dict[str, int]) -> NoReturn:
    symbols = [symbol for symbol, _, _ in _parse_shape(shape)]
    given = ", ".join(f"{symbol}={known[symbol]}" for symbol in dict.fromkeys(symbols) if symbol in known)
    condition = f" with {given}" if given else ""
    raise ValueError(f"{name}: expected shape [{', '.join(shape.split())}]{condition}, got {list(x.shape)}")


def check_floating(name: str, x: torch.Tensor) -> None:
    """Raises TypeError unless `x` is a tensor of a real floating-point dtype."""
    check_tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")


def check_dtype(name: str, x: torch.Tensor, dtypes: Collection[torch.dtype]) -> None:
    """Raises TypeError unless `x` is a tensor of one of `dtypes`."""
    check_tensor(name, x)
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(str(dtype) for dtype in dtypes)}, got {x.dtype}")


def check_same_dtype(**tensors: torch.Tensor | None) -> None:
    """Raises TypeError unless all tensors have one dtype; None stands for an absent argument."""
    present = {name: x for name, x in tensors.items() if x is not None}
    if len({x.dtype for x in present.values()}) > 1:
        got = ", ".join(f"{name} {x.dtype}" for name, x in present.items())
        raise TypeError(f"{', '.join(present)}: expected one dtype, got {got}")


def check_same_device(**tensors: torch.Tensor | None) -> None:
    """Raises ValueError unless all tensors are on one device; None stands for an absent argument."""
    present = {name: x for name, x in tensors.items() if x is not None}
    if len({x.device for x in present.values()}) > 1:
        got = ", ".join(f"{name} on {x.device}" for name, x in present.items())
        raise ValueError(f"{', '.join(present)}: expected one device, got {got}")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(repr(choice) for choice in choices)}, got {value!r}")


def check_range(
    name: str,
    value: float,
    minimum: float | None = None,
    maximum: float | None = None,
    *,
    integer: bool = False,
) -> None:
    """Raises unless `value` is a number in [minimum, maximum]; NaN is in no range.

    Args:
        name: Name of the argument, for the message.
        value: The number to check; a bool is not one.
        minimum: Smallest allowed value, or None.
        maximum: Largest allowed value, or None.
        integer: Whether the value must be an int.

    Raises:
        TypeError: `value` is not a number, or not an int although `integer` is set.
        ValueError: `value` is out of range.
    """
    kinds = (int, torch.SymInt) if integer else (int, float, torch.SymInt, torch.SymFloat)
    if isinstance(value, bool) or not isinstance(value, kinds):
        expected = "an integer" if integer else "a number"
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if (minimum is None or value >= minimum) and (maximum is None or value <= maximum) and value == value:
        return
    bounds = [f">= {minimum}"] * (minimum is not None) + [f"<= {maximum}"] * (maximum is not None)
    raise ValueError(f"{name}: expected a number {' and '.join(bounds) or 'that is not NaN'}, got {value}")


def check_pair(name: str, value: int | tuple[int, int], minimum: int) -> tuple[int, int]:
    """(rows, columns) of an integer or of a pair of them, each at least `minimum`."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int and min(value) >= minimum:
        return value  # the usual case in one line: half a microsecond instead of two
    if not isinstance(value, (tuple, list)):
        check_range(name, value, minimum=minimum, integer=True)
        return (value, value)
    if len(value) != 2:
        raise ValueError(f"{name}: expected an integer or a pair (rows, columns), got {value}")
    for part in value:
        check_range(name, part, minimum=minimum, integer=True)
    return (value[0], value[1])
