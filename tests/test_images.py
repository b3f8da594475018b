"""Reading and writing photos: exactness, orientation, metadata, limits, damaged files, atomic output."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from inpaint_kernels import _files, images
from inpaint_kernels._files import OutputError
from inpaint_kernels.images import ImageFileError, Metadata, Photo, read_photo, write_photo

RNG = np.random.default_rng(0)


def random_pixels(shape: tuple[int, ...], dtype: str = "uint8") -> np.ndarray:
    if dtype == "float32":
        return RNG.normal(size=shape).astype(np.float32)
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".webp"])
@pytest.mark.parametrize("shape", [(13, 17, 3), (13, 17, 4)])
def test_lossless_formats_keep_8_bit_colour(tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
    pixels = random_pixels(shape)
    write_photo(tmp_path / f"a{suffix}", Photo(pixels, "PNG"))
    assert np.array_equal(read_photo(tmp_path / f"a{suffix}").pixels, pixels)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(("shape", "dtype"), [((9, 7), "uint8"), ((9, 7, 2), "uint8"), ((9, 7), "uint16")])
def test_gray_keeps_its_depth_and_alpha(tmp_path: Path, suffix: str, shape: tuple[int, ...], dtype: str) -> None:
    pixels = random_pixels(shape, dtype)
    write_photo(tmp_path / f"a{suffix}", Photo(pixels, "PNG"))
    read = read_photo(tmp_path / f"a{suffix}").pixels
    assert read.dtype == pixels.dtype
    assert np.array_equal(read, pixels)


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colour_png_keeps_all_bits_and_metadata(tmp_path: Path, channels: int) -> None:
    pixels = random_pixels((31, 45, channels), "uint16")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    write_photo(tmp_path / "a.png", Photo(pixels, "PNG", Metadata(icc_profile=profile, dpi=(300.0, 300.0))))
    read = read_photo(tmp_path / "a.png")
    assert read.pixels.dtype == np.uint16
    assert np.array_equal(read.pixels, pixels)
    assert read.metadata.icc_profile == profile
    assert read.metadata.dpi == pytest.approx((300, 300), abs=0.1)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_16_bit_colour_tiff_is_read_whole(tmp_path: Path, compression: str | None, byteorder: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = random_pixels((31, 45, 3), "uint16")
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", compression=compression, byteorder=byteorder)
    assert np.array_equal(read_photo(tmp_path / "a.tif").pixels, pixels)


def test_16_bit_tiff_in_planes_is_refused_rather_than_cut_to_8_bits(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    planes = random_pixels((3, 31, 45), "uint16")
    tifffile.imwrite(tmp_path / "a.tif", planes, photometric="rgb", planarconfig="separate")
    with pytest.raises(ImageFileError, match=r"a.tif: more than 8 bits per channel"):
        read_photo(tmp_path / "a.tif")


def test_float_tiff_round_trip(tmp_path: Path) -> None:
    pixels = random_pixels((9, 7), "float32")
    write_photo(tmp_path / "a.tif", Photo(pixels, "TIFF"))
    assert np.array_equal(read_photo(tmp_path / "a.tif").pixels, pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_pillow_applies_it_and_dropped(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(random_pixels((5, 8, 3))).save(tmp_path / "a.png", exif=exif)
    photo = read_photo(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(photo.pixels, np.asarray(ImageOps.exif_transpose(image)))
    write_photo(tmp_path / "b.png", photo)
    with Image.open(tmp_path / "b.png") as image:
        assert ExifTags.Base.Orientation not in image.getexif()
        assert np.array_equal(np.asarray(image), photo.pixels)


def test_camera_data_are_kept_and_those_of_the_old_file_are_not(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Maker"
    exif[ExifTags.Base.Copyright] = "Somebody"
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.FNumber: 2.8, ExifTags.Base.MakerNote: b"thumbnail inside"}
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: "N"}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(random_pixels((8, 8, 3))).save(tmp_path / "a.jpg", exif=exif, icc_profile=profile, dpi=(72, 72))
    for name in ("b.jpg", "b.png", "b.tif", "b.webp"):
        write_photo(tmp_path / name, read_photo(tmp_path / "a.jpg"))
        with Image.open(tmp_path / name) as image:
            kept = image.getexif()
            assert kept[ExifTags.Base.Make] == "Maker", name
            assert kept[ExifTags.Base.Copyright] == "Somebody", name
            assert kept.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.FNumber] == pytest.approx(2.8), name
            assert ExifTags.Base.MakerNote not in kept.get_ifd(ExifTags.IFD.Exif), name
            assert kept.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N", name
            assert image.info["icc_profile"] == profile, name


def test_palette_1_bit_and_transparent_colour_are_expanded(tmp_path: Path) -> None:
    colours = random_pixels((8, 8, 3)) // 128 * 128
    image = Image.fromarray(colours).quantize(16)
    image.save(tmp_path / "p.png")
    photo = read_photo(tmp_path / "p.png")
    assert np.array_equal(photo.pixels, np.asarray(image.convert("RGB")))
    assert "palette" in photo.notes[0]
    image.save(tmp_path / "t.png", transparency=0)
    assert read_photo(tmp_path / "t.png").pixels.shape == (8, 8, 4)
    Image.fromarray(colours[:, :, 0] > 0).save(tmp_path / "1.png")
    assert np.array_equal(read_photo(tmp_path / "1.png").pixels, np.where(colours[:, :, 0] > 0, 255, 0))
    Image.fromarray(colours[:, :, 0]).save(tmp_path / "l.png", transparency=128)
    assert np.array_equal(read_photo(tmp_path / "l.png").pixels[:, :, 1] == 0, colours[:, :, 0] == 128)


def test_only_the_first_frame_is_read_and_that_is_said(tmp_path: Path) -> None:
    frames = [Image.fromarray(random_pixels((6, 6, 3))) for _ in range(3)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    photo = read_photo(tmp_path / "a.tif")
    assert np.array_equal(photo.pixels, np.asarray(frames[0]))
    assert "first of its 3 frames" in photo.notes[0]


@pytest.mark.parametrize("mode", ["CMYK", "I"])
def test_pixels_without_an_exact_form_are_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "a.tif")
    with pytest.raises(ImageFileError, match=f"pixels of kind {mode} are not supported"):
        read_photo(tmp_path / "a.tif")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_every_truncation_is_an_error_with_the_file_name(tmp_path: Path, suffix: str) -> None:
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    write_photo(whole, Photo(random_pixels((40, 40, 3)), "PNG"))
    content = whole.read_bytes()
    for share in (0.0, 0.01, 0.1, 0.5, 0.9):
        cut.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ImageFileError, match=f"cut{suffix}: "):
            read_photo(cut)


def test_text_no_file_and_folder_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ImageFileError, match=r"a.png: not a picture of a kind that can be read"):
        read_photo(tmp_path / "a.png")
    with pytest.raises(ImageFileError, match=r"b.png: no such file"):
        read_photo(tmp_path / "b.png")
    with pytest.raises(ImageFileError, match="cannot be read"):
        read_photo(tmp_path)


def test_pixel_limit_is_pillows_until_it_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photo(tmp_path / "a.png", Photo(random_pixels((10, 10)), "PNG"))
    for limit in (99, 49):  # Pillow would warn above 1x its limit and raise above 2x
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ImageFileError, match=r"too many pixels.*max_pixels"):
            read_photo(tmp_path / "a.png")
        assert read_photo(tmp_path / "a.png", max_pixels=100).pixels.shape == (10, 10)
        assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        ("a.jpg", (4, 4, 4), "uint8", "JPEG has no alpha channel"),
        ("a.jpg", (4, 4), "uint16", "uint16 gray pixels cannot be written exactly as JPEG"),
        ("a.webp", (4, 4, 3), "uint16", "uint16 colour pixels cannot be written exactly as WEBP; write PNG"),
        ("a.tif", (4, 4, 3), "uint16", "cannot be written exactly as TIFF; write PNG"),
        ("a.png", (4, 4), "float32", "cannot be written exactly as PNG; write TIFF"),
        ("a.webp", (1, 16384, 3), "uint8", "WEBP ends at 16383 pixels a side, got 16384"),
        ("a.gif", (4, 4), "uint8", "expected a name that ends in .png"),
        ("a", (4, 4), "uint8", "got no ending"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], dtype: str, message: str
) -> None:
    with pytest.raises(ImageFileError, match=message):
        write_photo(tmp_path / name, Photo(np.zeros(shape, dtype), "PNG"))
    assert not list(tmp_path.iterdir())


def test_output_checks(tmp_path: Path) -> None:
    existing, link = tmp_path / "a.png", tmp_path / "link.png"
    write_photo(existing, Photo(random_pixels((4, 4)), "PNG"))
    link.symlink_to(existing)
    with pytest.raises(OutputError, match=r"a.png: exists; force"):
        images.check_output(existing, force=False)
    images.check_output(existing, force=True)
    for name in (existing, link):
        with pytest.raises(OutputError, match="is an input"):
            images.check_output(name, force=True, inputs=[existing])
    with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
        images.check_output(tmp_path / "no" / "b.png", force=False)
    with pytest.raises(OutputError, match="cannot be written: Not a directory"):
        images.check_output(existing / "b.png", force=False)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        images.check_output(tmp_path / "folder.png", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "folder.png", "link.png"]


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs a folder that not even root can write to: /proc"
)
def test_unwritable_folder_is_found_before_the_work() -> None:
    with pytest.raises(OutputError, match=r"out.png: cannot be written: "):
        images.check_output("/proc/self/out.png", force=False)


def test_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.png"
    target.write_bytes(b"old")

    def fail(stream: object) -> None:
        stream.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"a.png: cannot be written: No space left on device"):
        _files.write_atomically(target, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert target.read_bytes() == b"old"


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_new_files_have_the_ordinary_mode(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_photo(tmp_path / "a.png", Photo(random_pixels((4, 4)), "PNG"))
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_output_through_a_link_replaces_what_the_link_points_to(tmp_path: Path) -> None:
    target, link = tmp_path / "a.png", tmp_path / "link.png"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_photo(link, Photo(random_pixels((4, 4)), "PNG"))
    assert link.is_symlink()
    assert read_photo(target).pixels.shape == (4, 4)


def test_damaged_png_data_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_photo(path, Photo(random_pixels((40, 40, 3)), "PNG"))
    content = bytearray(path.read_bytes())
    start = content.index(b"IDAT") + 200
    content[start : start + 50] = bytes(50)
    path.write_bytes(content)
    with pytest.raises(ImageFileError, match=r"a.png: cannot be read"):
        read_photo(path)
