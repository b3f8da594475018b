"""The reader of TensorFlow's checkpoints: a real one, ones of our own writing, and damaged or hostile files."""

from __future__ import annotations

import os
import random
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest
import torch

from inpaint_kernels.checkpoint_files._crc32c import crc32c
from inpaint_kernels.checkpoint_files._errors import CheckpointError
from inpaint_kernels.checkpoint_files._snappy import decompress
from inpaint_kernels.checkpoint_files.tensorflow import read_tensorflow
from tests import tensorflow_bundle_writer as bundle
from tests.make_tensorflow_checkpoint import DTYPES, FOLDER, KERNEL_SHAPE
from tests.tensorflow_bundle_writer import TableWriter, entry, header, message, plain_block, varint, write_bundle

RNG = np.random.default_rng(11)


# ---- Checksum and compression ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "checksum"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        # RFC 3720, B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_published_checksums(content, checksum):
    assert crc32c(content) == checksum


@pytest.mark.parametrize("size", [*range(1, 18), 511, 512, 513, 1000, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, 600_001])
def test_checksum_of_every_length_is_that_of_its_parts(size):
    content = RNG.integers(0, 256, size, dtype=np.uint8)
    expected = bundle.crc32c(content.tobytes()) if size < 2000 else google_crc32c(content)
    assert crc32c(content) == expected


def google_crc32c(content: np.ndarray) -> int:
    return int(pytest.importorskip("google_crc32c").value(content.tobytes()))


def test_checksum_is_fast_enough_for_whole_networks():
    content = RNG.integers(0, 256, 16 << 20, dtype=np.uint8)
    crc32c(content[: 1 << 18])  # makes the tables
    best = min(timed(lambda: crc32c(content)) for _ in range(3))
    assert best < 2, f"{best:.2f} s for 16 MiB"  # 0.2 s on an idle core


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        bytes(3000),
        b"abcdefgh" * 100,
        RNG.bytes(70),
        RNG.bytes(700),
        b"".join(f"scope/conv{number}/kernel/Adam".encode() for number in range(300)),
    ],
    ids=["empty", "short", "zeros", "periodic", "noise", "long noise", "names"],
)
def test_decompression_undoes_compression(content):
    compressed = bundle.snappy(content)
    assert decompress(compressed, CheckpointError) == content


def test_decompression_of_overlapping_copies_as_in_the_formats_description():
    assert decompress(varint(7) + b"\x08xab" + b"\x01\x02", CheckpointError) == b"xababab"


@pytest.mark.parametrize(
    ("compressed", "message_part"),
    [
        (b"", "the length of Snappy's output of 1 bytes"),
        (b"\xff" * 10, "integer of at most 64 bits"),
        (varint(1 << 40), "expected at most 22 bytes per compressed byte"),
        (varint(3) + b"\x08xa", "a literal of 3 bytes, got the 2 bytes left"),
        (varint(3) + b"\x08xab\x00y", "expected 3 bytes of Snappy's output, got more"),
        (varint(4) + b"\x08xab", "expected 4 bytes of Snappy's output, got 3"),
        (varint(8) + b"\x08xab\x01\x04", "from the 3 bytes so far, got one from 4 bytes back"),
        (varint(8) + b"\x08xab\x01\x00", "got one from 0 bytes back"),
        (varint(8) + b"\xfc\xff\xff\xff\xff", "a literal of 4294967296 bytes"),
    ],
)
def test_damaged_compression(compressed, message_part):
    with pytest.raises(CheckpointError) as caught:
        decompress(compressed, CheckpointError)
    assert message_part in str(caught.value)


# ---- A checkpoint that TensorFlow wrote ------------------------------------------------------------------------------


def is_number(name: str) -> bool:
    return name not in ("text", "partitioned")


@pytest.mark.parametrize(
    "place",
    ["", "checkpoint", "snap-7", "snap-7.index", "snap-7.meta", "snap-7.data-00000-of-00002"],
    ids=["folder", "checkpoint", "prefix", "index", "meta", "data"],
)
def test_tensorflows_own_checkpoint(place):
    read = read_tensorflow(FOLDER / place, wanted=is_number)
    kernel = np.arange(np.prod(KERNEL_SHAPE), dtype=np.float32).reshape(KERNEL_SHAPE) / 8
    assert read.pop("inpaint_net/conv1/kernel").numpy().tolist() == kernel.tolist()
    assert read.pop("inpaint_net/conv1/kernel/Adam").shape == KERNEL_SHAPE
    assert read.pop("inpaint_net/conv1/bias").tolist() == [0.5, -0.5, 1.5, -1.5]
    assert read.pop("empty").shape == (0, 3)
    step = read.pop("global_step")
    assert (step.dtype, step.shape, step.item()) == (torch.int64, (), 430000)
    assert list(read) == sorted(f"dtypes/{dtype}" for dtype in DTYPES)
    for name, value in read.items():
        assert str(value.dtype) == f"torch.{name.removeprefix('dtypes/')}"
        assert value.tolist() == [[0, 1, 2], [3, 4, 5]] or value.tolist() == [[False, True, True], [True] * 3]


def test_only_wanted_variables_are_read(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "c")
    (tmp_path / "c/snap-7.data-00000-of-00002").unlink()  # holds the dtypes, which nobody asks for
    read = read_tensorflow(tmp_path / "c", wanted=lambda name: name.startswith("inpaint_net") and "Adam" not in name)
    assert list(read) == ["inpaint_net/conv1/bias", "inpaint_net/conv1/kernel"]


def test_variables_that_cannot_be_read_are_named():
    with pytest.raises(
        CheckpointError, match=r"snap-7\.index: variable 'partitioned': is partitioned into slices, which"
    ):
        read_tensorflow(FOLDER)
    with pytest.raises(
        CheckpointError, match=r"variable 'text': expected one of float32.*got number 7 of TensorFlow's"
    ):
        read_tensorflow(FOLDER, wanted=lambda name: name == "text")


# ---- Checkpoints of our own writing ----------------------------------------------------------------------------------

ARRAYS: dict[str, np.ndarray] = {
    **{f"dtypes/{name}": RNG.integers(0, 2, (2, 3)).astype(name) for name in bundle.NUMBERS},
    **{
        f"net/conv{layer}/{part}": RNG.normal(size=(3, 2)).astype(np.float32)
        for layer in range(40)
        for part in ("kernel", "bias", "kernel/Adam", "kernel/Adam_1")
    },
    "größe": np.array(2.5, np.float32),
}


@pytest.mark.parametrize("compression", [0, 1])
@pytest.mark.parametrize("entries_per_block", [1, 7, 1000])
def test_round_trip_in_the_order_of_the_index(tmp_path, compression, entries_per_block):
    read = read_tensorflow(write_bundle(tmp_path / "snap", ARRAYS, TableWriter(compression, entries_per_block)))
    assert list(read) == sorted(ARRAYS, key=str.encode)
    for name, array in ARRAYS.items():
        assert read[name].numpy().dtype == array.dtype
        assert np.array_equal(read[name].numpy(), array), name


def test_strings_are_left_out(tmp_path):
    value = entry(7, (2,), 0, size=9)
    (tmp_path / "s.index").write_bytes(TableWriter().table([(b"", header()), (b"text", value)]))
    assert read_tensorflow(tmp_path / "s") == {}


@pytest.mark.parametrize(
    "line",
    [
        b'model_checkpoint_path: "snap"',
        b'model_checkpoint_path: "/logs/somebody/logs/snap"',
        b'model_checkpoint_path: "../../snap"',
        rb'model_checkpoint_path: "C:\\logs\\snap"',
        rb'model_checkpoint_path: "logs/\163nap"',
    ],
)
def test_only_the_last_part_of_the_recorded_path_is_used(tmp_path, line):
    write_bundle(tmp_path / "snap", {"a": np.ones(3, np.float32)})
    (tmp_path / "checkpoint").write_bytes(line + b'\nall_model_checkpoint_paths: "other"\n')
    assert read_tensorflow(tmp_path)["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("text", "message_part"),
    [
        (b"", "expected a line model_checkpoint_path"),
        (b'all_model_checkpoint_paths: "snap"', "expected a line model_checkpoint_path"),
        (b'model_checkpoint_path: ".."', "to end in a file's name, got '..'"),
        (b'model_checkpoint_path: "logs/"', "to end in a file's name, got ''"),
        (rb'model_checkpoint_path: "a\0b"', "to end in a file's name"),
        (rb'model_checkpoint_path: "gon\9"', "gon9.index: cannot be opened"),
        (b'model_checkpoint_path: "gone"', "gone.index: cannot be opened: No such file"),
    ],
)
def test_states_that_name_no_checkpoint(tmp_path, text, message_part):
    (tmp_path / "checkpoint").write_bytes(text)
    with pytest.raises(CheckpointError) as caught:
        read_tensorflow(tmp_path)
    assert message_part in str(caught.value)


# ---- Files that are not what they should be --------------------------------------------------------------------------

FOUR_BYTES = bundle.masked(bundle.crc32c(b"\0\0\0\1"))


def one(value: bytes, head: bytes = header()) -> bytes:
    return TableWriter().table([(b"", head), (b"w", value)])


def with_blocks(*blocks: bytes, compression: int = 0) -> bytes:
    """An index of these blocks, whatever they hold."""
    writer = TableWriter(compression)
    places = [(bytes([number + 1]), writer.block(block)) for number, block in enumerate(blocks)]
    return writer.finish(varint(0) * 2, writer.block(plain_block(places)))


@pytest.mark.parametrize(
    ("index", "message_part"),
    [
        (b"", "at byte 0: expected a checkpoint's index of at least 48 bytes, got 0"),
        (b"x" * 100, "at byte 52: expected the number 0xdb4775248b80fb57 that ends a checkpoint's index"),
        (TableWriter().finish(varint(0) * 2, varint(1 << 60) * 2), "expected a block in front of the footer"),
        (
            TableWriter().finish(b"\xff" * 40, b"")[-48:],
            "the offset of the block of statistics as an integer of at most",
        ),
        (with_blocks(), "expected the index to begin with the bundle's header, got the key None"),
        (with_blocks(plain_block([(b"a", b"")])), "begin with the bundle's header, got the key b'a'"),
        (with_blocks(b"abc"), "expected its count of restarts to fit"),
        (with_blocks(struct.pack("<I", 1 << 31)), "expected its count of restarts to fit, got 2147483648"),
        (with_blocks(varint(1) + bytes(8)), "shares at most 0, got 1 bytes that share 1"),
        (with_blocks(varint(0) + varint(5000) + bytes(5100)), "a key of at most 4096 bytes"),
        (with_blocks(varint(0) * 2 + varint(99) + bytes(8)), "a value of 99 bytes, got the 4 bytes left"),
        (with_blocks(plain_block([(b"", header())]), plain_block([(b"", b"")])), "keys in ascending order, got b''"),
        (with_blocks(plain_block([(b"", header())]), compression=2), "compression 0 (none) or 1 (Snappy), got 2"),
        (one(b"", header(endianness=1)), "header: expected a checkpoint from a little-endian machine, got one from a"),
        (one(b"", header(least_reader=2)), "expected version 1 of the bundle, got one for readers of 2 on"),
        (one(b"", header(shards=0)), "expected 1 to 99999 data files, got 0"),
        (one(b"", header(shards=-1)), "expected 1 to 99999 data files, got 18446744073709551615"),
        (one(b"", b"\x0f"), "header: expected field 1 of kind 0, got kind 7"),
        (
            one(entry(1, (1,), FOUR_BYTES, size=4, shard=1)),
            "'w': expected its values in one of 1 data files, got number 1",
        ),
        (one(entry(1, (2,), FOUR_BYTES, size=4)), "expected the bytes of shape [2] of torch.float32, got 4 bytes"),
        (
            one(entry(1, (1 << 60,), 0, size=1 << 62)),
            "expected variable 'w' of 4611686018427387904 bytes in a file of 4",
        ),
        (one(entry(1, (1 << 40, 1 << 40), 0)), "expected the bytes of shape"),
        (one(entry(1, (-1,), 0)), "expected the bytes of shape [18446744073709551615]"),
        (one(entry(1, (0, 1 << 62, 1 << 62), 0)), "expected the bytes of shape [0, "),
        (one(entry(1, (1,) * 65, FOUR_BYTES, size=4)), "expected at most 64 dimensions, got 65"),
        (
            one(entry(1, (1,), FOUR_BYTES, size=4, offset=1)),
            "at byte 1: expected variable 'w' of 4 bytes in a file of 4",
        ),
        (one(entry(1, (1,), FOUR_BYTES, size=4, offset=1 << 63)), "in a file of 4 bytes"),
        (one(entry(1, (1,), 0, size=4)), "expected variable 'w' with the checksum 0x00000000, got"),
        (one(entry(10, (4,), FOUR_BYTES, size=4)), ""),
        (one(message((1, b"x"))), "variable 'w': expected field 1 of kind 0, got kind 2"),
        (one(message((2, message((3, 1))))), "expected a shape, got one of unknown rank"),
        (one(b"\x0b"), "expected field 1 of kind 0, got kind 3"),
        (one(b"\x7b"), "expected a field of kind 0, 1, 2 or 5, got kind 3"),
        (one(b"\xff" * 11), "expected a field's tag as an integer of at most 64 bits, got more"),
        (one(message((2, b"x" * 9))[:-1]), "a field of 9 bytes, got the 8 bytes left"),
        (TableWriter().table([(b"", header()), (b"\xff", b"")]), "expected a variable's name in UTF-8, got b'\\xff'"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path, index, message_part):
    (tmp_path / "a.data-00000-of-00001").write_bytes(b"\0\0\0\1")
    (tmp_path / "a.index").write_bytes(index)
    if not message_part:
        assert read_tensorflow(tmp_path / "a")["w"].tolist() == [False, False, False, True]
        return
    with pytest.raises(CheckpointError) as caught:
        read_tensorflow(tmp_path / "a", wanted=lambda name: True)
    assert str(caught.value).startswith(f"{tmp_path / 'a'}.")
    assert message_part in str(caught.value)


def test_values_that_share_bytes_are_refused(tmp_path):
    value = entry(1, (1,), FOUR_BYTES, size=4)
    (tmp_path / "a.data-00000-of-00001").write_bytes(b"\0\0\0\1")
    (tmp_path / "a.index").write_bytes(TableWriter().table([(b"", header()), (b"v", value), (b"w", value)]))
    with pytest.raises(CheckpointError, match="variable 'w' overlaps the one in front of it"):
        read_tensorflow(tmp_path / "a")


def test_other_bytes_than_booleans_are_refused(tmp_path):
    (tmp_path / "a.data-00000-of-00001").write_bytes(b"\2")
    (tmp_path / "a.index").write_bytes(one(entry(10, (1,), bundle.masked(bundle.crc32c(b"\2")), size=1)))
    with pytest.raises(CheckpointError, match="variable 'w' of booleans, 0 or 1, got other bytes"):
        read_tensorflow(tmp_path / "a")


def test_damaged_values_are_an_error(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "c")
    data = tmp_path / "c/snap-7.data-00001-of-00002"
    content = bytearray(data.read_bytes())
    content[40] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"at byte \d+: expected variable '.*' with the checksum .*: damaged"):
        read_tensorflow(tmp_path / "c", wanted=is_number)


def test_missing_data_files_are_an_error(tmp_path):
    shutil.copy(FOLDER / "snap-7.index", tmp_path)
    with pytest.raises(CheckpointError, match=r"snap-7\.data-00000-of-00002: cannot be opened: No such file"):
        read_tensorflow(tmp_path / "snap-7", wanted=is_number)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "a.index")
    with pytest.raises(CheckpointError, match="expected a file, got a folder or a device"):
        read_tensorflow(tmp_path / "a")


def test_every_truncation_of_the_index_is_an_error(tmp_path):
    content = (FOLDER / "snap-7.index").read_bytes()
    for length in range(len(content)):
        (tmp_path / "a.index").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"a\.index: "):
            read_tensorflow(tmp_path / "a", wanted=lambda name: False)


@pytest.mark.parametrize(("number", "read_bytes"), [(0, 198), (1, 600)])
def test_truncated_values_are_an_error(tmp_path, number, read_bytes):
    """Strings and slices, which are not read, lie behind the first ``read_bytes`` bytes."""
    shutil.copytree(FOLDER, tmp_path / "c")
    data = tmp_path / f"c/snap-7.data-{number:05d}-of-00002"
    content = data.read_bytes()
    data.write_bytes(content[:read_bytes])
    read_tensorflow(tmp_path / "c", wanted=is_number)
    for length in range(0, read_bytes, 3):
        data.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"snap-7\.data-.*in a file of"):
            read_tensorflow(tmp_path / "c", wanted=is_number)


@pytest.mark.parametrize("name", ["checkpoint", "snap-7.index", "snap-7.data-00001-of-00002"])
def test_damaged_files_are_read_or_refused(tmp_path, name):
    chance = random.Random(name)
    shutil.copytree(FOLDER, tmp_path / "c")
    content = (FOLDER / name).read_bytes()
    for _ in range(300):
        damaged = bytearray(content)
        damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        (tmp_path / "c" / name).write_bytes(damaged)
        with suppress(CheckpointError):
            assert len(read_tensorflow(tmp_path / "c", wanted=is_number)) == 15


@pytest.mark.parametrize("compression", [0, 1])
def test_damage_under_good_checksums_is_read_or_refused_within_memory(tmp_path, compression):
    """Checksums stop almost every damaged byte; here they are right and the block is wrong."""
    chance = random.Random(compression)
    arrays = {f"net/conv{layer}/kernel": np.ones((2, 2), np.float32) for layer in range(4)}
    write_bundle(tmp_path / "a", arrays)
    sizes = message(*((2, message((1, length))) for length in (2, 2)))
    entries = [
        (name.encode(), message((1, 1), (2, sizes), (4, 16 * place), (5, 16))) for place, name in enumerate(arrays)
    ]
    block = plain_block([(b"", header()), *entries])
    plain = bundle.snappy(block) if compression else block
    tracemalloc.start()
    try:
        for _ in range(250):
            damaged = bytearray(plain)
            for _ in range(chance.choice((1, 2, 4))):
                damaged[chance.randrange(len(damaged))] = chance.choice((0, 1, 2, 8, 16, 127, 128, 255))
            writer = TableWriter(compression)
            listing = writer.block(plain_block([(b"z", writer.stored(bytes(damaged)))]))
            (tmp_path / "a.index").write_bytes(writer.finish(varint(0) * 2, listing))
            with suppress(CheckpointError):
                read_tensorflow(tmp_path / "a")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
