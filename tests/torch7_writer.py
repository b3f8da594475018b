"""Writes files as Torch7's ``torch.save`` does on a 64-bit little-endian machine.

The format, as torch7's ``doc/serialization.md``, ``File.lua`` and ``generic/{Tensor,Storage}.c`` describe it::

    object   = int(0)                                                        nil
             | int(1) double                                                 number
             | int(2) string                                                 string
             | int(3) index [int(entries) (object object)*]                  table
             | int(4) index [string("V 1") string(class) content]            torch object
             | int(5) int(0 or 1)                                            boolean
             | int(6) string(code) object(upvalues)                          function of the oldest files
             | int(7 or 8) index [string(code) object(upvalues)]             function
    string   = int(bytes) bytes
    index    = int; what stands in brackets is written the first time that the object is met, and only then
    content  = long(elements) elements                                       of torch.*Storage
             | int(n) long(size)*n long(stride)*n long(offset + 1) object    of torch.*Tensor; the object is its storage
             | object(fields)                                                of other classes
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# Class of a storage without "torch." and "Storage" -> its elements.
ELEMENTS = {
    "Byte": "<u1",
    "Char": "<i1",
    "Short": "<i2",
    "Int": "<i4",
    "Long": "<i8",
    "Half": "<f2",
    "Float": "<f4",
    "Double": "<f8",
    "Cuda": "<f4",
    "CudaByte": "<u1",
    "CudaChar": "<i1",
    "CudaShort": "<i2",
    "CudaInt": "<i4",
    "CudaLong": "<i8",
    "CudaHalf": "<f2",
    "CudaDouble": "<f8",
}


@dataclass(eq=False)
class Table:
    """A table; its entries may be added to after it was made, so that it can hold itself."""

    entries: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(eq=False)
class Storage:
    kind: str
    values: Any


@dataclass(eq=False)
class TensorView:
    """A tensor; ``offset`` counts from 0."""

    kind: str
    sizes: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    offset: int = 0
    storage: Storage | None = None


@dataclass(eq=False)
class Instance:
    class_name: str
    fields: Any = None


@dataclass(eq=False)
class Function:
    code: bytes = b"\x1bLJ code"
    upvalues: Any = None
    number: int = 8


def table(**fields: Any) -> Table:
    return Table(list(fields.items()))


def array(*items: Any) -> Table:
    return Table([(number, item) for number, item in enumerate(items, start=1)])


def tensor(values: Any, kind: str = "Float") -> TensorView:
    """A contiguous tensor with a storage of its own."""
    content = np.asarray(values)
    strides = tuple(stride // content.itemsize for stride in np.ascontiguousarray(content).strides)
    return TensorView(kind, content.shape, strides, 0, Storage(kind, content.reshape(-1)))


class Writer:
    """Turns objects into bytes.

    Args:
        versioned: whether "V 1" stands in front of the names of classes; the oldest files do without.
        referenced: whether an object met again is written as its index; Torch7 can also write it anew.
    """

    def __init__(self, *, versioned: bool = True, referenced: bool = True) -> None:
        self._versioned = versioned
        self._referenced = referenced
        self._indices: dict[int, int] = {}
        self._written = 0

    def object(self, value: Any) -> bytes:
        if value is None:
            return _int(0)
        if isinstance(value, bool):
            return _int(5) + _int(int(value))
        if isinstance(value, (int, float)):
            return _int(1) + struct.pack("<d", value)
        if isinstance(value, (str, bytes)):
            return _int(2) + _string(value)
        if isinstance(value, Function) and value.number == 6:
            return _int(6) + _string(value.code) + self.object(value.upvalues)
        return self._indexed(value)

    def _indexed(self, value: Any) -> bytes:
        head = _int({Table: 3, Function: getattr(value, "number", 0)}.get(type(value), 4))
        if self._referenced and id(value) in self._indices:
            return head + _int(self._indices[id(value)])
        self._written += 1
        self._indices[id(value)] = self._written
        head += _int(self._written)
        if isinstance(value, Table):
            return head + _int(len(value.entries)) + b"".join(map(self.object, _flat(value.entries)))
        if isinstance(value, Function):
            return head + _string(value.code) + self.object(value.upvalues)
        return head + self._instance(value)

    def _instance(self, value: Storage | TensorView | Instance) -> bytes:
        version = _string("V 1") if self._versioned else b""
        if isinstance(value, Storage):
            content = np.asarray(value.values).astype(ELEMENTS[value.kind])
            return version + _string(f"torch.{value.kind}Storage") + _long(content.size) + content.tobytes()
        if isinstance(value, TensorView):
            shape = b"".join(map(_long, (*value.sizes, *value.strides, value.offset + 1)))
            name = _string(f"torch.{value.kind}Tensor")
            return version + name + _int(len(value.sizes)) + shape + self.object(value.storage)
        return version + _string(value.class_name) + self.object(value.fields)


def write_torch7(path: Path, value: Any, **options: bool) -> Path:
    path.write_bytes(Writer(**options).object(value))
    return path


def _flat(entries: list[tuple[Any, Any]]) -> list[Any]:
    return [part for entry in entries for part in entry]


def _int(value: int) -> bytes:
    return struct.pack("<i", value)


def _long(value: int) -> bytes:
    return struct.pack("<q", value)


def _string(value: str | bytes) -> bytes:
    content = value.encode("utf-8") if isinstance(value, str) else value
    return _int(len(content)) + content
