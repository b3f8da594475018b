"""The Triton kernels of hog: in Triton's interpreter, or on the GPU where there is one; and compiled without a GPU."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inpaint_kernels.portable.hog import Settings, feature_dtype
from inpaint_kernels.reference import hog as reference
from inpaint_kernels.triton_kernels import _launch, hog
from inpaint_kernels.triton_kernels._hog_borders import borders
from inpaint_kernels.triton_kernels._hog_launch import MOST_VALUES, ROWS_AT_ONCE, arithmetic_of, block_tile, cell_tile

pytest.importorskip("skimage")
pytest.importorskip("triton")
import triton
from skimage import data, feature

from inpaint_kernels.triton_kernels import _hog_kernels as kernels

ROOT = Path(__file__).resolve().parents[1]
COMPILER = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALLEST = 1e-6
"""What float32 sums may differ by; a gradient in another bin differs by more than 1e-4 in images of these sizes."""

pytestmark = pytest.mark.usefixtures("angles_of_the_c_library")
needs_compiler = pytest.mark.skipif(not COMPILER.is_file(), reason=f"this triton has no compiler for CUDA, {COMPILER}")


@pytest.fixture(autouse=True)
def _fused_multiply_adds(monkeypatch):
    """The interpreter of Triton 3.6 rounds the product of a fused multiply-add, which no GPU does."""
    if DEVICE == "cuda" or triton.__version__ >= "3.9":
        return
    from triton.runtime import interpreter

    def fma(self, x, y, z):
        exact = x.data.astype(np.longdouble) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)


def settings_of(
    orientations: int = 9,
    cell: tuple[int, int] = (8, 8),
    block: tuple[int, int] = (3, 3),
    norm: str = "L2-Hys",
    root: bool = False,
    cells: bool = False,
) -> Settings:
    return Settings(orientations, cell, block, norm, root, cells)


def run(images: Tensor, settings: Settings, *, picture: bool = False) -> tuple[Tensor, Tensor | None]:
    lines = reference.line_masks(settings.orientations, *settings.cell).to(DEVICE) if picture else None
    features, drawn = hog.hog(images.to(DEVICE), lines, settings)
    assert features.dtype == feature_dtype(images)
    return features.cpu(), None if drawn is None else drawn.cpu()


def by_skimage(images: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Features and pictures of every image, float64."""
    orientations, cell, block, norm, root, _ = settings
    arrays = [image.permute(1, 2, 0).numpy() for image in images]
    results = [
        feature.hog(array, orientations, cell, block, norm, True, root, feature_vector=False, channel_axis=2)
        for array in arrays
    ]
    features, pictures = (np.stack(list(column)) for column in zip(*results, strict=True))
    return torch.from_numpy(features).double(), torch.from_numpy(pictures).double()


def check(images: Tensor, settings: Settings, *, as_numpy_has_it: Tensor | None = None) -> None:
    """The features are scikit-image's."""
    features, _ = run(images, settings)
    expected, _ = by_skimage(images if as_numpy_has_it is None else as_numpy_has_it, settings)
    assert features.shape == expected.shape
    assert (features.double() - expected).abs().max() <= SMALLEST


def photo(rows: int = 17, columns: int = 37) -> Tensor:
    """[1, 3, rows, columns] uint8 of an eye and hair. The interpreter takes as long as there are rows."""
    return torch.from_numpy(data.astronaut()[104 : 104 + rows, 210 : 210 + columns]).permute(2, 0, 1)[None].contiguous()


def random_cells(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Histograms of which some are empty and some bins are."""
    cells = torch.rand(shape, dtype=torch.float64) * 100
    cells[torch.rand(shape[:3]) < 0.2] = 0
    return (cells * (torch.rand(shape) > 0.3)).to(dtype)


# ---- Against scikit-image --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16, torch.float32, torch.float64], ids=str)
def test_every_dtype(dtype, poisoned_memory):
    images = photo()
    images = images.to(dtype) / 255 if dtype in (torch.float32, torch.float64) else images.to(dtype)
    check(images, settings_of(block=(2, 2)))
    if dtype in (torch.uint8, torch.float32):
        check(images[:, :1], settings_of(block=(2, 2)))


def test_bfloat16(poisoned_memory):
    images = photo().bfloat16()
    check(images, settings_of(block=(2, 2)), as_numpy_has_it=images.float())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint16, torch.uint32, torch.int64], ids=str)
def test_other_integers(dtype):
    levels = photo(9, 33).long()
    levels = (levels > 100).long() if dtype == torch.bool else levels - 128 if dtype == torch.int8 else levels
    check(levels.to(dtype), settings_of(block=(1, 2)), as_numpy_has_it=levels.double())


def test_the_picture_is_that_of_scikit_image(poisoned_memory):
    images, settings = photo(19, 38), settings_of(block=(2, 2))
    features, picture = run(images, settings, picture=True)
    expected, expected_picture = by_skimage(images, settings)
    assert picture is not None
    assert (features.double() - expected).abs().max() <= SMALLEST
    assert (picture.double() - expected_picture).abs().max() <= SMALLEST * expected_picture.max()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_roots(dtype):
    check(photo() if dtype == torch.uint8 else photo().float() / 255, settings_of(root=True, block=(2, 3)))


@pytest.mark.parametrize("orientations", [1, 2, 3, 4, 12, 31, 37])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_numbers_of_orientations(orientations, dtype):
    images = photo(9, 70)
    check(images if dtype == torch.uint8 else images.float() / 255, settings_of(orientations, block=(1, 2)))


@pytest.mark.parametrize(
    ("cell", "block", "size"),
    [
        ((6, 7), (2, 1), (15, 37)),
        ((5, 20), (2, 2), (13, 45)),
        ((2, 2), (4, 3), (9, 54)),
        ((20, 3), (1, 9), (21, 54)),
        ((1, 1), (2, 2), (4, 9)),
        ((4, 150), (2, 1), (9, 301)),  # wider than a program
    ],
)
def test_shapes_of_cells_and_blocks(cell, block, size, poisoned_memory):
    images, settings = photo(*size), settings_of(6, cell=cell, block=block)
    features, _ = run(images, settings)
    expected, _ = by_skimage(images, settings)
    assert (features.double() - expected).abs().max() <= SMALLEST


@pytest.mark.parametrize("levels", [2, 4])
@pytest.mark.parametrize("orientations", [4, 8, 9])
def test_ties_of_few_levels(orientations, levels):
    """Gradients at 45 and 90 degrees, and channels that tie, everywhere."""
    images = torch.randint(0, levels, (1, 3, 8, 130), dtype=torch.uint8)
    check(images, settings_of(orientations, block=(1, 2)))
    check(images.float() / 3, settings_of(orientations, block=(1, 2)))


def test_channels_that_nearly_tie():
    """Gray pixels over 255 at three brightnesses: their differences are equal but for rounding."""
    gray = torch.randint(0, 80, (1, 1, 8, 130))
    images = ((gray + torch.tensor([0, 60, 130]).view(1, 3, 1, 1)).double() / 255).float()
    check(images, settings_of(block=(1, 2)))
    check(images.flip(1), settings_of(8, block=(1, 2)))


@pytest.mark.parametrize("levels", [(0, 2, 8, 18, 32, 50, 98), (0, 3, 12, 27, 48, 75, 1, 4)])
@pytest.mark.parametrize("orientations", [6, 8])
def test_roots_that_nearly_tie(levels, orientations):
    """Differences of such roots are multiples of one root but for rounding: gradients at 30 and 45 degrees."""
    images = torch.tensor(levels, dtype=torch.uint8)[torch.randint(0, len(levels), (1, 1, 8, 130))]
    check(images, settings_of(orientations, root=True, block=(1, 2)))


# ---- From cells ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["L1", "L1-sqrt", "L2", "L2-Hys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks(norm, dtype, poisoned_memory):
    for block, shape in (
        ((3, 3), (2, 4, 13, 9)),
        ((2, 1), (1, 3, 21, 4)),
        ((1, 1), (1, 2, 3, 1)),
        ((4, 5), (1, 6, 7, 33)),
    ):
        settings = settings_of(shape[3], block=block, norm=norm)
        cells = random_cells(*shape, dtype=dtype)
        expected = reference.normalised_blocks(cells.double(), block, norm)
        blocks = torch.empty(expected.shape, dtype=dtype, device=DEVICE)
        kernels.fill_blocks(cells.to(DEVICE), blocks, settings).run()
        assert (blocks.cpu().double() - expected).abs().max() <= (SMALLEST if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pictures(dtype, poisoned_memory):
    for cell, size, orientations in (((8, 8), (17, 43), 9), ((5, 3), (11, 16), 4), ((2, 150), (7, 310), 3)):
        settings = settings_of(orientations, cell=cell)
        cells = random_cells(2, size[0] // cell[0], size[1] // cell[1], orientations, dtype=dtype)
        picture = torch.empty(2, *size, dtype=dtype, device=DEVICE)
        kernels.draw(cells.to(DEVICE), reference.line_masks(orientations, *cell).to(DEVICE), picture, settings).run()
        expected = reference.draw(cells.double(), cell, size)
        assert (picture.cpu().double() - expected).abs().max() <= SMALLEST * expected.max()


def test_constant_images_have_no_features():
    features, picture = run(torch.full((1, 3, 24, 24), 7, dtype=torch.uint8), settings_of(), picture=True)
    assert picture is not None
    assert not features.any()
    assert not picture.any()


# ---- Layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_strides(dtype):
    images = photo(10, 14).to(dtype).repeat(2, 1, 1, 1)
    images[1] = images[1].flip(1, 2)
    settings = settings_of(4, cell=(4, 3), block=(1, 1))
    channels_last = images.to(DEVICE).contiguous(memory_format=torch.channels_last)
    for view in (channels_last, images[:, :, ::2, 1::2], images[:1].transpose(2, 3), images[:1].expand(2, -1, -1, -1)):
        assert not view.is_contiguous()
        assert torch.equal(run(view, settings)[0], run(view.contiguous(), settings)[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_many_channels_and_offsets_of_64_bits(dtype, monkeypatch, poisoned_memory):
    """Channels beyond MOST_UNROLLED_CHANNELS are in a loop."""
    images = torch.randint(0, 256, (2, 6, 7, 13)).to(dtype)
    settings = settings_of(5, cell=(3, 6), block=(2, 1))
    expected = run(images, settings, picture=True)
    assert (expected[0].double() - by_skimage(images, settings)[0]).abs().max() <= SMALLEST
    monkeypatch.setattr(_launch, "_LARGEST_INT32_TENSOR", 0)
    wide = run(images, settings, picture=True)
    assert torch.equal(wide[0], expected[0])
    assert torch.equal(wide[1], expected[1])  # type: ignore[arg-type]


def test_an_image_that_reaches_far_in_memory_needs_64_bits():
    assert _launch.needs_int64(torch.empty_strided((2, 3), (2**31, 1), device="meta"))
    assert not _launch.needs_int64(torch.empty(2**20, 4, device="meta").expand(2**20, 4), None)
    assert not _launch.needs_int64(torch.empty(0, 2**33, device="meta"))


def test_cells_and_empty_batches(poisoned_memory):
    images, settings = photo(), settings_of(cells=True)
    expected = reference.hog(images, *settings, False)[0]
    features, _ = run(images, settings)
    assert features.shape == expected.shape == (1, 2, 4, 9)
    assert (features.double() - expected).abs().max() <= SMALLEST * expected.max()
    empty, picture = run(images[:0], settings_of(block=(2, 2)), picture=True)
    assert empty.shape == (0, 1, 3, 2, 2, 9)
    assert picture is not None
    assert picture.shape == (0, 17, 37)


def test_two_runs_give_the_same_bits():
    images, settings = torch.rand(1, 3, 8, 70), settings_of(block=(1, 2))
    assert torch.equal(run(images, settings)[0], run(images, settings)[0])


# ---- Borders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientations", [2, 4, 6, 8, 9, 12, 31, 180])
def test_borders_are_exact(orientations):
    for single in (True, False):
        table = borders(orientations, single)
        assert len(table) == (orientations - 1) // 2
        for number, border in enumerate(table, 1):
            cosine, sine = (
                Fraction(high) + Fraction(low)
                for high, low in ((border.cosine, border.cosine_low), (border.sine, border.sine_low))
            )
            digits = Fraction(1, 2**46 if single else 2**104)
            assert abs(cosine**2 + sine**2 - 1) < digits
            assert abs(float(cosine) - np.cos(np.pi * number / orientations)) < 1e-13 if single else 3e-16
            assert (border.cosine == border.sine) == (4 * number == orientations)
            if 4 * number == orientations:
                assert border.cosine_low == border.sine_low


@pytest.mark.parametrize("orientations", [4, 6, 8, 12])
def test_near_ties_are_rounded_as_scikit_image_does(orientations):
    """All pairs of differences of two roots that are equal but for rounding, in every quadrant."""
    roots = np.sqrt(np.arange(256.0))
    differences = np.unique(np.abs(roots[:, None] - roots))[1:]
    pairs = [(x, y) for step in (1, 2, 3) for x, y in zip(differences, differences[step:], strict=False)]
    near = [(x, y) for x, y in pairs if y - x <= 1e-13 * y]
    near += [(y, x) for x, y in near]
    assert len(near) > 150
    for x, y in near:
        for down, right in ((y, x), (y, -x), (-y, x), (-y, -x)):
            angle = np.rad2deg(np.arctan2(down, right)) % 180
            expected = sum(angle >= 180.0 / orientations * number for number in range(1, orientations))
            assert passed_borders(down, right, orientations) == expected, (down, right)


def passed_borders(down: float, right: float, orientations: int) -> int:
    """What the kernel's comparisons in float64 amount to, in exact numbers."""
    turned = down < 0
    up, across = Fraction(abs(down)), Fraction(-right if turned else right)
    length = Fraction(float(np.hypot(down, right)))
    passed = int(across <= 0) if orientations % 2 == 0 else 0
    for border in borders(orientations, single=False):
        along = up * (Fraction(border.cosine) + Fraction(border.cosine_low))
        beside = across * (Fraction(border.sine) + Fraction(border.sine_low))
        passed += along - beside >= -length * Fraction(border.early_turned if turned else border.early)
        mirrored = border.early_mirrored_turned if turned else border.early_mirrored
        passed += along + beside <= length * Fraction(mirrored)
    return passed


# ---- Launches --------------------------------------------------------------------------------------------------------


def test_multiply_adds_are_not_fused():
    images, settings = photo(), settings_of()
    cells = torch.empty(1, 5, 6, 9)
    launch = kernels.fill_cells(images, cells, settings, "int32")
    assert launch.keywords["enable_fp_fusion"] is False
    assert _launch.Launch(None, (1,), {}, {}, {}).keywords["enable_fp_fusion"] is True


def test_arithmetic_follows_scikit_image_or_is_exact():
    expected = {torch.uint8: "int32", torch.int16: "float64", torch.float16: "float32", torch.float64: "float64"}
    for dtype, arithmetic in expected.items():
        assert arithmetic_of(torch.empty(0, dtype=dtype), False) == arithmetic
    assert arithmetic_of(torch.empty(0, dtype=torch.uint8), True) == "float64"
    assert arithmetic_of(torch.empty(0, dtype=torch.bfloat16), True) == "float32"


def test_tiles():
    assert cell_tile((8, 8), 250) == (16, 8, 4)
    assert cell_tile((8, 8), 3) == (4, 8, 1)
    assert cell_tile((6, 7), 250) == (16, 8, 4)
    assert cell_tile((4, 300), 2) == (1, 128, 4)
    assert cell_tile((1, 1), 1) == (1, 1, 1)
    assert block_tile(settings_of()) == (8, 128, 1)
    assert block_tile(settings_of(32, block=(16, 16))) == (1, 8192, 8)


def test_blocks_that_are_too_large_are_a_reason():
    assert hog.reasons(settings_of()) == []
    assert hog.reasons(settings_of(MOST_VALUES, block=(1, 1))) == []
    large = settings_of(MOST_VALUES // 9 + 1)
    assert hog.reasons(large) == [f"a block has {9 * large.orientations} values, the kernels take 32768 at most"]
    assert hog.reasons(large._replace(cells=True)) == []


# ---- Machine code ----------------------------------------------------------------------------------------------------


def usages(which: str, cache: Path) -> list[dict[str, Any]]:
    """From a process that does not interpret kernels and starts with an empty cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.triton_compilation", which]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def violations(usage: dict[str, Any]) -> list[str]:
    name = f"{usage['case']} on {usage['architecture']}"
    found = [f"{name} spills"] if usage["spills"] > 0 else []
    # Triton 3.6 lets the values of blocks in float64 change their threads.
    most = 4096 if usage["precision"] == "float64" else 1024
    found += [f"{name} takes {usage['shared']} bytes of shared memory"] if usage["shared"] > most else []
    found += [f"{name} multiplies matrices"] if usage["products"] else []
    return found


def fused(usage: dict[str, Any]) -> int | None:
    """Multiply-adds of the source, where no division or root brings its own: 4 of a length, 6 of a border, per row."""
    if usage["kernel"] != "hog_cells_kernel":
        return 0 if usage["precision"] != "float64" else None
    return ROWS_AT_ONCE * (3 * 4 + 4 * 6) if usage["precision"] == "float32" else None


def bits(value: float) -> str:
    """Of a float64, as PTX writes them."""
    return struct.pack(">d", value).hex().upper()


@needs_compiler
def test_one_of_every_kernel_compiles_within_the_limits(tmp_path):
    found = usages("hog-quick", tmp_path)
    assert {usage["kernel"] for usage in found} == {"hog_cells_kernel", "hog_blocks_kernel", "hog_picture_kernel"}
    assert {usage["architecture"] for usage in found} == {"sm_80", "sm_90"}
    assert [violation for usage in found for violation in violations(usage)] == []
    assert [usage["fused"] for usage in found] == [
        usage["fused"] if fused(usage) is None else fused(usage) for usage in found
    ]
    assert max(usage["registers"] for usage in found if usage["precision"] != "float64") <= 80
    cells, blocks = ({*usage["constants"]} for usage in found if usage["precision"] == "float64")
    early = [radians for border in borders(9, False) for radians in border[4:] if radians != 0]
    assert all({bits(radians), bits(-radians)} & cells for radians in early)
    assert bits(0.2) in blocks


@needs_compiler
@pytest.mark.slow
def test_every_kind_of_call_compiles_within_the_limits(tmp_path):
    found = usages("hog", tmp_path)
    assert len(found) >= 72
    assert {usage["precision"] for usage in found} >= {"uint8", "bfloat16", "float16", "float32", "float64", "int32"}
    assert [violation for usage in found for violation in violations(usage)] == []


@needs_compiler
def test_planted_fusions_are_found(tmp_path):
    (usage,) = usages("hog-planted", tmp_path)
    assert usage["fused"] > fused(usage)


def test_nothing_needs_triton_before_a_kernel_runs(tmp_path):
    code = """
import sys
sys.modules["triton"] = None
import inpaint_kernels
from inpaint_kernels.portable.hog import Settings
from inpaint_kernels.triton_kernels import hog
assert hog.reasons(Settings(9, (8, 8), (3, 3), "L2", False, False)) == []
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
