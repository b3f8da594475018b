"""What holds for any photo, mask and option, and for any damaged file: drawn at random, the same in every run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from inpaint_kernels.models.deepfill_v1 import DeepFillV1
from PIL import Image

from inpaint_kernels import CheckpointError, inpaint, load_pretrained
from inpaint_kernels.images import ImageFileError, read_photo
from tests.model_cases import narrow, narrow_glcic, narrow_unet, seeded

MODELS = {
    "deepfill_v1": seeded(DeepFillV1(narrow("same_tf", "official"))),
    "glcic": seeded(narrow_glcic("otenim")),
    "partial_conv_unet": seeded(narrow_unet()),
}


def repeatable(examples: int) -> hypothesis.settings:
    return hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None)


SIDES = st.integers(1, 130)
ARRAYS = [(dtype, channels) for dtype in ("uint8", "uint16", "float32") for channels in (0, 1, 2, 3, 4)]


@st.composite
def photos(draw: st.DrawFn) -> np.ndarray[Any, np.dtype[Any]]:
    """An array [H, W] or [H, W, C] of a random size, dtype, memory layout and range of values."""
    height, width = draw(SIDES), draw(SIDES)
    dtype, channels = draw(st.sampled_from(ARRAYS))
    generator = np.random.default_rng(draw(st.integers(0, 2**16)))
    shape = (height, width) if channels == 0 else (height, width, channels)
    low, high = sorted((draw(st.floats(0, 1)), draw(st.floats(0, 1))))
    values = low + (high - low) * generator.random(shape)
    pixels = values.astype(dtype) if dtype == "float32" else (values * np.iinfo(dtype).max).astype(dtype)
    layout = draw(st.sampled_from(["C", "F", "reversed", "strided"]))
    if layout == "reversed":
        return pixels[::-1, ::-1]
    if layout == "strided":
        return np.repeat(pixels, 2, axis=1)[:, ::2]
    return np.asarray(pixels, order="F" if layout == "F" else "C")


@st.composite
def masks(draw: st.DrawFn, height: int, width: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """A mask with up to three rectangles, not of the whole photo."""
    mask = np.zeros((height, width), bool)
    for _ in range(draw(st.integers(0, 3))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        mask[top : top + draw(st.integers(1, 60)), left : left + draw(st.integers(1, 60))] = True
    mask[0, 0] &= not mask.all()
    return mask


@repeatable(40)
@hypothesis.given(data=st.data(), pixels=photos(), name=st.sampled_from(sorted(MODELS)))
def test_any_photo_is_filled_in_its_own_kind_and_known_pixels_stay(data, pixels, name):
    mask = data.draw(masks(*pixels.shape[:2]))
    options: dict[str, Any] = {
        "fit": data.draw(st.sampled_from(["pad", "crop", "resize"])),
        "blend": data.draw(st.sampled_from(["paste", "feather", "poisson"])),
        "region": data.draw(st.sampled_from(["hole", "full"])),
    }
    if options["fit"] != "pad":
        options["max_side"] = data.draw(st.integers(8, 130))
        options["detail"] = data.draw(st.sampled_from(["none", "residual"]))
    before = pixels.copy()
    result = inpaint(MODELS[name], pixels, mask, **options)
    for picture in (result.completed, result.output):
        assert (picture.shape, picture.dtype) == (pixels.shape, pixels.dtype)
    assert np.array_equal(pixels, before)
    assert np.array_equal(result.completed[~mask], pixels[~mask])
    if pixels.dtype.kind == "f":
        assert np.isfinite(result.completed).all()
        assert result.completed[mask].min(initial=0) >= 0
        assert result.completed[mask].max(initial=1) <= 1


@repeatable(20)
@hypothesis.given(
    data=st.data(),
    size=st.tuples(SIDES, SIDES),
    batch=st.integers(1, 3),
    dtype=st.sampled_from([torch.uint8, torch.float16, torch.float32, torch.float64]),
    channels_last=st.booleans(),
)
def test_any_tensor_is_filled_in_its_own_kind(data, size, batch, dtype, channels_last):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    image = torch.rand(batch, 3, *size, generator=generator)
    image = (image * 255).to(dtype) if dtype == torch.uint8 else image.to(dtype)
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    mask = torch.from_numpy(np.stack([data.draw(masks(*size)) for _ in range(batch)]))[:, None]
    result = inpaint(MODELS["glcic"], image, mask)
    assert (result.completed.shape, result.completed.dtype) == (image.shape, dtype)
    assert torch.equal(result.completed.masked_fill(mask, 0), image.masked_fill(mask, 0))


# Damaged files --------------------------------------------------------------------------------------------------------


def damaged(content: bytes, generator: random.Random) -> bytes:
    """The content with some bytes changed, cut out, doubled, or its end gone."""
    changed = bytearray(content)
    for _ in range(generator.randint(1, 8)):
        place = generator.randrange(len(changed))
        kind = generator.randrange(4)
        if kind == 0:
            changed[place] = generator.randrange(256)
        elif kind == 1:
            changed[place] ^= 1 << generator.randrange(8)
        elif kind == 2:
            del changed[place : place + generator.randint(1, 9)]
        else:
            changed[place:place] = changed[place : place + generator.randint(1, 9)]
        if len(changed) < 2:
            break
    return bytes(changed if generator.random() < 0.8 else changed[: generator.randrange(len(changed) + 1)])


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_checkpoints_are_refused_or_read(tmp_path: Path, kind: str):
    """Nothing but a :class:`CheckpointError`; none of them holds a model, so that reading ends in one too."""
    state = {f"layer{number}.weight": torch.arange(4.0) for number in range(4)} | {"count": torch.tensor(3)}
    path = tmp_path / "file.bin"
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3}, path, _use_new_zipfile_serialization=kind == "zip")
    content, generator = path.read_bytes(), random.Random(kind)
    for _ in range(400):
        path.write_bytes(damaged(content, generator))
        with pytest.raises(CheckpointError, match=r"file\.bin"):
            load_pretrained(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".bmp", ".gif"])
def test_damaged_pictures_are_refused_or_read(tmp_path: Path, suffix: str):
    path = tmp_path / f"picture{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    content, generator = path.read_bytes(), random.Random(suffix)
    for _ in range(200):
        path.write_bytes(damaged(content, generator))
        try:
            photo = read_photo(path, max_pixels=1 << 20)
        except ImageFileError as error:
            is_right = path.name in str(error)
        else:
            is_right = photo.pixels.ndim in (2, 3)
        assert is_right
