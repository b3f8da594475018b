"""The reader of Torch7's files: every kind of object, legacy networks, and files that are not what they should be."""

from __future__ import annotations

import inspect
import random
import struct
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from inpaint_kernels.checkpoint_files._errors import CheckpointError
from inpaint_kernels.checkpoint_files.torch7 import MAX_DEPTH, Torch7Object, read_torch7, state_dict_of
from tests.torch7_writer import (
    ELEMENTS,
    Function,
    Instance,
    Storage,
    Table,
    TensorView,
    Writer,
    array,
    table,
    tensor,
    write_torch7,
)

RNG = np.random.default_rng(7)


def read_back(folder: Path, value: Any, **options: bool) -> Any:
    return read_torch7(write_torch7(folder / "a.t7", value, **options))


# ---- Objects ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (None, None),
        (True, True),
        (False, False),
        (3.0, 3),
        (-7, -7),
        (0.25, 0.25),
        (2.0**60, 2**60),
        (float("inf"), float("inf")),
        ("", ""),
        ("größe", "größe"),
        (b"gr\xf6\xdfe", "größe"),
        (b"a\0b", "a\0b"),
        (array("a", 2, None), {1: "a", 2: 2, 3: None}),
        (table(a=table(b=1), c=False), {"a": {"b": 1}, "c": False}),
        (Table([(0.5, 1), (True, 2), ("x", 3)]), {0.5: 1, True: 2, "x": 3}),
    ],
)
def test_plain_values(tmp_path, written, read):
    got = read_back(tmp_path, written)
    assert got == read
    assert type(got) is type(read)


def test_numbers_are_int_where_integral(tmp_path):
    assert [type(value) for value in read_back(tmp_path, array(1.0, 1.5)).values()] == [int, float]


@pytest.mark.parametrize("number", [6, 7, 8])
def test_functions_are_skipped_with_what_they_hold(tmp_path, number):
    shared = table(kept=1)
    function = Function(upvalues=array(table(name="x", value=shared)), number=number)
    assert read_back(tmp_path, array(function, shared, function)) == {1: None, 2: {"kept": 1}, 3: None}


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("kind", ELEMENTS)
def test_tensors_and_storages_of_every_type(tmp_path, kind, versioned):
    values = RNG.integers(0, 100, (2, 3, 4)).astype(ELEMENTS[kind])
    got = read_back(tmp_path, table(t=tensor(values, kind), s=Storage(kind, [1, 2, 3])), versioned=versioned)
    assert got["t"].numpy().dtype == values.dtype
    assert np.array_equal(got["t"].numpy(), values)
    assert got["s"].tolist() == [1, 2, 3]
    assert got["s"].dtype == got["t"].dtype


@pytest.mark.parametrize(
    ("sizes", "strides", "offset"),
    [((2, 3), (1, 2), 0), ((3, 2), (4, 2), 1), ((2, 2, 2), (1, 0, 5), 3), ((4,), (0,), 11), ((1, 5), (99, 1), 7)],
)
def test_sizes_strides_and_offset_are_honoured(tmp_path, sizes, strides, offset):
    values = RNG.normal(size=12).astype(np.float32)
    got = read_back(tmp_path, TensorView("Float", sizes, strides, offset, Storage("Float", values)))
    expected = torch.from_numpy(values).as_strided(sizes, strides, offset)
    assert got.is_contiguous()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("empty", [TensorView("Double"), TensorView("Double", storage=Storage("Double", [1.0]))])
def test_tensor_without_dimensions_is_empty(tmp_path, empty):
    got = read_back(tmp_path, empty)
    assert got.shape == (0,)
    assert got.dtype == torch.float64


def test_shared_objects_are_one_and_tensors_of_one_storage_share_memory(tmp_path):
    storage = Storage("Float", np.arange(10))
    first, second = TensorView("Float", (5,), (1,), 0, storage), TensorView("Float", (2, 3), (3, 1), 4, storage)
    inner = table(x=1)
    got = read_back(tmp_path, array(first, second, first, inner, inner))
    assert got[1] is got[3]
    assert got[4] is got[5]
    assert got[2].tolist() == [[4, 5, 6], [7, 8, 9]]
    got[1][4] = -1.0
    assert got[2][0, 0] == -1


def test_unreferenced_files_hold_objects_twice(tmp_path):
    inner = table(x=1)
    got = read_back(tmp_path, array(inner, inner), referenced=False)
    assert got == {1: {"x": 1}, 2: {"x": 1}}
    assert got[1] is not got[2]


@pytest.mark.parametrize("versioned", [True, False])
def test_cycles_of_tables_and_objects(tmp_path, versioned):
    fields = table(name="me")
    instance = Instance("my.Class", fields)
    outer = array(instance)
    fields.entries += [("self", instance), ("outer", outer)]
    got = read_back(tmp_path, outer, versioned=versioned)
    assert isinstance(got[1], Torch7Object)
    assert got[1].type_name == "my.Class"
    assert got[1].fields["self"] is got[1]
    assert got[1].fields["outer"] is got
    assert "my.Class" in repr(got)


def test_keys_that_a_dict_cannot_hold_are_left_out(tmp_path):
    key = table(a=1)
    assert read_back(tmp_path, Table([(key, 1), (Function(), 2), ("again", key)])) == {"again": {"a": 1}}


# ---- Networks --------------------------------------------------------------------------------------------------------


def values_of(state: dict[str, torch.Tensor], place: str) -> dict[str, TensorView]:
    return {name.removeprefix(place): tensor(value) for name, value in state.items() if name.startswith(place)}


def legacy_layers(network: nn.Sequential, package: str) -> list[Instance]:
    """The layers of a torch network as Torch7 would hold them."""
    names = {
        nn.Conv2d: "SpatialConvolution",
        nn.ConvTranspose2d: "SpatialFullConvolution",
        nn.BatchNorm2d: "SpatialBatchNormalization",
    }
    state = network.state_dict()
    layers = []
    for place, layer in network.named_children():
        if isinstance(layer, nn.Sequential):
            layers.append(Instance("nn.Sequential", table(modules=array(*legacy_layers(layer, package)))))
            continue
        fields: dict[str, Any] = values_of(state, f"{place}.")
        fields.pop("num_batches_tracked", None)
        name = names.get(type(layer), type(layer).__name__)
        if isinstance(layer, nn.Conv2d) and layer.dilation != (1, 1):
            name = "SpatialDilatedConvolution"
        fields |= {"train": False, "output": TensorView("Float"), "gradInput": TensorView("Float")}
        layers.append(Instance(f"{package}.{name}", table(**fields)))
    return layers


def glcic_like() -> nn.Sequential:
    """The kinds of layers of the published completion network, and their order."""
    return nn.Sequential(
        nn.Conv2d(4, 8, 5, padding=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=4, dilation=4), nn.BatchNorm2d(8), nn.ReLU()),
        nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 3, 3, padding=1),
        nn.Sigmoid(),
    )


def with_statistics(network: nn.Sequential) -> nn.Sequential:
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return network.eval()


@pytest.mark.parametrize("package", ["nn", "cudnn"])
def test_a_network_reads_as_the_same_torch_network(tmp_path, package):
    network = with_statistics(glcic_like())
    model = Instance("nn.Sequential", table(modules=array(*legacy_layers(network, package)), train=False))
    content = read_back(tmp_path, table(model=model, mean=tensor([0.456, 0.447, 0.416])))
    assert content["mean"].tolist() == pytest.approx([0.456, 0.447, 0.416])
    state = state_dict_of(content["model"])
    loaded = glcic_like().eval()
    missing = loaded.load_state_dict(state, strict=False)
    assert missing.unexpected_keys == []
    assert all(key.endswith("num_batches_tracked") for key in missing.missing_keys)
    assert list(state) == [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    photo = torch.rand(1, 4, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(photo), network(photo))


def test_parameters_in_one_flat_storage(tmp_path):
    """Training with getParameters() leaves every weight a view of one storage."""
    flat = Storage("Float", np.arange(100))
    layers = [
        Instance(
            "nn.SpatialConvolution",
            table(
                weight=TensorView("Float", (2, 1, 3, 3), (9, 9, 3, 1), 20 * place, flat),
                bias=TensorView("Float", (2,), (1,), 20 * place + 18, flat),
            ),
        )
        for place in range(2)
    ]
    state = state_dict_of(read_back(tmp_path, Instance("nn.Sequential", table(modules=array(*layers)))))
    assert state["1.weight"].flatten().tolist() == list(range(20, 38))
    assert state["1.bias"].tolist() == [38, 39]


def sequential(*layers: Any) -> Torch7Object:
    """What the reader makes of a Sequential."""
    return Torch7Object("nn.Sequential", {"modules": dict(enumerate(layers, start=1))})


@pytest.mark.parametrize("kind", ["SpatialConvolutionMM", "SpatialConvolution"])
def test_matrix_weights_of_convolutions_are_reshaped(kind):
    weight = torch.randn(5, 2 * 3 * 4)
    fields = {"weight": weight, "nInputPlane": 2, "kH": 3, "kW": 4}
    state = state_dict_of(sequential(Torch7Object(f"nn.{kind}", fields)))
    assert list(state) == ["0.weight"]
    assert torch.equal(state["0.weight"], weight.view(5, 2, 3, 4))


def test_old_batch_norm_keeps_its_function():
    variance, eps = torch.rand(6) + 0.1, 1e-3
    fields = {"running_mean": torch.randn(6), "running_std": (variance + eps).rsqrt(), "eps": eps}
    state = state_dict_of(sequential(Torch7Object("nn.SpatialBatchNormalization", fields)))
    assert list(state) == ["0.running_mean", "0.running_var"]
    torch.testing.assert_close(state["0.running_var"], variance, rtol=1e-5, atol=1e-7)


def test_layers_without_weights_keep_the_numbers_of_the_others():
    shared = Torch7Object("nn.ReLU", {"inplace": True, "output": torch.rand(3)})
    weight = torch.rand(1, 1, 1, 1)
    convolution = Torch7Object("nn.SpatialConvolution", {"weight": weight, "bias": None})
    assert list(state_dict_of(sequential(shared, convolution, shared, convolution))) == ["1.weight", "3.weight"]


REPEATED = sequential()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Torch7Object("nn.ReLU", {}), "module: expected an object of 'nn.Sequential', got 'nn.ReLU'"),
        (Torch7Object("nn.Sequential", {}), "module: nn.Sequential: expected a table 'modules', got nil"),
        (sequential(7), "0: expected a layer, got 7"),
        (sequential(sequential(Torch7Object("nn.PReLU", {"weight": torch.ones(1)}))), "0.0: layers of 'nn.PReLU' have"),
        (sequential(Torch7Object("nn.Concat", {"modules": {}})), "0: layers of 'nn.Concat' have weights or layers"),
        (sequential(REPEATED, REPEATED), "1.: the same nn.Sequential stands at two places"),
        (sequential(Torch7Object("nn.SpatialConvolution", {})), "0: nn.SpatialConvolution: expected a floating-point"),
        (sequential(Torch7Object("nn.SpatialConvolution", {"weight": torch.ones(2)})), "weight of 4 dimensions, got"),
        (sequential(Torch7Object("nn.SpatialFullConvolution", {"weight": torch.ones(2, 9)})), "weight of 4 dimensions"),
        (
            sequential(Torch7Object("nn.SpatialConvolutionMM", {"weight": torch.ones(2, 9), "nInputPlane": 1})),
            "expected a positive number 'kH', got nil",
        ),
        (
            sequential(
                Torch7Object(
                    "nn.SpatialConvolutionMM", {"weight": torch.ones(2, 9), "nInputPlane": 1, "kH": 3, "kW": 2}
                )
            ),
            "expected a weight of [2, 1, 3, 2], got [2, 9]",
        ),
        (
            sequential(Torch7Object("nn.SpatialBatchNormalization", {"running_mean": torch.ones(2)})),
            "0: nn.SpatialBatchNormalization: expected a floating-point tensor 'running_std', got nil",
        ),
    ],
)
def test_networks_that_cannot_be_converted_say_why(module, message):
    with pytest.raises(ValueError, match=r"^[\dm]") as caught:
        state_dict_of(module)
    assert message in str(caught.value)


def test_only_objects_of_torch7_have_a_state():
    with pytest.raises(TypeError, match="module: expected a Torch7Object, got dict"):
        state_dict_of({})  # type: ignore[arg-type]


# ---- Files that are not what they should be --------------------------------------------------------------------------


def raw(*parts: Any) -> bytes:
    """int -> 4 bytes, float -> a long of 8 bytes, str -> a string, bytes as they are."""
    pack = {
        int: lambda part: struct.pack("<i", part),
        float: lambda part: struct.pack("<q", int(part)),
        str: lambda part: struct.pack("<i", len(part)) + part.encode(),
        bytes: bytes,
    }
    return b"".join(pack[type(part)](part) for part in parts)


HEADER = raw(4, 1, "V 1", "torch.FloatTensor")
STORAGE = raw(4, 2, "V 1", "torch.FloatStorage")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "at byte 0: expected a type number of 4 bytes in a file of 0 bytes"),
        (b"3\n1\n0\n", "got its ASCII format"),
        (b"PK\x03\x04 a zip of PyTorch", "expected the type number of an object of Torch7, 0 to 8, got 67324752"),
        (b"\0\0\0\x03", "0 to 8, got 50331648"),  # big-endian
        (raw(1, b"\0\0"), "at byte 4: expected a number of 8 bytes"),
        (raw(5, 2), "at byte 4: expected a boolean, 0 or 1, got 2"),
        (raw(2, -1), "expected a count of the bytes of a string that fit into the 0 bytes left, got -1"),
        (raw(2, 2**31 - 1, b"x"), "fit into the 1 bytes left, got 2147483647"),
        (raw(3, 1, 2**31 - 1, b"x" * 99), "a table's entries that fit into the 99 bytes left, got 2147483647"),
        (raw(3, 1, 2, 2, "a", 0, 2, "a", 0), "a table has the key 'a' twice"),
        (raw(3, 1, 2, 5, 1, 0, 1, struct.pack("<d", 1), 0), "has the key 1 twice"),  # true and 1
        (raw(8, 1, 5, b"ab"), "expected a count of a function's bytes that fit into the 2 bytes left, got 5"),
        (raw(0, 0), "expected the end of the file behind its object, got 4 more bytes"),
        (raw(4, 1, "V 1", "tds.Vec", 1, struct.pack("<d", 1)), "expected a table of the fields of 'tds.Vec', got 1"),
        (HEADER + raw(65), "expected a tensor of 0 to 64 dimensions, got 65"),
        (HEADER + raw(-1), "expected a tensor of 0 to 64 dimensions, got -1"),
        (
            HEADER + raw(1, 4.0, 1.0, 1.0) + STORAGE + raw(2.0**60),
            "fits into the 0 bytes left, got 1152921504606846976",
        ),
        (HEADER + raw(1, 4.0, 1.0, 1.0) + STORAGE + raw(-1.0), "bytes left, got -1 elements"),
        (HEADER + raw(1, 4.0, 1.0, 1.0) + STORAGE + raw(3.0, bytes(12)), "inside its storage of 3 elements, got sizes"),
        (HEADER + raw(1, 2.0, 1.0, 0.0) + STORAGE + raw(3.0, bytes(12)), "strides [1], offset -1"),
        (HEADER + raw(1, 2.0, -1.0, 3.0) + STORAGE + raw(3.0, bytes(12)), "strides [-1], offset 2"),
        (HEADER + raw(1, 0.0, 1.0, 1.0) + STORAGE + raw(3.0, bytes(12)), "sizes [0]"),
        (HEADER + raw(1, 2.0**62, 0.0, 1.0) + STORAGE + raw(3.0, bytes(12)), "expected strided tensors that need no"),
        (HEADER + raw(2, 2.0**62, 2.0**62, 0.0, 0.0, 1.0) + STORAGE + raw(1.0, bytes(4)), "need no more memory"),
        (HEADER + raw(1, 2.0, 2.0**62, 1.0) + STORAGE + raw(3.0, bytes(12)), "inside its storage of 3 elements"),
        (HEADER + raw(1, 1.0, 1.0, 1.0, 3, 2, 0), "expected the storage of a torch.FloatTensor, got a table"),
        (
            HEADER + raw(1, 1.0, 1.0, 1.0, 4, 2, "V 1", "torch.ByteStorage", 1.0, b"x"),
            "the storage of a torch.FloatTensor, got a tensor [1] of torch.uint8",
        ),
        (raw(3, 1, 1, 2, "a" * 8), "expected a type number of 4 bytes"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path, content, message):
    path = tmp_path / "a.t7"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_torch7(path)
    assert str(caught.value).startswith(f"{path}: at byte ")
    assert message in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.t7: cannot be opened: No such file"):
        read_torch7(tmp_path / "none.t7")
    with pytest.raises(CheckpointError, match="expected a file, got a folder"):
        read_torch7(tmp_path)


def nested(depth: int) -> Table:
    value = Table()
    for _ in range(depth - 1):
        value = array(value)
    return value


def test_depth_is_bounded(tmp_path):
    content = read_back(tmp_path, nested(MAX_DEPTH))
    for _ in range(MAX_DEPTH - 1):
        content = content[1]
    assert content == {}
    with pytest.raises(CheckpointError, match=f"nested deeper than {MAX_DEPTH}"):
        read_back(tmp_path, nested(MAX_DEPTH + 1))


def test_a_caller_deep_in_the_stack_gets_an_error_of_the_file(tmp_path):
    path = write_torch7(tmp_path / "a.t7", nested(MAX_DEPTH))

    def read_below(frames: int) -> Any:
        return read_below(frames - 1) if frames else read_torch7(path)

    with pytest.raises(CheckpointError, match="nested too deep for the interpreter's recursion limit"):
        read_below(sys.getrecursionlimit() - len(inspect.stack(0)) - 100)


def small_file() -> bytes:
    """A file with every kind of object."""
    convolution = Instance(
        "nn.SpatialConvolution",
        table(weight=tensor(RNG.normal(size=(2, 1, 2, 2))), bias=tensor([0.5, 1.5], "Double"), kW=2, hook=Function()),
    )
    transposed = TensorView("Float", (2, 3), (1, 2), 0, Storage("Float", np.arange(6)))
    model = Instance("nn.Sequential", table(modules=array(convolution, convolution), train=False))
    return Writer().object(table(model=model, mean=transposed, note="größe", none=None))


def read_or_refuse(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    read = None
    with suppress(CheckpointError):
        read = read_torch7(path)
    if isinstance(read, dict) and isinstance(read.get("model"), Torch7Object):
        with suppress(ValueError):
            state_dict_of(read["model"])


def test_every_truncation_is_an_error(tmp_path):
    content = small_file()
    for length in range(len(content)):
        (tmp_path / "a.t7").write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_torch7(tmp_path / "a.t7")


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_read_or_refused_within_memory(tmp_path, seed):
    chance = random.Random(seed)
    content = small_file()
    tracemalloc.start()
    try:
        for _ in range(300):
            damaged = bytearray(content)
            for _ in range(chance.choice((1, 1, 2, 5))):
                damaged[chance.randrange(len(damaged))] = chance.choice((0, 1, 2, 3, 4, 8, 127, 128, 255))
            read_or_refuse(tmp_path / "a.t7", bytes(damaged))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_many_views_of_one_storage_take_no_more_memory_than_the_file(tmp_path):
    flat = Storage("Byte", np.zeros(4096))
    tall = [TensorView("Byte", (64, 64), (1, 64), 0, flat) for _ in range(400)]
    with pytest.raises(CheckpointError, match="expected strided tensors that need no more memory than the file's"):
        read_back(tmp_path, array(*tall))
    plain = [TensorView("Byte", (64, 64), (64, 1), 0, flat) for _ in range(400)]
    got = read_back(tmp_path, array(*plain))
    assert len({value.data_ptr() for value in got.values()}) == 1
