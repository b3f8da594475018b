"""Reading photos into arrays and writing them back, through Pillow.

What a photo is here: an array ``[H, W]`` (gray), ``[H, W, 2]`` (gray and alpha), ``[H, W, 3]`` (RGB) or ``[H, W, 4]``
(RGBA), of uint8, uint16 or (gray only) float32, the way it is meant to be looked at: EXIF orientation is applied on
reading and its tag is dropped. Writing is atomic: the file appears whole, or it does not appear.
"""

from __future__ import annotations

import os
import shutil
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from inpaint_kernels import _files

READABLE = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF")
SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP"}
LARGEST_SIDE = {"JPEG": 65_500, "WEBP": 16_383}

# Everything else in a photo's EXIF block describes the old file: its orientation, its strips, a thumbnail and a maker
# note that still show what the hole removed.
_KEPT_TAGS = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.Copyright,
)
_DROPPED_EXIF_TAGS = (
    ExifTags.Base.MakerNote,
    ExifTags.Base.ExifImageWidth,
    ExifTags.Base.ExifImageHeight,
    ExifTags.IFD.Interop,
)
# EXIF orientation -> (transpose first, then flip rows, then flip columns).
_ORIENTATIONS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_DEEP_RAW_MODES = {f"{mode};16{order}" for mode in ("RGB", "RGBA") for order in "LBN"}
_pixel_limit_lock = threading.Lock()


class ImageFileError(ValueError):
    """A picture that cannot be read or written; the message names the file and says why."""


@dataclass(frozen=True)
class Metadata:
    """What a photo says about itself and keeps when it is filled."""

    exif: bytes | None = None
    icc_profile: bytes | None = None
    dpi: tuple[float, float] | None = None


@dataclass(frozen=True)
class Photo:
    """A decoded photo: its pixels, the name of its file format, its metadata, and what reading it changed."""

    pixels: NDArray[Any]
    format: str
    metadata: Metadata = Metadata()
    notes: tuple[str, ...] = ()

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Pixels per row."""
        return int(self.pixels.shape[1])


def has_alpha(pixels: NDArray[Any]) -> bool:
    """Whether the last channel of ``pixels`` is alpha: ``[H, W, 2]`` or ``[H, W, 4]``."""
    return pixels.ndim == 3 and pixels.shape[2] in (2, 4)


# --- reading -------------------------------------------------------------------------------------------------------


def read_photo(path: str | os.PathLike[str], *, max_pixels: int | None = None) -> Photo:
    """Decode the first picture of a PNG, JPEG, TIFF, WebP, BMP or GIF file.

    Palettes and 1-bit pictures are expanded to RGB or gray, 16-bit colour keeps its 16 bits.

    Args:
        path: the file.
        max_pixels: replaces Pillow's limit against decompression bombs (89 megapixels).

    Raises:
        ImageFileError: no such file, no picture, truncated, above the limit, or a kind of pixel that has no exact
            gray or RGB form (CMYK, Lab, 32-bit integers).
    """
    with _named_errors(path), _opened(path, max_pixels) as image:
        deep = _bits_per_sample(image) > 8  # asked first: what follows may decode the picture and forget how it did
        file_format = str(image.format)
        frames = int(getattr(image, "n_frames", 1))
        orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
        metadata = _kept_metadata(image)
        notes: tuple[str, ...] = ()
        if deep and image.mode in ("RGB", "RGBA"):
            pixels: NDArray[Any] = _decode_deep_colour(image, path, max_pixels)
        else:
            pixels, notes = _decode(image, path)
    if frames > 1:
        notes = (*notes, f"{path}: only the first of its {frames} frames is read")
    return Photo(_upright(pixels, orientation), file_format, metadata, notes)


@contextmanager
def _named_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever Pillow raises on a bad file into one sentence that names the file."""
    try:
        yield
    except ImageFileError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageFileError(f"{path}: too many pixels: {error}; max_pixels (--max-pixels) raises the limit") from error
    except FileNotFoundError as error:
        raise ImageFileError(f"{path}: no such file") from error
    except UnidentifiedImageError as error:
        raise ImageFileError(f"{path}: not a picture of a kind that can be read ({', '.join(READABLE)})") from error
    # Pillow's decoders raise all of these on damaged files, SyntaxError included ("broken PNG file").
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ImageFileError(f"{path}: cannot be read: {reason}") from error


@contextmanager
def _opened(path: str | os.PathLike[str], max_pixels: int | None) -> Iterator[Image.Image]:
    """Open a picture (its pixels are decoded on demand); one that Pillow only warns of as a bomb is an error."""
    with _pixel_limit_lock, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        limit = Image.MAX_IMAGE_PIXELS
        try:
            if max_pixels is not None:
                Image.MAX_IMAGE_PIXELS = max_pixels
            image = Image.open(path, formats=READABLE)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with image:
        yield image


def _decode(image: Image.Image, path: str | os.PathLike[str]) -> tuple[NDArray[Any], tuple[str, ...]]:
    """The pixels of an opened picture and remarks on what decoding them changed."""
    if image.mode == "1":
        return np.asarray(image.convert("L")), (f"{path}: 1-bit picture, read as 8-bit gray",)
    if image.mode in ("P", "PA"):
        mode = "RGBA" if image.mode == "PA" or image.has_transparency_data else "RGB"
        return np.asarray(image.convert(mode)), (f"{path}: palette picture, read as {mode}",)
    if image.mode in ("L", "RGB") and image.has_transparency_data:
        mode = "LA" if image.mode == "L" else "RGBA"
        return np.asarray(image.convert(mode)), (f"{path}: transparent colour, read as {mode}",)
    if image.mode in ("L", "LA", "RGB", "RGBA"):
        return np.asarray(image), ()
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16), ()
    if image.mode == "F":
        return np.asarray(image, dtype=np.float32), ()
    raise ImageFileError(
        f"{path}: pixels of kind {image.mode} are not supported: convert the photo to gray or RGB first"
    )


def _bits_per_sample(image: Image.Image) -> int:
    """The depth of a PNG or TIFF as its file says, before Pillow cuts colour down to 8 bits; 8 for other formats."""
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, 8)  # type: ignore[attr-defined]
        return int(max(bits) if isinstance(bits, tuple) else bits)
    return 16 if any(";16" in _raw_mode(tile.args) for tile in image.tile) else 8  # type: ignore[attr-defined]


def _raw_mode(args: Any) -> str:
    return str(args[0] if isinstance(args, tuple) else args)


def _decode_deep_colour(image: Image.Image, path: str | os.PathLike[str], max_pixels: int | None) -> NDArray[np.uint16]:
    """Decode 16-bit RGB or RGBA.

    Pillow keeps the high byte of such samples. Told that the samples have the other byte order, it keeps the low byte:
    two passes over the file give all 16 bits.
    """
    with _opened(path, max_pixels) as again:
        tiles = again.tile  # type: ignore[attr-defined]
        if not {_raw_mode(tile.args) for tile in tiles} <= _DEEP_RAW_MODES:
            raise ImageFileError(
                f"{path}: more than 8 bits per channel in a layout that cannot be read exactly; save it as 16-bit PNG"
            )
        again.tile = [_with_other_byte_order(tile) for tile in tiles]  # type: ignore[attr-defined]
        low = np.asarray(again, dtype=np.uint16)
    high = np.asarray(image, dtype=np.uint16)
    return (high << np.uint16(8)) | low


def _with_other_byte_order(tile: Any) -> Any:
    native_is_little = sys.byteorder == "little"
    other = {"L": "B", "B": "L", "N": "B" if native_is_little else "L"}
    raw_mode = _raw_mode(tile.args)
    swapped = raw_mode[:-1] + other[raw_mode[-1]]
    return tile._replace(args=(swapped, *tile.args[1:]) if isinstance(tile.args, tuple) else swapped)


def _upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Apply an EXIF orientation (1 to 8; anything else is left alone)."""
    transpose, flip_rows, flip_columns = _ORIENTATIONS.get(orientation, (False, False, False))
    if transpose:
        pixels = pixels.swapaxes(0, 1)
    if flip_rows:
        pixels = pixels[::-1]
    if flip_columns:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _kept_metadata(image: Image.Image) -> Metadata:
    source = image.getexif()
    kept = Image.Exif()
    for tag in _KEPT_TAGS:
        if tag in source:
            kept[tag] = source[tag]
    camera = {tag: value for tag, value in source.get_ifd(ExifTags.IFD.Exif).items() if tag not in _DROPPED_EXIF_TAGS}
    if camera:
        kept[ExifTags.IFD.Exif] = camera
    place = source.get_ifd(ExifTags.IFD.GPSInfo)
    if place:
        kept[ExifTags.IFD.GPSInfo] = dict(place)
    dpi = image.info.get("dpi")
    return Metadata(
        exif=kept.tobytes() if len(kept) else None,
        icc_profile=image.info.get("icc_profile") or None,
        dpi=(float(dpi[0]), float(dpi[1])) if dpi else None,
    )


# --- writing -------------------------------------------------------------------------------------------------------


def check_output(path: str | os.PathLike[str], *, force: bool, inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Find out now, before any work, whether ``path`` can be written in the end.

    Raises:
        ImageFileError: unknown suffix, no such folder, not writable, one of ``inputs``, or an existing file that only
            ``force`` may replace.
    """
    target = Path(path)
    format_of(target)
    for source in inputs:
        if target.exists() and os.path.exists(source) and os.path.samefile(target, source):
            raise ImageFileError(f"{path}: is an input; the output must be another file")
    if target.is_dir():
        raise ImageFileError(f"{path}: is a folder")
    if target.exists() and not force:
        raise ImageFileError(f"{path}: exists; force (--force) replaces it")
    probe = _files.temporary_beside(target)
    try:
        probe.open("xb").close()
    except OSError as error:
        raise ImageFileError(f"{path}: cannot be written: {error.strerror}") from error
    probe.unlink()


def format_of(path: str | os.PathLike[str]) -> str:
    """The file format that the suffix of ``path`` stands for."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ImageFileError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}, got {suffix or 'no ending'}")
    return SUFFIXES[suffix]


def check_encodable(path: str | os.PathLike[str], pixels: NDArray[Any]) -> None:
    """Raise ImageFileError if the format of ``path`` has no exact place for pixels of this kind.

    JPEG is the exception: it is lossy by nature, but it must not lose alpha or whole bits.
    """
    file_format = format_of(path)
    longest = max(pixels.shape[:2])
    if longest > LARGEST_SIDE.get(file_format, longest):
        raise ImageFileError(f"{path}: {file_format} ends at {LARGEST_SIDE[file_format]} pixels a side, got {longest}")
    if file_format == "JPEG" and has_alpha(pixels):
        raise ImageFileError(f"{path}: JPEG has no alpha channel; write PNG, TIFF or WebP")
    gray = pixels.ndim == 2
    writable = {
        "uint8": ("PNG", "JPEG", "TIFF", "WEBP"),
        "uint16": ("PNG", "TIFF") if gray else ("PNG",),
        "float32": ("TIFF",),
    }[pixels.dtype.name]
    if file_format not in writable:
        kind = f"{pixels.dtype.name} {'gray' if gray else 'colour'}"
        raise ImageFileError(f"{path}: {kind} pixels cannot be written exactly as {file_format}; write {writable[0]}")


def write_photo(path: str | os.PathLike[str], photo: Photo, *, quality: int = 95) -> None:
    """Write a photo in the format of the suffix of ``path``, atomically, replacing what is there.

    PNG, TIFF and WebP are written without loss; ``quality`` (1 to 100) is JPEG's.

    Raises:
        ImageFileError: the format cannot hold the pixels, or the file cannot be written.
    """
    check_encodable(path, photo.pixels)
    file_format = format_of(path)
    write_atomically(path, lambda stream: _encode(stream, photo, file_format, quality))


def copy_file(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Copy a file byte for byte, atomically."""

    def copy(stream: BinaryIO) -> None:
        with open(source, "rb") as original:
            shutil.copyfileobj(original, stream)

    write_atomically(path, copy)


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it there in one step; on failure leave nothing.

    Raises:
        ImageFileError: the file cannot be written.
    """
    try:
        _files.write_atomically(path, write)
    except OSError as error:
        raise ImageFileError(f"{path}: cannot be written: {error.strerror or error}") from error


def _encode(stream: BinaryIO, photo: Photo, file_format: str, quality: int) -> None:
    if photo.pixels.dtype == np.uint16 and photo.pixels.ndim == 3:
        _encode_deep_colour_png(stream, photo)
        return
    metadata = photo.metadata
    kept = {"exif": metadata.exif, "icc_profile": metadata.icc_profile, "dpi": metadata.dpi}
    options: dict[str, Any] = {name: value for name, value in kept.items() if value is not None}
    if file_format == "JPEG":
        options |= {"quality": quality, "subsampling": 0}
    elif file_format == "TIFF" and metadata.exif is None:  # Pillow fails to compress a TIFF that has camera data
        options |= {"compression": "tiff_adobe_deflate"}
    elif file_format == "WEBP":
        options |= {"lossless": True, "exact": True}
    Image.fromarray(photo.pixels).save(stream, format=file_format, **options)


def _encode_deep_colour_png(stream: BinaryIO, photo: Photo) -> None:
    """Write 16-bit RGB or RGBA as PNG, which Pillow cannot."""
    height, width, channels = photo.pixels.shape
    colour_type = {3: 2, 4: 6}[channels]
    rows = photo.pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    # Filter 2 ("up"): each row is stored as its difference to the row above, which compresses photos well.
    filtered = np.empty((height, 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = 2
    filtered[0, 1:] = rows[0]
    filtered[1:, 1:] = rows[1:] - rows[:-1]
    stream.write(b"\x89PNG\r\n\x1a\n")
    _write_chunk(stream, b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    metadata = photo.metadata
    if metadata.icc_profile:
        _write_chunk(stream, b"iCCP", b"ICC profile\0\0" + zlib.compress(metadata.icc_profile))
    if metadata.dpi:
        per_metre = [round(value / 0.0254) for value in metadata.dpi]
        _write_chunk(stream, b"pHYs", struct.pack(">IIB", *per_metre, 1))
    if metadata.exif:
        _write_chunk(stream, b"eXIf", metadata.exif.removeprefix(b"Exif\0\0"))
    _write_chunk(stream, b"IDAT", zlib.compress(filtered.data, 6))
    _write_chunk(stream, b"IEND", b"")


def _write_chunk(stream: BinaryIO, name: bytes, content: bytes) -> None:
    stream.write(struct.pack(">I", len(content)) + name + content)
    stream.write(struct.pack(">I", zlib.crc32(name + content)))
