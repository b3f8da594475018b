"""Reading what ``torch.save`` of Torch7 (Lua) wrote, without Lua.

The format is a tree of objects, each a type number and its content; tables, classes and functions carry an index, and
a second mention of an index stands for the same object. Binary files hold the writer's own integers: this reader takes
those of 64-bit little-endian machines (int of 4 bytes, long of 8). Written from the description of the format in
torch7's ``File.lua``, ``generic/Tensor.c`` and ``generic/Storage.c``.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from inpaint_kernels.checkpoint_files._bounded_file import BoundedFile

MAX_DEPTH: Final = 200
"""Most objects inside each other; a layer of a Sequential inside a table needs 8."""

_ELEMENTS: Final = {
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Half": torch.float16,
    "Float": torch.float32,
    "Double": torch.float64,
}
# "Cuda" alone is float.
_NAMED_ELEMENTS: Final = {**_ELEMENTS, "Cuda": torch.float32, **{f"Cuda{name}": of for name, of in _ELEMENTS.items()}}
_STORAGES: Final = {f"torch.{name}Storage": dtype for name, dtype in _NAMED_ELEMENTS.items()}
_TENSORS: Final = {f"torch.{name}Tensor": dtype for name, dtype in _NAMED_ELEMENTS.items()}

_MAX_DIMENSIONS: Final = 64  # torch's own limit for operations on tensors
_LEAST_ENTRY_BYTES: Final = 8  # a table's key and its value are two type numbers at least


@dataclass(frozen=True, eq=False)
class Torch7Object:
    """An object of a Lua class that is neither tensor nor storage, equal only to itself.

    Attributes:
        type_name: its class, such as ``"nn.Sequential"``.
        fields: its fields by name.
    """

    type_name: str
    fields: dict[Any, Any]


def read_torch7(path: str | os.PathLike[str]) -> Any:
    """Read a binary file of Torch7's ``torch.save``; nothing in it is executed.

    ===========================  =======================================================================================
    in the file                  here
    ===========================  =======================================================================================
    nil                          None
    number                       int where integral, else float
    string                       str: UTF-8, Latin-1 where it is not UTF-8
    boolean                      bool
    table                        dict; a list keeps its keys 1, 2, ...
    function                     None: its code is skipped
    ``torch.*Storage``           tensor ``[n]`` on the CPU
    ``torch.*Tensor``            contiguous tensor on the CPU; without dimensions: empty tensor ``[0]``
    object of another class      :class:`Torch7Object`
    ===========================  =======================================================================================

    The tensors of CUDA are read as their CPU kin (``torch.CudaTensor`` is float32). What the file mentions twice is one
    object here; contiguous tensors of one storage share its memory. Entries of a table whose key is a table or a
    function are left out, for a dict cannot hold them.

    Args:
        path: the file.

    Raises:
        CheckpointError: no such file; ASCII format; truncated, damaged, or no file of Torch7; bytes behind the object;
            objects nested deeper than :data:`MAX_DEPTH`; strided tensors that would need more memory than the file.
    """
    with BoundedFile(path) as file:
        _refuse_ascii(file)
        try:
            content = _Reader(file).value()
        # The depth allowed here may still be too much for a caller that is deep in the stack itself.
        except RecursionError as error:
            raise file.error("objects nested too deep for the interpreter's recursion limit") from error
        if file.remaining:
            raise file.error(f"expected the end of the file behind its object, got {file.remaining} more bytes")
        return content


def _refuse_ascii(file: BoundedFile) -> None:
    if re.fullmatch(rb"[0-8]\r?\n?", file.read(min(2, file.size), "a type number")):
        raise file.error(
            "expected Torch7's binary format, got its ASCII format: load it in Torch7 and write it again with "
            "torch.save(name, object)",
            offset=0,
        )
    file.seek(0)


class _Reader:
    """Reads one tree of objects from ``file``."""

    def __init__(self, file: BoundedFile) -> None:
        self._file = file
        self._depth = 0
        self._objects: dict[int, Any] = {}
        self._copied_bytes = 0
        self._plain: dict[int, Callable[[], Any]] = {
            0: lambda: None,
            1: self._number,
            2: lambda: self._string("a string"),
            5: self._boolean,
            6: self._function,
        }
        self._indexed: dict[int, Callable[[int], None]] = {
            3: self._table,
            4: self._torch_object,
            7: self._indexed_function,
            8: self._indexed_function,
        }

    def value(self) -> Any:
        """The object at the file's position."""
        start = self._file.position
        if self._depth == MAX_DEPTH:
            raise self._file.error(f"objects nested deeper than {MAX_DEPTH}")
        self._depth += 1
        value = self._value(start)
        self._depth -= 1
        return value

    def _value(self, start: int) -> Any:
        kind = self._int("a type number")
        if kind in self._plain:
            return self._plain[kind]()
        if kind not in self._indexed:
            raise self._file.error(f"expected the type number of an object of Torch7, 0 to 8, got {kind}", start)
        index = self._int("an object's index")
        if index not in self._objects:
            self._indexed[kind](index)
        return self._objects[index]

    # What has no index ------------------------------------------------------------------------------------------------

    def _int(self, what: str) -> int:
        return int.from_bytes(self._file.read(4, what), "little", signed=True)

    def _long(self, what: str) -> int:
        return int.from_bytes(self._file.read(8, what), "little", signed=True)

    def _count(self, what: str, bytes_each: int) -> int:
        """A count of things that still follow, each of at least ``bytes_each`` bytes."""
        start = self._file.position
        count = self._int(f"the count of {what}")
        if not 0 <= count * bytes_each <= self._file.remaining:
            raise self._file.error(
                f"expected a count of {what} that fit into the {self._file.remaining} bytes left, got {count}", start
            )
        return count

    def _number(self) -> int | float:
        (number,) = struct.unpack("<d", self._file.read(8, "a number"))
        return int(number) if number.is_integer() else float(number)

    def _boolean(self) -> bool:
        start = self._file.position
        flag = self._int("a boolean")
        if flag not in (0, 1):
            raise self._file.error(f"expected a boolean, 0 or 1, got {flag}", start)
        return flag == 1

    def _string(self, what: str) -> str:
        content = self._file.read(self._count(f"the bytes of {what}", 1), what)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return content.decode("latin-1")

    def _function(self) -> None:
        self._file.skip(self._count("a function's bytes", 1), "a function")
        self.value()  # its upvalues, which may hold objects that are mentioned again

    # What has an index: registered before its parts are read, for they may mention it ---------------------------------

    def _indexed_function(self, index: int) -> None:
        self._objects[index] = None
        self._function()

    def _table(self, index: int) -> None:
        count = self._count("a table's entries", _LEAST_ENTRY_BYTES)
        table: dict[Any, Any] = {}
        self._objects[index] = table
        for _ in range(count):
            start = self._file.position
            key, value = self.value(), self.value()
            if key is None or isinstance(key, dict):
                continue
            if key in table:  # also true and 1, which are two keys in Lua and one in Python
                raise self._file.error(f"a table has the key {key!r} twice", start)
            table[key] = value

    def _torch_object(self, index: int) -> None:
        name = self._string("a class's version")
        if re.fullmatch(r"V \d+", name):  # the oldest files have no version in front of the name
            name = self._string("a class's name")
        if name in _STORAGES:
            self._objects[index] = self._storage(_STORAGES[name])
        elif name in _TENSORS:
            self._objects[index] = self._tensor(name)
        else:
            self._objects[index] = Torch7Object(name, {})
            self._objects[index].fields.update(self._fields(name))

    def _fields(self, class_name: str) -> dict[Any, Any]:
        start = self._file.position
        fields = self.value()
        if not isinstance(fields, dict):
            raise self._file.error(
                f"expected a table of the fields of {class_name!r}, got {_kind(fields)}; classes with a format of "
                f"their own cannot be read",
                start,
            )
        return fields

    def _storage(self, dtype: torch.dtype) -> Tensor:
        start = self._file.position
        count = self._long("a storage's size")
        if not 0 <= count * dtype.itemsize <= self._file.remaining:
            raise self._file.error(
                f"expected a storage of {dtype} that fits into the {self._file.remaining} bytes left, got {count} "
                f"elements",
                start,
            )
        return self._file.read_tensor(count * dtype.itemsize, "a storage").view(dtype)

    def _tensor(self, name: str) -> Tensor:
        start = self._file.position
        dimensions = self._int("a tensor's count of dimensions")
        if not 0 <= dimensions <= _MAX_DIMENSIONS:
            raise self._file.error(f"expected a tensor of 0 to {_MAX_DIMENSIONS} dimensions, got {dimensions}", start)
        sizes = [self._long("a tensor's sizes") for _ in range(dimensions)]
        strides = [self._long("a tensor's strides") for _ in range(dimensions)]
        offset = self._long("a tensor's offset") - 1  # Lua counts from 1
        storage = self.value()
        dtype = _TENSORS[name]
        if storage is None or dimensions == 0:
            return torch.empty(0, dtype=dtype)
        if not isinstance(storage, Tensor) or storage.ndim != 1 or storage.dtype != dtype:
            raise self._file.error(f"expected the storage of a {name}, got {_kind(storage)}", start)
        last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if offset < 0 or min(sizes) < 1 or min(strides) < 0 or last >= len(storage):
            raise self._file.error(
                f"expected a tensor inside its storage of {len(storage)} elements, got sizes {sizes}, strides "
                f"{strides}, offset {offset}",
                start,
            )
        return self._contiguous(storage, sizes, strides, offset, start)

    def _contiguous(self, storage: Tensor, sizes: list[int], strides: list[int], offset: int, start: int) -> Tensor:
        if math.prod(sizes) <= len(storage):
            view = storage.as_strided(sizes, strides, offset)
            if view.is_contiguous():
                return view
        # A stride of 0 repeats elements, and many tensors may share a storage: only the sum of all bounds the copies.
        self._copied_bytes += math.prod(sizes) * storage.itemsize
        if self._copied_bytes > self._file.size:
            raise self._file.error(
                f"expected strided tensors that need no more memory than the file's {self._file.size} bytes, got "
                f"{self._copied_bytes} bytes with one of sizes {sizes}, strides {strides}",
                start,
            )
        return storage.as_strided(sizes, strides, offset).contiguous()


def _kind(value: Any) -> str:
    if isinstance(value, Torch7Object):
        return f"an object of {value.type_name!r}"
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    return {dict: "a table", type(None): "nil or a function"}.get(type(value), f"{value!r:.60}")


# A network's state ----------------------------------------------------------------------------------------------------

_CONVOLUTIONS: Final = (
    "SpatialConvolution",
    "SpatialConvolutionMM",
    "SpatialDilatedConvolution",
    "SpatialFullConvolution",
)
_WEIGHTS: Final = ("weight", "bias", "running_mean", "running_var", "running_std")


def state_dict_of(module: Torch7Object) -> dict[str, Tensor]:
    """Parameters and buffers of a legacy ``nn.Sequential``, named as ``torch.nn.Sequential`` of the same layers does.

    Known layers with weights, of the packages ``nn`` and ``cudnn``: SpatialConvolution, SpatialConvolutionMM,
    SpatialDilatedConvolution (weight ``[out, in, kH, kW]``, also from a matrix ``[out, in kH kW]``),
    SpatialFullConvolution (``[in, out, kH, kW]``) and SpatialBatchNormalization, whose old form holds the inverse
    deviation ``running_std`` = 1 / sqrt(var + eps) and is converted to ``running_var``; there is no
    ``num_batches_tracked``. Layers without weights add nothing but their place; Sequentials may nest.

    Args:
        module: the ``nn.Sequential``, as :func:`read_torch7` gives it.

    Returns:
        ``"0.weight"``, ``"0.bias"``, ``"1.running_mean"``, ... -> tensor, in the order of the layers. Tensors share
        memory with those in ``module``.

    Raises:
        TypeError: not a :class:`Torch7Object`.
        ValueError: not an ``nn.Sequential``; an unknown layer with weights; a known layer that lacks a field or has one
            of the wrong kind; a Sequential that stands at two places. The message names the layer and its place.
    """
    if not isinstance(module, Torch7Object):
        raise TypeError(f"module: expected a Torch7Object, got {type(module).__name__}")
    if module.type_name != "nn.Sequential":
        raise ValueError(f"module: expected an object of 'nn.Sequential', got {module.type_name!r}")
    state: dict[str, Tensor] = {}
    _collect(module, "", state, set())
    return state


def _collect(sequential: Torch7Object, prefix: str, state: dict[str, Tensor], seen: set[Torch7Object]) -> None:
    # Not even one after the other: nested pairs would double the state with every level.
    if sequential in seen:
        raise ValueError(f"{prefix or 'module'}: the same nn.Sequential stands at two places")
    seen.add(sequential)
    modules = sequential.fields.get("modules")
    if not isinstance(modules, dict):
        raise ValueError(f"{prefix or 'module'}: nn.Sequential: expected a table 'modules', got {_kind(modules)}")
    for number in range(1, len(modules) + 1):
        place = f"{prefix}{number - 1}"
        layer = modules.get(number)
        if not isinstance(layer, Torch7Object):
            raise ValueError(f"{place}: expected a layer, got {_kind(layer)}")
        if layer.type_name == "nn.Sequential":
            _collect(layer, f"{place}.", state, seen)
        else:
            state |= {f"{place}.{name}": value for name, value in _state_of_layer(layer, place).items()}


def _state_of_layer(layer: Torch7Object, place: str) -> dict[str, Tensor]:
    package, _, kind = layer.type_name.rpartition(".")
    if package in ("nn", "cudnn"):
        if kind in _CONVOLUTIONS:
            return _state_of_convolution(layer, place)
        if kind == "SpatialBatchNormalization":
            return _state_of_batch_norm(layer, place)
    if "modules" in layer.fields or any(_is_filled(layer.fields.get(name)) for name in _WEIGHTS):
        raise ValueError(f"{place}: layers of {layer.type_name!r} have weights or layers that cannot be converted")
    return {}


def _is_filled(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 0


def _state_of_convolution(layer: Torch7Object, place: str) -> dict[str, Tensor]:
    weight = _field(layer, "weight", place)
    if weight.ndim == 2 and not layer.type_name.endswith(".SpatialFullConvolution"):
        shape = [weight.shape[0], *(_positive(layer, name, place) for name in ("nInputPlane", "kH", "kW"))]
        if math.prod(shape) != weight.numel():
            raise ValueError(f"{place}: {layer.type_name}: expected a weight of {shape}, got {list(weight.shape)}")
        weight = weight.reshape(shape)
    if weight.ndim != 4:
        raise ValueError(f"{place}: {layer.type_name}: expected a weight of 4 dimensions, got {list(weight.shape)}")
    return {"weight": weight, **_optional(layer, "bias", place)}


def _state_of_batch_norm(layer: Torch7Object, place: str) -> dict[str, Tensor]:
    state = {**_optional(layer, "weight", place), **_optional(layer, "bias", place)}
    state["running_mean"] = _field(layer, "running_mean", place)
    if layer.fields.get("running_var") is not None:
        state["running_var"] = _field(layer, "running_var", place)
    else:
        state["running_var"] = _variance(_field(layer, "running_std", place), _positive(layer, "eps", place))
    return state


def _variance(inverse_deviation: Tensor, eps: float) -> Tensor:
    return (inverse_deviation.double().pow(-2) - eps).to(inverse_deviation.dtype)


def _field(layer: Torch7Object, name: str, place: str) -> Tensor:
    value = layer.fields.get(name)
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
        raise ValueError(f"{place}: {layer.type_name}: expected a floating-point tensor {name!r}, got {_kind(value)}")
    return value


def _optional(layer: Torch7Object, name: str, place: str) -> dict[str, Tensor]:
    return {name: _field(layer, name, place)} if layer.fields.get(name) is not None else {}


def _positive(layer: Torch7Object, name: str, place: str) -> Any:
    value = layer.fields.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{place}: {layer.type_name}: expected a positive number {name!r}, got {_kind(value)}")
    return value
