"""``fill`` with learned models, of whole folders, and side by side: what is written, said and counted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from inpaint_kernels.models import DeepFillV2, EdgeConnect
from inpaint_kernels.models.glcic import GLCIC
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from inpaint_kernels import fillers, filling, metrics, panels
from inpaint_kernels.cli import app
from inpaint_kernels.images import Photo, read_photo, write_photo
from inpaint_kernels.photo import FilledPhoto
from tests.model_cases import seeded
from tests.two_processes import run_two

HEIGHT, WIDTH = 40, 56
HOLE = np.zeros((HEIGHT, WIDTH), bool)
HOLE[10:18, 20:32] = True


def pixels(shift: int = 0) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.dstack([(40 * c + 3 * rows + columns + shift) % 250 for c in range(3)]).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with photos/a.png, b.png, in/c.png, and masks of the same names."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a.png", "b.png", "in/c.png")):
        for kind, content in (("photos", pixels(number)), ("masks", np.where(HOLE, 255, 0).astype(np.uint8))):
            path = tmp_path / kind / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_photo(path, Photo(content, "PNG"))
    write_photo("photo.png", Photo(pixels(), "PNG"))
    write_photo("mask.png", Photo(np.where(HOLE, 255, 0).astype(np.uint8), "PNG"))
    return tmp_path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights: glcic.pth, and EdgeConnect's two files."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(seeded(GLCIC("otenim")).state_dict(), folder / "glcic.pth")
    model = seeded(EdgeConnect(residual_blocks=1))
    torch.save({"generator": model.edge_generator.state_dict()}, folder / "EdgeModel_gen.pth")
    torch.save({"generator": model.inpaint_generator.state_dict()}, folder / "InpaintingModel_gen.pth")
    return folder


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fill(*arguments: str | Path) -> Result:
    result = run("fill", *arguments)
    assert result.exit_code == 0, result.output
    return result


# Learned models -------------------------------------------------------------------------------------------------------


def test_weights_say_which_model_fills(folder, weights):
    result = fill("photo.png", "mask.png", "-o", "out.png", "--weights", weights / "glcic.pth")
    assert "by GLCIC in" in result.stdout
    assert "licence: MIT" in result.stderr
    filled = read_photo("out.png").pixels
    assert np.array_equal(filled[~HOLE], pixels()[~HOLE])
    assert not np.array_equal(filled[HOLE], pixels()[HOLE])


@pytest.mark.parametrize("content", ["gray", "alpha", "deep", "float"])
def test_every_kind_of_photo_keeps_its_kind(folder, weights, content):
    photo = {
        "gray": pixels()[:, :, 0],
        "alpha": np.dstack([pixels(), np.full((HEIGHT, WIDTH), 255, np.uint8)]),
        "deep": pixels().astype(np.uint16) * 257,
        "float": pixels()[:, :, 0].astype(np.float32) - 40,
    }[content]
    name = "in.tif" if content == "float" else "in.png"
    write_photo(name, Photo(photo, "PNG"))
    fill(name, "mask.png", "-o", f"out{Path(name).suffix}", "--weights", weights / "glcic.pth")
    filled = read_photo(f"out{Path(name).suffix}").pixels
    assert filled.dtype == photo.dtype
    assert np.array_equal(filled[~HOLE], photo[~HOLE])
    assert not np.array_equal(filled[HOLE], photo[HOLE])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "glcic"), "weights: expected one file for each of 1 models, got 0; inpaint-kernels models lists"),
        (("--model", "exemplar", "--weights", "glcic.pth"), "expected one file for each of 0 models, got 1"),
        (("--model", "csa", "--weights", "glcic.pth"), "glcic.pth holds glcic, expected csa"),
        (("--weights", "nothing.pth"), "nothing.pth: no such file"),
        (("--weights", "glcic.pth", "--guide", "mask.png"), "guide: glcic takes no lines"),
        (("--weights", "glcic.pth", "--sigma", "1"), "sigma: glcic is not guided by edges"),
        (("--weights", "glcic.pth", "--fit", "resize"), "max_side: expected a number of pixels"),
        (("--weights", "glcic.pth", "--memory", "1MiB"), "memory: expected at least"),
        (("--weights", "glcic.pth", "--memory", "much"), "memory: expected"),
        (("--model", "exemplar,diffusion"), "give --save-sheet FILE"),
    ],
)
def test_wrong_combinations_are_said_in_a_sentence(folder, weights, arguments, message):
    shutil.copy(weights / "glcic.pth", folder)
    result = run("fill", "photo.png", "mask.png", "-o", "out.png", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr.replace("\n", " ")
    assert not Path("out.png").exists()


def test_a_reduced_photo_with_its_detail(folder, weights):
    options = ("--weights", weights / "glcic.pth", "--fit", "resize", "--max-side", "28")
    fill("photo.png", "mask.png", "-o", "plain.png", *options)
    fill("photo.png", "mask.png", "-o", "detail.png", "--detail", "residual", *options)
    assert not np.array_equal(read_photo("plain.png").pixels, read_photo("detail.png").pixels)


def test_edges_are_drawn_or_taken_from_another_picture(folder, weights):
    drawing = np.zeros((HEIGHT, WIDTH), np.uint8)
    drawing[14, :] = 255
    write_photo("lines.png", Photo(drawing, "PNG"))
    other = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    other[:, 28:] = 255
    write_photo("other.png", Photo(other, "PNG"))
    results = []
    for number, options in enumerate(
        [(), ("--guide", "lines.png"), ("--edges-from", "other.png"), ("--edges-from", "other.png", "--sigma", "0.5")]
    ):
        row = f"row{number}.png"
        shown = ("--save-row", row, "--panels", "edges,output")
        fill("photo.png", "mask.png", "-o", f"out{number}.png", "--weights", weights, *options, *shown)
        results.append(read_photo(f"out{number}.png").pixels)
    assert not np.array_equal(results[0], results[1])
    assert not np.array_equal(results[1], results[2])
    wrong = run("fill", "photo.png", "mask.png", "-o", "x.png", "--weights", weights, "--edges-from", "row0.png")
    assert wrong.exit_code == 1
    assert "edges-from: expected a picture of 56 x 40 pixels" in wrong.stderr


def test_a_guided_network_takes_a_sketch():
    model = DeepFillV2(guided=True)
    guide = fillers.Guide(drawing=HOLE)
    fillers._check_guide(model, guide)
    sketch = fillers._guidance(model, guide, HOLE.shape)["sketch"]
    assert torch.equal(sketch[0, 0] > 0, torch.from_numpy(HOLE))
    assert not fillers._guidance(model, fillers.Guide(), HOLE.shape)["sketch"].any()


# Side by side ---------------------------------------------------------------------------------------------------------


def test_a_sheet_of_methods_and_models_with_what_they_differ(folder, weights):
    names = "exemplar,diffusion,glcic"
    options = ("--model", names, "--weights", weights / "glcic.pth", "--save-sheet", "sheet.png")
    result = fill("photo.png", "mask.png", "-o", "out.png", "--truth", "photo.png", *options)
    assert f"sheet {names.replace(',', ', ')}: sheet.png" in result.stdout
    assert read_photo("sheet.png").width > 4 * WIDTH
    assert "by exemplar in" in result.stdout  # the first one is written


def test_a_sheet_of_sigmas(folder, weights):
    options = ("--weights", weights, "--sigma", "0.5,1,2", "--save-sheet", "sheet.png")
    result = fill("photo.png", "mask.png", "-o", "out.png", *options)
    assert "sheet edge_connect, sigma 0.5, edge_connect, sigma 1, edge_connect, sigma 2" in result.stdout
    assert run("fill", "photo.png", "mask.png", "-o", "y.png", "--sigma", "a,b").exit_code == 2


def test_captions_have_room():
    narrow = np.zeros((64, 10, 3), np.uint8)
    sheet = panels.draw_sheet([("one", narrow), ("a caption\nof two lines that is wide", narrow)])
    assert sheet.shape[0] == 64 + 2 * 24
    assert sheet.shape[1] > 10 + 8 + 100


# Folders --------------------------------------------------------------------------------------------------------------


def test_a_folder_with_masks_of_the_same_names(folder):
    result = fill("photos", "masks", "-o", "out", "--model", "diffusion")
    assert "2 filled" in result.stdout
    assert sorted(path.name for path in Path("out").rglob("*.png")) == ["a.png", "b.png"]
    for number, name in enumerate(("a.png", "b.png")):
        filled = read_photo(f"out/{name}").pixels
        assert np.array_equal(filled[~HOLE], pixels(number)[~HOLE])
    result = fill("photos", "masks", "-o", "out", "-r", "--skip-existing", "--model", "diffusion")
    assert "1 filled, 2 skipped" in result.stdout
    assert Path("out/in/c.png").exists()


def test_a_pattern_with_one_mask_for_all_and_another_format(folder):
    fill("photos/[ab].png", "mask.png", "-o", "out", "--format", "tiff", "--model", "diffusion")
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.tif", "b.tif"]


def test_masks_may_have_their_own_ending(folder):
    Path("masks/a.png").rename("masks/a_mask.png")
    assert "2 filled" in fill("photos", "masks", "-o", "out", "--model", "diffusion").stdout


def test_a_failure_stops_no_other_and_is_listed_at_the_end(folder):
    Path("photos/a.png").write_bytes(Path("photos/a.png").read_bytes()[:50])
    result = run("fill", "photos", "masks", "-o", "out", "--model", "diffusion", "-r")
    assert result.exit_code == 1
    assert "2 filled, 1 failed" in result.stdout
    assert "failed: photos/a.png: " in result.stderr
    assert not Path("out/a.png").exists()
    assert Path("out/b.png").exists()
    again = run("fill", "photos", "masks", "-o", "out", "--model", "diffusion", "-r")
    assert again.exit_code == 1
    assert "out/b.png: exists" in again.stderr


def test_a_batch_is_its_photos(folder, weights):
    for name, batch in (("one", "1"), ("three", "3")):
        options = ("--weights", weights / "glcic.pth", "--batch", batch)
        assert "3 filled" in fill("photos", "masks", "-o", name, "-r", *options).stdout
    for name in ("a.png", "b.png", "in/c.png"):
        one, three = (read_photo(f"{folder}/{name}").pixels.astype(int) for folder in ("one", "three"))
        assert np.abs(one - three).max() <= 1


def test_one_photo_that_fails_in_a_batch_fails_alone(folder):
    class Picky:
        name, batch = "picky", 3
        panels: frozenset[str] = frozenset()

        def fill(self, jobs, opaque_hole, progress):
            if any(job[0][0, 0, 0] == pixels(1)[0, 0, 0] for job in jobs):
                raise ValueError("not this one")
            return [FilledPhoto(job[0], "picky") for job in jobs]

    tasks = filling.find_tasks(Path("photos"), Path("masks"), Path("out"), recursive=True, file_format="png")
    outcomes = list(
        filling.run(tasks, Picky(), lambda task: (read_photo(task.image), HOLE), filling.Output(make_folders=True))
    )
    assert [(outcome.task.image.name, outcome.status) for outcome in outcomes] == [
        ("a.png", "filled"),
        ("b.png", "failed"),
        ("c.png", "filled"),
    ]
    assert outcomes[1].error == "not this one"


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda: Path("masks/b.png").unlink(), "no mask for b.png: expected a picture named b or b_mask"),
        (lambda: shutil.copy("photos/a.png", "photos/a.bmp"), "would both become out/a.png"),
        (lambda: shutil.copy("masks/a.png", "masks/a_mask.png"), "are masks of the same name"),
        (lambda: os.makedirs(Path("photos").rename("x") and "photos"), "no picture that can be read"),
    ],
)
def test_folders_that_do_not_fit_are_said_before_the_work(folder, prepare, message):
    prepare()
    result = run("fill", "photos", "masks", "-o", "out", "--model", "diffusion")
    assert result.exit_code == 1
    assert message in result.stderr
    assert not Path("out").exists()


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links")
def test_links_out_of_the_folder_are_not_followed(folder):
    outside = folder / "outside"
    outside.mkdir()
    shutil.copy("photos/a.png", outside / "secret.png")
    os.symlink(outside, "photos/linked")
    os.symlink(outside / "secret.png", "photos/secret.png")
    os.symlink("a.png", "photos/inside.png")
    tasks = filling.find_tasks(Path("photos"), None, Path("out"), recursive=True, file_format="png")
    assert [task.image.name for task in tasks] == ["a.png", "b.png", "c.png", "inside.png"]


def test_rows_and_sheets_are_for_one_photo(folder):
    result = run("fill", "photos", "masks", "-o", "out", "--save-row", "row.png")
    assert result.exit_code == 1
    assert "--save-row: is for one photo, and photos stands for several" in result.stderr


def test_json_for_machines(folder):
    Path("photos/a.png").write_bytes(b"no picture")
    write_photo("masks/b.png", Photo(np.zeros((HEIGHT, WIDTH), np.uint8), "PNG"))
    result = run("fill", "photos", "masks", "-o", "out", "-r", "--json", "--model", "diffusion")
    assert result.exit_code == 1
    records = {Path(record["image"]).name: record for record in map(json.loads, result.stdout.splitlines())}
    assert records["a.png"]["status"] == "failed"
    assert "not a picture" in records["a.png"]["error"]
    assert records["b.png"]["status"] == "unchanged"
    assert records["c.png"]["status"] == "filled"
    assert records["c.png"]["hole"] == {"pixels": 96, "share": 96 / (HEIGHT * WIDTH)}
    assert records["c.png"]["method"] == "diffusion"


def test_two_processes_share_a_folder(folder):
    """As torchrun starts them; what both did is said once."""
    Path("photos/b.png").write_bytes(b"no picture")  # the second process's
    arguments = ("fill", "photos", "masks", "-o", "out", "-r", "--model", "diffusion")
    first, second = run_two(*arguments, port=29517, timeout=100)
    assert [first.code, second.code] == [1, 1], first.errors + second.errors
    assert "2 filled, 1 failed" in first.output
    assert "failed: photos/b.png" in first.errors
    assert "filled," not in second.output
    assert sorted(path.name for path in Path("out").rglob("*.png")) == ["a.png", "c.png"]


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_an_interrupt_leaves_whole_files_only(folder):
    for number in range(400):  # far more than are filled before the signal comes
        shutil.copy("photos/a.png", f"photos/x{number}.png")
    command = [sys.executable, "-m", "inpaint_kernels", "fill", "photos", "mask.png", "-o", "out"]
    process = subprocess.Popen(
        [*command, "--model", "exemplar"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # jobs in the background inherit that it is ignored
    )
    deadline = time.monotonic() + 60
    while len(list(Path("out").glob("*.png"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    files = list(Path("out").iterdir())
    assert 2 <= len(files) < 403
    for file in files:
        assert file.suffix == ".png", file
        assert read_photo(file).pixels.shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("kind", ["bbox", "strokes", "irregular"])
def test_random_masks_are_the_seeds_and_differ_from_photo_to_photo(folder, kind):
    for name in ("photo.png", "photos/a.png"):
        for number, seed in enumerate(("1", "1", "2")):
            out = f"{Path(name).stem}{number}.png"
            assert run("mask", name, "--mask-random", kind, "--seed", seed, "-o", out).exit_code == 0
    first, again, other = (read_photo(f"photo{number}.png").pixels for number in range(3))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, read_photo("a0.png").pixels)
    assert 0 < (first > 0).mean() < 1
    if kind == "bbox":
        assert (first > 0).sum() == (HEIGHT // 2) * (WIDTH // 2)
    result = fill("photos", "-o", "out", "--mask-random", kind, "--model", "diffusion")
    assert "2 filled" in result.stdout


# compare --------------------------------------------------------------------------------------------------------------


def test_compare_prints_what_scikit_image_says(folder):
    damaged = pixels().copy()
    damaged[HOLE] //= 2
    write_photo("damaged.png", Photo(damaged, "PNG"))
    result = run("compare", "damaged.png", "photo.png", "--mask", "mask.png", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    assert found["overall"]["psnr"] == pytest.approx(peak_signal_noise_ratio(pixels(), damaged), rel=1e-9)
    expected = structural_similarity(pixels(), damaged, channel_axis=2)
    assert found["overall"]["ssim"] == pytest.approx(expected, rel=1e-9)
    difference = np.abs(pixels()[HOLE].astype(float) - damaged[HOLE]).mean() / 255
    assert found["hole"]["l1"] == pytest.approx(difference, rel=1e-9)
    assert "hole" in run("compare", "damaged.png", "photo.png", "--mask", "mask.png").stdout
    wrong = run("compare", "photo.png", "mask.png")
    assert wrong.exit_code == 1
    assert "picture: expected the truth's shape [40, 56], got [40, 56, 3]" in wrong.stderr


def test_metrics_of_equal_and_of_tiny_pictures():
    same = metrics.compare(pixels(), pixels())["overall"]
    assert (same.psnr, same.l1) == (float("inf"), 0.0)
    assert same.ssim == pytest.approx(1.0)
    tiny = metrics.compare(pixels()[:3], pixels(5)[:3])["overall"]
    assert np.isnan(tiny.ssim)
    assert tiny.l1 > 0
