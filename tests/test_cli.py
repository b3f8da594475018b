"""The command line as a user meets it: what it writes, what it says, and how it ends."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from inpaint_kernels.models import DeepFillV1
from typer.testing import CliRunner, Result

from inpaint_kernels import comparison, load_pretrained, panels
from inpaint_kernels.__main__ import main
from inpaint_kernels.cli import app
from inpaint_kernels.images import Metadata, Photo, read_photo, write_photo

HEIGHT, WIDTH = 40, 56
BOX = "20,10,12,8"
HOLE = np.zeros((HEIGHT, WIDTH), bool)
HOLE[10:18, 20:32] = True


def smooth_photo(channels: int = 3) -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    planes = [40 * c + 3 * rows % (90 + c) + columns for c in range(channels)]
    pixels = np.dstack(planes).astype(np.uint8)
    if channels == 4:
        pixels[:, :, 3] = 255
    return pixels


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with photo.png and mask.png."""
    monkeypatch.chdir(tmp_path)
    write_photo("photo.png", Photo(smooth_photo(), "PNG"))
    write_photo("mask.png", Photo(np.where(HOLE, 255, 0).astype(np.uint8), "PNG"))
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"photo.png", "mask.png"}


# --- fill ----------------------------------------------------------------------------------------------------------


def test_fill_with_a_mask_file(folder: Path) -> None:
    result = run("fill", "photo.png", "mask.png", "-o", "out.png")
    assert result.exit_code == 0, result.output
    assert "filled 96 of 2,240 pixels (4.29 %) of 56 x 40" in result.stdout
    filled = read_photo("out.png").pixels
    assert np.array_equal(filled[~HOLE], smooth_photo()[~HOLE])
    assert names(folder) == {"out.png"}


def test_all_ways_to_say_where_the_hole_is_give_the_same_picture(folder: Path) -> None:
    painted = smooth_photo()
    painted[HOLE] = 250, 4, 255
    write_photo("painted.png", Photo(painted, "PNG"))
    erased = np.dstack([smooth_photo(), np.where(HOLE, 0, 255).astype(np.uint8)])
    write_photo("erased.png", Photo(erased, "PNG"))
    inverse = np.where(HOLE, 0, 255).astype(np.uint8)
    write_photo("inverse.png", Photo(inverse, "PNG"))
    write_photo("half.png", Photo(np.where(HOLE, 255, 0).astype(np.uint8)[::2, ::2], "PNG"))
    colour = ("--mask-color", "#ff00ff", "--mask-tolerance", "10")
    ways = {
        "file": ("photo.png", "mask.png"),
        "box": ("photo.png", "--mask-box", BOX),
        "boxes": ("photo.png", "--mask-box", "20,10,6,8", "--mask-box", "26,10,6,8"),
        "painted": ("painted.png", *colour),
        "painted_copy": ("photo.png", "painted.png", *colour),
        "erased": ("erased.png", "--mask-alpha"),
        "erased_copy": ("photo.png", "erased.png", "--mask-alpha"),
        "inverse": ("photo.png", "inverse.png", "--invert-mask"),
        "resized": ("photo.png", "half.png", "--resize-mask"),
    }
    pictures = {}
    for name, arguments in ways.items():
        result = run("fill", *arguments, "-o", f"out_{name}.png")
        assert result.exit_code == 0, result.output
        pictures[name] = read_photo(f"out_{name}.png").pixels
    assert pictures["erased"].shape[2] == 4
    assert (pictures["erased"][:, :, 3] == 255).all()
    pictures["erased"] = pictures["erased"][:, :, :3]
    for name, picture in pictures.items():
        assert np.array_equal(picture, pictures["file"]), name


def test_jpeg_in_and_out_with_orientation_and_profile(folder: Path) -> None:
    from PIL import ExifTags, Image

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = Image.fromarray(smooth_photo()).transpose(Image.Transpose.ROTATE_90)
    stored.save("photo.jpg", quality=95, exif=exif, icc_profile=b"profile")
    result = run("fill", "photo.jpg", "--mask-box", BOX, "-o", "out.jpg")
    assert result.exit_code == 0, result.output
    with Image.open("out.jpg") as image:
        assert image.size == (WIDTH, HEIGHT)
        assert ExifTags.Base.Orientation not in image.getexif()
        assert image.info["icc_profile"] == b"profile"
        difference = np.abs(np.asarray(image).astype(int) - read_photo("photo.jpg").pixels)[~HOLE]
    assert difference.mean() < 2


def test_no_hole_gives_the_very_input(folder: Path) -> None:
    write_photo("black.png", Photo(np.zeros((HEIGHT, WIDTH), np.uint8), "PNG"))
    write_photo("photo.jpg", Photo(smooth_photo(), "JPEG"))
    for name in ("photo.png", "photo.jpg"):
        output = f"out{Path(name).suffix}"
        result = run("fill", name, "black.png", "-o", output)
        assert result.exit_code == 0, result.output
        assert f"no hole: {output} is the input, unchanged" in result.stdout
        assert Path(output).read_bytes() == Path(name).read_bytes()
    assert run("fill", "photo.png", "black.png", "-o", "out.tif").exit_code == 0
    assert np.array_equal(read_photo("out.tif").pixels, smooth_photo())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing.png", "mask.png"), "nothing.png: no such file"),
        (("photo.png", "nothing.png"), "nothing.png: no such file"),
        (("photo.png", "--mask-box", "0,0,56,40"), "every pixel is hole"),
        (("photo.png", "--mask-box", "100,0,5,5"), "lies outside the photo of 56 x 40 pixels"),
        (("photo.png", "--mask-alpha"), "no alpha channel"),
        (("photo.png", "small.png"), "small.png: the mask is 28 x 20 pixels, the photo 56 x 40; --resize-mask"),
        (("cut.png", "mask.png"), "cut.png: cannot be read"),
        (("nan.tif", "mask.png"), "out.png: float32 gray pixels cannot be written exactly as PNG; write TIFF"),
        (
            ("nan.tif", "mask.png", "-o", "out.tif"),
            "1 known pixels are NaN or Inf, the first is nan in row 2, column 3",
        ),
        (("photo.png", "mask.png", "-o", "no/out.png"), "no/out.png: cannot be written"),
        (("photo.png", "mask.png", "-o", "out.gif"), "expected a name that ends in .png"),
        (("photo.png", "mask.png", "-o", "photo.png", "--force"), "photo.png: is an input"),
        (("photo.png", "mask.png", "-o", "mask.png", "--force"), "mask.png: is an input"),
        (("photo.png", "mask.png", "-o", "small.png"), "small.png: exists; force (--force) replaces it"),
        (("photo.png", "mask.png", "--save-row", "out.png"), "out.png: is the output already"),
        (("photo.png", "mask.png", "--save-row", "small.png"), "small.png: exists"),
        (("photo.png", "mask.png", "--max-pixels", "100"), "too many pixels"),
        (("photo.png", "mask.png", "--panels", "output,soup"), "panels: expected names out of"),
    ],
)
def test_bad_input_ends_with_1_and_a_sentence_and_writes_nothing(
    folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    write_photo("small.png", Photo(np.zeros((HEIGHT // 2, WIDTH // 2), np.uint8), "PNG"))
    Path("cut.png").write_bytes(Path("photo.png").read_bytes()[:100])
    gray = np.zeros((HEIGHT, WIDTH), np.float32)
    gray[2, 3] = np.nan
    write_photo("nan.tif", Photo(gray, "TIFF", Metadata()))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    output = () if "-o" in arguments else ("-o", "out.png")
    result = run("fill", *arguments, *output)
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("photo.png",), "where is the hole?"),
        (("photo.png", "--mask-box", "1,2,3"), "box: expected four whole numbers"),
        (("photo.png", "--mask-color", "pink"), "colour: expected #rrggbb"),
        (("photo.png", "mask.png", "--mask-threshold", "128"), "--mask-threshold"),
        (("photo.png", "mask.png", "--mask-grow", "-1"), "--mask-grow"),
        (("photo.png", "mask.png", "--model", "magic"), "--model"),
    ],
)
def test_a_wrong_command_line_ends_with_2(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("fill", *arguments, "-o", "out.png")
    assert result.exit_code == 2, result.output
    assert message in re.sub(r"[\s│]+", " ", result.stderr)  # typer draws a box around it and breaks its lines
    assert names(folder) == set()


def test_existing_output_is_replaced_only_by_force(folder: Path) -> None:
    Path("out.png").write_bytes(b"precious")
    assert run("fill", "photo.png", "mask.png", "-o", "out.png").exit_code == 1
    assert Path("out.png").read_bytes() == b"precious"
    assert run("fill", "photo.png", "mask.png", "-o", "out.png", "--force").exit_code == 0
    assert read_photo("out.png").pixels.shape == (HEIGHT, WIDTH, 3)


def test_large_and_small_holes_are_warned_of(folder: Path) -> None:
    result = run("fill", "photo.png", "--mask-box", "0,0,56,39", "-o", "out.png")
    assert result.exit_code == 0, result.output
    assert "more than 90%" in result.stderr
    write_photo("large.png", Photo(np.zeros((120, 120), np.uint8), "PNG"))
    result = run("mask", "large.png", "--mask-box", "0,0,1,1", "-o", "mask1.png")
    assert result.exit_code == 0
    assert "less than 0.01%" in result.stderr


def test_nothing_half_written_when_filling_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("inpaint_kernels.fillers.fill_photo", fail)
    result = run("fill", "photo.png", "mask.png", "-o", "out.png")
    assert result.exit_code == 1
    assert "not enough memory" in result.stderr
    assert names(folder) == set()


# --- panels --------------------------------------------------------------------------------------------------------


def test_default_row_shows_input_mask_and_output(folder: Path) -> None:
    assert run("fill", "photo.png", "mask.png", "-o", "out.png", "--save-row", "row.png").exit_code == 0
    row = read_photo("row.png").pixels
    shown = row[-HEIGHT:]
    lefts = [i * (WIDTH + 8) for i in range(3)]
    assert row.shape[1] == lefts[-1] + WIDTH
    panel = {name: shown[:, left : left + WIDTH] for name, left in zip(panels.DEFAULT_PANELS, lefts, strict=True)}
    assert np.array_equal(panel["input"][~HOLE], smooth_photo()[~HOLE])
    assert (panel["input"][HOLE] == panels.HOLE_COLOUR).all()
    assert np.array_equal(panel["mask"], np.repeat(np.where(HOLE, 255, 0)[:, :, None], 3, 2))
    assert np.array_equal(panel["output"], read_photo("out.png").pixels)


def test_every_panel_that_exemplar_provides(folder: Path) -> None:
    chosen = "truth,input,mask,output,attention,edges"
    result = run(
        *("fill", "photo.png", "mask.png", "-o", "out.png", "--model", "exemplar"),
        *("--save-row", "row.png", "--panels", chosen, "--truth", "photo.png"),
    )
    assert result.exit_code == 0, result.output
    shown = read_photo("row.png").pixels[-HEIGHT:]
    assert shown.shape[1] == 6 * WIDTH + 5 * 8
    assert np.array_equal(shown[:, :WIDTH], smooth_photo())
    attention = shown[:, 4 * (WIDTH + 8) :][:, :WIDTH]
    assert np.array_equal(attention[~HOLE], smooth_photo()[~HOLE] // 3)
    assert len(np.unique(attention[HOLE], axis=0)) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--panels", "hog"), "panel 'hog': the method 'exemplar' does not provide it"),
        (("--panels", "truth"), "panel 'truth': it needs the undamaged photo (--truth)"),
        (("--panels", "truth", "--truth", "small.png"), "panel 'truth': expected 56 x 40 pixels, got 28 x 20"),
    ],
)
def test_a_panel_that_cannot_be_drawn_is_said_before_the_work(
    folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    write_photo("small.png", Photo(smooth_photo()[::2, ::2], "PNG"))
    result = run(
        *("fill", "photo.png", "mask.png", "-o", "out.png", "--model", "exemplar"), "--save-row", "row.png", *arguments
    )
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert names(folder) == {"small.png"}


def test_diffusion_has_no_attention_panel(folder: Path) -> None:
    arguments = ("fill", "photo.png", "mask.png", "-o", "out.png", "--save-row", "row.png", "--panels", "attention")
    result = run(*arguments, "--model", "diffusion")
    assert result.exit_code == 1
    assert "panel 'attention': the method 'diffusion' does not provide it" in result.stderr
    assert names(folder) == set()


def test_rows_of_deep_gray_and_transparent_photos(folder: Path) -> None:
    write_photo("deep.png", Photo(smooth_photo().astype(np.uint16) * 257, "PNG"))
    write_photo("gray.tif", Photo(smooth_photo()[:, :, 0].astype(np.float32) / 7, "TIFF"))
    write_photo("alpha.png", Photo(smooth_photo(4), "PNG"))
    for name in ("deep.png", "gray.tif", "alpha.png"):
        row = f"row_{Path(name).stem}.png"
        result = run("fill", name, "mask.png", "-o", f"out_{name}", "--save-row", row, "--panels", "input,output,edges")
        assert result.exit_code == 0, result.output
        assert read_photo(row).pixels.shape == (HEIGHT + 24, 3 * WIDTH + 16, 3)


# --- mask ----------------------------------------------------------------------------------------------------------


def test_mask_writes_the_mask_alone(folder: Path) -> None:
    result = run("mask", "photo.png", "--mask-box", BOX, "--mask-grow", "2", "-o", "grown.png")
    assert result.exit_code == 0, result.output
    grown = read_photo("grown.png").pixels
    assert set(np.unique(grown)) == {0, 255}
    assert grown[HOLE].all()
    assert grown[10 - 2, 25] == 255
    assert grown[10 - 3, 25] == 0
    assert grown[8, 18] == 0  # a corner is cut: the distance is Euclidean
    assert "hole: 180 of 2,240 pixels (8.04 %): grown.png" in result.stdout


def test_mask_is_not_written_as_jpeg(folder: Path) -> None:
    result = run("mask", "photo.png", "--mask-box", BOX, "-o", "mask.jpg")
    assert result.exit_code == 1
    assert "JPEG would blur the mask" in result.stderr


# --- info and bench ------------------------------------------------------------------------------------------------


def test_info_names_versions_library_devices_and_backends() -> None:
    import torch

    result = run("info")
    assert result.exit_code == 0, result.output
    for word in (torch.__version__, "Native library", "logical cores", "contextual_attention", "portable"):
        assert word in result.stdout


def test_bench_refuses_an_unknown_op_and_a_size_beyond_its_means() -> None:
    result = run("bench", "soup")
    assert result.exit_code == 2
    assert "expected one of contextual_attention" in result.stderr
    for size in ("15", "4096", "33"):
        result = run("bench", "--size", size)
        assert result.exit_code == 1
        assert f"size: expected an even number from 16 to 128, got {size}" in result.stderr


def test_bench_suite_of_an_installed_package_points_to_the_quick_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inpaint_kernels.cli.__file__", str(tmp_path / "site-packages" / "inpaint_kernels" / "cli.py"))
    result = run("bench", "--suite")
    assert result.exit_code == 1
    assert "part of a checkout" in result.stderr
    assert "inpaint-kernels bench contextual_attention" in result.stderr


def test_comparison_times_what_is_right_and_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "PROVIDERS", {"portable": "portable", "soup": "x"})
    rows = comparison.compare(comparison.Case(size=16, channels=8), rounds=1)
    portable, soup = rows
    assert portable.problem is None
    assert portable.seconds is not None
    assert portable.seconds > 0
    assert portable.difference is not None
    assert portable.difference < comparison.TOLERANCE
    assert soup.seconds is None
    assert "backend" in str(soup.problem)


def test_a_wrong_result_is_not_timed() -> None:
    expected = np.ones((2, 2))
    for wrong in (expected * 1.1, expected * np.nan):
        row = comparison._checked("x", comparison._FirstCall(wrong, 1), expected)
        assert row.wrong
        assert "at most 3e-05 is allowed" in str(row.problem)
        assert row.seconds is None
    assert not comparison._checked("x", comparison._FirstCall(expected * (1 + 1e-6), 1), expected).wrong


# --- as a program --------------------------------------------------------------------------------------------------


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=120)


def test_exit_codes_of_the_program(folder: Path) -> None:
    done = program("-m", "inpaint_kernels", "fill", "photo.png", "mask.png", "-o", "out.png")
    assert done.returncode == 0, done.stderr
    assert np.array_equal(read_photo("out.png").pixels[~HOLE], smooth_photo()[~HOLE])
    impossible = program("-m", "inpaint_kernels", "fill", "photo.png", "mask.png", "-o", "out.png")
    assert impossible.returncode == 1
    assert impossible.stderr.strip() == "error: out.png: exists; force (--force) replaces it"


@pytest.mark.parametrize("module", ["typer", "rich", "PIL", "skimage"])
def test_a_missing_extra_names_its_pip_command(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # makes importing it fail
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    package = {"PIL": "pillow", "skimage": "scikit-image"}.get(module, module)
    assert capsys.readouterr().err == f'The command line needs {package}: pip install "inpaint-kernels[cli]"\n'


def test_a_missing_extra_is_no_traceback() -> None:
    code = "import sys; sys.modules['PIL'] = None; from inpaint_kernels.__main__ import main; main()"
    result = program("-c", code)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


# --- models and convert ---------------------------------------------------------------------------------------------


def test_models_lists_each_with_its_licence() -> None:
    result = run("models")
    assert result.exit_code == 0, result.output
    for text in (
        "DeepFillV1: Yu et al.",
        "JiahuiYu/generative_inpainting",
        "CC BY-NC 4.0",
        "GuidedFace",
        "none published",
    ):
        assert text in result.stdout


def test_convert(tmp_path: Path) -> None:
    source, target = tmp_path / "gen_00430000.pt", tmp_path / "deepfill_v1.safetensors"
    torch.save({"module.netG": DeepFillV1().state_dict()}, source)
    result = run("convert", str(source), str(target), "--dialect", "official")
    assert result.exit_code == 0, result.output
    assert "DeepFillV1 (official) of daa233/generative-inpainting-pytorch" in result.stdout
    assert "CC BY-NC 4.0" in result.stdout
    assert load_pretrained(target).dialect == DeepFillV1("official").dialect
    again = run("convert", str(source), str(target))
    assert again.exit_code == 1
    assert "exists" in again.stderr
    assert run("convert", str(source), str(target), "--force").exit_code == 0


def test_convert_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_bytes(b"<html>Quota exceeded")
    result = run("convert", str(tmp_path / "page.pth"), str(tmp_path / "out.safetensors"))
    assert result.exit_code == 1
    assert "expected a checkpoint of torch, safetensors, Torch7 or TensorFlow" in result.stderr
    assert not (tmp_path / "out.safetensors").exists()
