"""Training runs: configurations, photos and holes; what a run leaves; breaks, short precisions, several processes."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inpaint_kernels.models import InpaintingModel
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from typer.testing import CliRunner

from inpaint_kernels import load_pretrained
from inpaint_kernels.cli import app
from inpaint_kernels.pretrained import CheckpointError, LicenceNotice
from inpaint_kernels.trainer import (
    TrainingConfig,
    TrainingError,
    parse_overrides,
    read_config,
    recipes,
    train,
    write_config,
)
from inpaint_kernels.trainer import state as files
from inpaint_kernels.trainer.holes import HoleMaker, seeded_generator, shares
from inpaint_kernels.trainer.photos import PhotoFolder, image_batches
from inpaint_kernels.trainer.run import device_of
from inpaint_kernels.trainer.systems import make_trainee
from tests.two_processes import run_two

CPU = torch.device("cpu")
SMALL = {"image_size": 64, "batch": 2, "workers": 0, "rows": 0, "device": "cpu"}
BOX = [{"kind": "box", "size": 32, "shrink": 4}]


@pytest.fixture(autouse=True)
def _one_thread(_reproducible: None) -> None:
    """Maps are too small for two."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five photos of other sizes, one of them gray and one in a folder of its own."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    random = np.random.default_rng(0)
    for name, size in (("a.png", (70, 90)), ("b.jpg", (64, 64)), ("more/c.png", (40, 60)), ("d.png", (200, 80))):
        coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(folder / name)
    Image.fromarray(random.integers(0, 256, (66, 65), dtype=np.uint8)).save(folder / "e.png")
    return folder


def config_of(recipe: str, photos: Path, steps: int = 2, **values: Any) -> TrainingConfig:
    return read_config(recipe, SMALL | {"photos": photos, "phases": [{"steps": steps}]} | values)


def small_v1(photos: Path, steps: int = 2, **values: Any) -> TrainingConfig:
    return config_of("deepfill_v1", photos, steps, **{"window": 32, "holes": BOX} | values)


def newest(run: Path) -> Path:
    folder = files.newest_checkpoint(run)
    assert folder is not None
    return folder


def state_of(run: Path) -> dict[str, Any]:
    return dict(_leaves(files.read_state(newest(run) / files.STATE)))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{path}/{key}")
    else:
        yield path, value


def assert_same_state(one: dict[str, Any], other: dict[str, Any], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, Tensor) and tolerance and value.is_floating_point():
            torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance, msg=name)
        else:
            assert torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name], name


def _slow_if(condition: bool) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.slow,) if condition else ()


def weights_of(path: Path) -> InpaintingModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LicenceNotice)
        return load_pretrained(path)


# Configurations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes())
def test_recipes_are_read_and_written(name, tmp_path):
    config = read_config(name)
    assert config.system == name
    path = tmp_path / "config.toml"
    path.write_text(write_config(config), encoding="utf-8")
    assert read_config(path) == config


def test_there_is_a_recipe_for_every_model():
    from inpaint_kernels.fillers import MODELS

    assert recipes() == sorted(MODELS)


def test_published_values():
    glcic = read_config("glcic")
    assert [(phase.name, phase.steps) for phase in glcic.phases] == [
        ("completion", 90_000),
        ("discriminator", 10_000),
        ("joint", 400_000),
    ]
    assert [glcic.phase_of(step) for step in (0, 89_999, 90_000, 100_000, 499_999)] == [
        "completion",
        "completion",
        "discriminator",
        "joint",
        "joint",
    ]
    assert glcic.steps == 500_000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch": 0}, "batch: input should be greater than or equal to 1, got 0"),
        ({"bach": 4}, "bach: extra inputs are not permitted"),
        ({"image_size": 250}, "image_size: expected a multiple of 8, got 250"),
        ({"shortest": [100, 300]}, "shortest: expected 256 <= least <= greatest"),
        ({"window": 300}, "window: expected at most image_size, 256, got 300"),
        ({"window": 64}, "window: expected the box's size, 128, got 64"),
        ({"holes": []}, "holes: list should have at least 1 item"),
        ({"holes": [{"kind": "circle"}]}, "'circle' found using 'kind' does not match"),
        ({"holes": [{"kind": "box", "size": 128, "shrink": 64}]}, "a box of 128 less 128 does not fit"),
        ({"holes": [{"kind": "box_in_window", "smallest": 9, "largest": 130}]}, "smallest <= largest <= window"),
        ({"rates": [[10, 1.0], [5, 0.0]]}, r"rates: expected steps that grow, got \[10, 5\]"),
        ({"ema": 1.0}, "ema: input should be less than 1"),
        ({"system": "unet"}, "system: input should be 'deepfill_v1'"),
        ({"batch.size": 3}, "batch.size: expected a table at 'batch', got"),
    ],
)
def test_configurations_that_do_not_fit_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        read_config("deepfill_v1", values)


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ValueError, match="config: expected a TOML file or one of csa, deepfill_v1"):
        read_config("nothing")
    path = tmp_path / "x.toml"
    path.write_text("batch = = 3", encoding="utf-8")
    with pytest.raises(ValueError, match=r"x.toml: .*line 1"):
        read_config(path)


def test_overrides_are_toml_or_texts():
    assert parse_overrides(["batch=4", "model.dialect=official", "rates=[[0, 1.0]]", "photos = /a b"]) == {
        "batch": 4,
        "model.dialect": "official",
        "rates": [[0, 1.0]],
        "photos": "/a b",
    }
    with pytest.raises(ValueError, match="set: expected NAME=VALUE, got 'batch'"):
        parse_overrides(["batch"])


@pytest.mark.parametrize(
    ("recipe", "values", "message"),
    [
        ("deepfill_v1", {"settings.rate": 1}, "settings.rate: expected one of adversarial_weight"),
        ("deepfill_v1", {"settings.l1_weight": "much"}, "settings.l1_weight: Input should be a valid number"),
        ("deepfill_v1", {"settings.l1_weight": -1}, "settings: l1_weight: expected .* got -1"),
        ("deepfill_v1", {"model.dialect": "klingon"}, "dialect: expected one of"),
        ("deepfill_v1", {"model.depth": 3}, "model: .*unexpected keyword argument 'depth'"),
        ("deepfill_v1", {"vgg": "random"}, "vgg: deepfill_v1 takes none, got 'random'"),
        ("partial_conv_unet", {"vgg": None}, "vgg: expected torchvision's file of vgg16"),
        ("partial_conv_unet", {"vgg": "random", "phases": [{"steps": 1, "name": "joint"}]}, "phases: expected names"),
    ],
)
def test_what_does_not_fit_the_system_is_refused_by_name(recipe, values, message, photos):
    holes = {} if recipe == "partial_conv_unet" else {"window": 32, "holes": BOX}
    with pytest.raises(ValueError, match=message):
        make_trainee(config_of(recipe, photos, **{"image_size": 128} | holes | values), CPU)


def test_weights_of_a_network_do_not_depend_on_the_random_state(photos):
    config = small_v1(photos)
    torch.manual_seed(5)
    one = make_trainee(config, CPU).model.state_dict()
    after = torch.rand(())
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(()))
    torch.manual_seed(6)
    other = make_trainee(config, CPU).model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


# Photos ---------------------------------------------------------------------------------------------------------------


def test_an_image_depends_on_its_number_alone(photos):
    one, other = (PhotoFolder(photos, 32, seed=3) for _ in range(2))
    images = [one[number] for number in range(12)]
    for number in reversed(range(12)):
        assert torch.equal(images[number], other[number])
    assert all(image.shape == (3, 32, 32) and image.dtype == torch.uint8 for image in images)
    assert not torch.equal(images[0], PhotoFolder(photos, 32, seed=4)[0])


def test_an_epoch_shows_every_photo_once(tmp_path):
    for value in range(6):
        Image.new("RGB", (40, 30), (value, value, value)).save(tmp_path / f"{value}.png")
    folder = PhotoFolder(tmp_path, 16)
    shown = [int(folder[number][0, 0, 0]) for number in range(18)]
    epochs = [shown[:6], shown[6:12], shown[12:]]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_photos_are_scaled_to_a_random_length_and_mirrored(tmp_path):
    ramp = np.repeat(np.arange(0, 240, dtype=np.uint8)[None, :, None], 240, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    folder = PhotoFolder(tmp_path, 60, shortest=(60, 240))
    slopes = [(int(image[0, 30, -1]) - int(image[0, 30, 0])) / 59 for image in map(folder.__getitem__, range(60))]
    assert min(abs(slope) for slope in slopes) < 1.3
    assert max(abs(slope) for slope in slopes) > 2.5
    assert {slope > 0 for slope in slopes} == {True, False}
    unscaled = PhotoFolder(tmp_path, 60, flip=False)[0][0, 30].int()
    assert (unscaled.diff() == 1).all()


def test_small_photos_are_enlarged(tmp_path):
    Image.new("RGB", (7, 30), (1, 2, 3)).save(tmp_path / "small.png")
    assert PhotoFolder(tmp_path, 64)[0].flatten(1).unique(dim=1).tolist() == [[1], [2], [3]]


def test_unreadable_photos_are_left_out_with_a_warning(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    Image.new("RGB", (40, 40), (9, 9, 9)).save(tmp_path / "whole.png")
    folder = PhotoFolder(tmp_path, 16)
    with pytest.warns(UserWarning, match=r"broken.png: left out"):
        assert all((folder[number] == 9).all() for number in range(4))
    (tmp_path / "whole.png").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match=r"whole.png: left out"),
        pytest.raises(ValueError, match="photos: none of 2 can be read"),
    ):
        folder[0]


def test_folders_without_photos_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"photos: expected photos in .*, got no file that ends in"):
        PhotoFolder(tmp_path, 16)
    with pytest.raises(ValueError, match="got no such folder"):
        PhotoFolder(tmp_path / "none", 16)


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "inside").mkdir()
    for folder in ("outside", "inside"):
        Image.new("RGB", (20, 20)).save(tmp_path / folder / f"{folder}.png")
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "outside", target_is_directory=True)
    assert [path.name for path in PhotoFolder(tmp_path / "inside", 16).paths] == ["inside.png"]


def test_workers_read_what_one_process_reads(photos):
    folder = PhotoFolder(photos, 32)
    parts = shares(6, 2, 1, 2)
    assert [list(part) for part in parts] == [[1], [3]]
    alone, read_ahead = (
        list(image_batches(folder, parts, first=2, last=4, images_of_a_step=6, workers=workers)) for workers in (0, 2)
    )
    assert [len(batch) for batch in alone] == [1, 1, 1, 1]
    assert torch.equal(torch.cat(alone), torch.cat(read_ahead))
    assert torch.equal(torch.cat(alone), torch.stack([folder[number] for number in (13, 15, 19, 21)]))


# Holes ----------------------------------------------------------------------------------------------------------------

KINDS = {
    "box": {"kind": "box", "size": 32, "shrink": 4, "margin": 2},
    "box_in_window": {"kind": "box_in_window", "smallest": 8, "largest": 20},
    "strokes": {"kind": "strokes", "width": [4, 8], "with_box": 16},
    "walk": {"kind": "walk", "steps": 300},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("one_hole", [False, True])
def test_holes_and_their_windows(kind, one_hole, photos):
    config = config_of(
        "glcic",
        photos,
        batch=6,
        window=32,
        holes=[KINDS[kind]],
        one_hole=one_hole,
        phases=[{"steps": 1}],
        shortest=None,
    )
    holes, again, later = (HoleMaker(config, CPU)(step) for step in (3, 3, 4))
    count = 1 if one_hole else 6
    assert holes.mask.shape == (count, 1, 64, 64)
    assert holes.mask.dtype == torch.bool
    assert torch.equal(holes.mask, again.mask)
    assert holes.boxes == again.boxes
    assert not torch.equal(holes.mask, later.mask)
    assert holes.boxes is not None
    assert holes.real_boxes is not None
    assert holes.boxes != holes.real_boxes
    assert [box.size for box in holes.boxes + holes.real_boxes] == [(32, 32)] * (2 * count)
    for hole, box in zip(holes.mask, holes.boxes, strict=True):
        assert hole.any()
        if kind.startswith("box"):
            assert box.of(hole[None]).sum() == hole.sum()
    part = holes.of(range(1, 6, 2))
    assert torch.equal(part.mask, holes.mask if one_hole else holes.mask[1::2])
    assert part.boxes == (holes.boxes if one_hole else holes.boxes[1::2])


def test_holes_of_a_folder_and_of_several_kinds(photos, tmp_path):
    mask = np.zeros((16, 16), np.uint8)
    mask[4:8, 4:12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    kinds = [{"kind": "folder", "folder": tmp_path}, {"kind": "folder", "folder": tmp_path, "invert": True}]
    make = HoleMaker(config_of("deepfill_v2", photos, holes=kinds), CPU)
    shares_of_hole = {float(make(step).mask.float().mean()) for step in range(12)}
    assert shares_of_hole == {32 / 256, 1 - 32 / 256}
    with pytest.raises(ValueError, match=r"folder: expected masks in .*no such folder"):
        HoleMaker(config_of("deepfill_v2", photos, holes=[{"kind": "folder", "folder": tmp_path / "no"}]), CPU)


def test_seeds_are_mixed():
    numbers = {
        float(torch.rand((), generator=seeded_generator(*seed)))
        for seed in ((0, 0), (0, 1), (1, 0), (0, -1), (0, 0, 1))
    }
    assert len(numbers) == 5


# The state ------------------------------------------------------------------------------------------------------------


def test_states_are_read_as_they_were_written(tmp_path):
    state = {
        "a": {0: torch.arange(6).view(2, 3).t(), 1: [1, 2.5, None, True, "x"]},
        "b": (torch.tensor(1.5, dtype=torch.float64), {"c": torch.zeros(0, dtype=torch.uint8)}),
        "one": 0.1,
    }
    files.write_state(tmp_path / "s.safetensors", state)
    found = files.read_state(tmp_path / "s.safetensors")
    assert found.keys() == state.keys()
    assert list(found["a"]) == [0, 1]
    assert isinstance(found["b"], tuple)
    assert_same_state(dict(_leaves(found)), dict(_leaves(state)))
    with pytest.raises(TypeError, match="/x: expected a tensor or a plain value, got object"):
        files.write_state(tmp_path / "t.safetensors", {"x": object()})
    assert not (tmp_path / "t.safetensors").exists()


def test_foreign_and_damaged_states_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="is not the state of a training run"):
        files.read_state(path)
    save_file({"x": torch.zeros(2)}, path, {"inpaint_kernels_training": '["dict", [["a", ["tensor", "y"]]]]'})
    with pytest.raises(CheckpointError, match="is not the state of a training run"):
        files.read_state(path)
    path.write_bytes(b"abc")
    with pytest.raises(CheckpointError):
        files.read_state(path)


# Runs -----------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_after_a_break_bit_for_bit(photos, tmp_path):
    values = {"ema": 0.9, "batch": 4, "accumulate": 2, "settings.generator_every": 2, "rates": [[0, 1.0], [6, 0.5]]}
    unbroken = small_v1(photos, 4, **values, rows=1, rows_every=2, log_every=1, save_every=2, keep=1)
    reports: list[int] = []
    assert train(unbroken, tmp_path / "a", report=lambda step, losses: reports.append(step)) == 4
    assert reports == [1, 2, 3, 4]
    assert train(small_v1(photos, 1, **values), tmp_path / "b") == 1
    assert train(small_v1(photos, 3, **values, workers=1), tmp_path / "b", resume=True) == 3
    assert train(small_v1(photos, 4, **values), tmp_path / "b", resume=True) == 4
    assert_same_state(state_of(tmp_path / "a"), state_of(tmp_path / "b"))

    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["00000004"]
    assert sorted(path.name for path in (tmp_path / "a" / "rows").iterdir()) == [f"0000000{i}.jpg" for i in (0, 2, 4)]
    row = Image.open(tmp_path / "a" / "rows" / "00000004.jpg")
    assert row.size == (4 * 64 + 3 * 8, 64 + 24)  # truth, input, output, attention
    assert read_config(tmp_path / "a" / "config.toml") == unbroken

    events = EventAccumulator(str(tmp_path / "a"))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {"loss/l1", "loss/wasserstein", "rate/generator", "rows/hole PSNR"} <= set(scalars)
    assert [event.step for event in events.Scalars("loss/l1")] == [2, 4]
    assert [event.value for event in events.Scalars("rate/generator")] == pytest.approx(
        [1e-4 * factor for factor in (1, 11 / 12, 10 / 12, 9 / 12)]
    )

    model, mean = (weights_of(newest(tmp_path / "a") / name) for name in (files.MODEL, files.EMA))
    name, weight = next(iter(model.state_dict().items()))
    assert torch.equal(weight, state_of(tmp_path / "a")[f"/system/networks/generator/{name}"])
    assert not torch.equal(weight, mean.state_dict()[name])


def test_runs_are_not_mixed_up(photos, tmp_path):
    config = small_v1(photos, 1)
    train(config, tmp_path)
    with pytest.raises(ValueError, match=r"folder: .* holds a run; resume"):
        train(config, tmp_path)
    with pytest.raises(ValueError, match="seed: expected 0, as in the run that is to go on, got 1"):
        train(small_v1(photos, 2, seed=1), tmp_path, resume=True)
    path = newest(tmp_path) / files.STATE
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        train(small_v1(photos, 2), tmp_path, resume=True)


def test_what_cannot_be_trained_is_refused_before_anything_is_written(photos, tmp_path):
    run = tmp_path / "run"
    for values, message in (
        ({"photos": None}, "photos: expected the folder of the photos to train on, got none"),
        ({"photos": tmp_path}, "photos: expected photos in"),
        ({"validation": tmp_path / "no", "rows": 1}, "photos: expected photos in .*no such folder"),
        ({"batch": 3, "accumulate": 2}, "batch: expected a multiple of accumulate x processes, 2 x 1, got 3"),
        ({"device": "abacus"}, "device: 'abacus' cannot be used"),
        ({"start": tmp_path / "no.pth"}, r"no\.pth"),
    ):
        with pytest.raises(ValueError, match=message):
            train(small_v1(photos).model_copy(update=values), run)
        assert not run.exists()


def test_an_interrupt_saves_a_checkpoint(photos, tmp_path):
    def interrupt(step, losses):
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    assert train(small_v1(photos, 3), tmp_path / "a", report=interrupt) == 2
    assert signal.getsignal(signal.SIGINT) is handler
    train(small_v1(photos, 3), tmp_path / "a", resume=True)
    train(small_v1(photos, 3), tmp_path / "b")
    assert_same_state(state_of(tmp_path / "a"), state_of(tmp_path / "b"))


def test_a_loss_that_is_not_finite_ends_the_run(photos, tmp_path):
    config = config_of("deepfill_v2", photos, 5, **{"settings.learning_rate": 1e30, "log_every": 1, "holes": BOX})
    with pytest.raises(TrainingError, match=r"the loss '.*' is (nan|-?inf) around step"):
        train(config, tmp_path)


def test_training_goes_on_from_weights(photos, tmp_path):
    train(small_v1(photos, 1), tmp_path / "a")
    start = newest(tmp_path / "a") / files.MODEL
    still = small_v1(photos, 1, start=start, **{"settings.learning_rate": 0.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LicenceNotice)
        train(still, tmp_path / "b")
        before = weights_of(start).state_dict()
        after = weights_of(newest(tmp_path / "b") / files.MODEL).state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        with pytest.raises(ValueError, match=r"start: .* holds deepfill_v1, expected deepfill_v2"):
            make_trainee(config_of("deepfill_v2", photos, start=start, model={}, holes=BOX), CPU)
        with pytest.raises(ValueError, match=r"model.guided: the weights of .* say that"):
            make_trainee(config_of("deepfill_v2", photos, start=start, model={"guided": True}, holes=BOX), CPU)


SLIM: dict[str, dict[str, Any]] = {
    "deepfill_v2": {"model": {"guided": True}, "holes": [KINDS["strokes"]]},
    "glcic": {
        "window": 32,
        "shortest": [64, 80],
        "holes": [KINDS["box_in_window"]],
        "phases": [{"name": name, "steps": 1} for name in ("completion", "discriminator", "joint")],
    },
    "edge_connect": {
        "model": {"residual_blocks": 1},
        "vgg": "random",
        "holes": [KINDS["walk"]],
        "phases": [{"name": name, "steps": 1} for name in ("guide", "inpaint_predicted")],
    },
    "csa": {"model": {"depth": 6}, "vgg": "random", "holes": BOX},
    "guided_face": {
        "model": {"residual_blocks": 1},
        "vgg": "random",
        "shortest": [64, 64],
        "holes": [KINDS["walk"]],
        "phases": [{"name": name, "steps": 1} for name in ("guide", "inpaint")],
    },
    "partial_conv_unet": {
        "vgg": "random",
        "image_size": 128,
        "holes": [KINDS["walk"]],
        "phases": [{"name": name, "steps": 1} for name in ("training", "finetuning")],
    },
}


@pytest.mark.parametrize(
    "system", [pytest.param(name, marks=_slow_if(name in ("csa", "partial_conv_unet"))) for name in SLIM]
)
def test_every_system_runs_through_its_phases(system, photos, tmp_path):
    config = config_of(system, photos, **{"rows": 1, "log_every": 1} | SLIM[system])
    losses: dict[str, float] = {}
    made = train(config, tmp_path, report=lambda step, means: losses.update(means))
    assert made == config.steps
    assert losses
    assert np.isfinite(list(losses.values())).all()
    trained, loaded = make_trainee(config, CPU).model, weights_of(newest(tmp_path) / files.MODEL)
    assert getattr(loaded, "dialect", None) == getattr(trained, "dialect", None)
    assert loaded.state_dict().keys() == trained.state_dict().keys()
    assert len(list((tmp_path / "rows").iterdir())) == 2


@pytest.mark.parametrize("precision", [pytest.param("bfloat16", marks=pytest.mark.slow), "float16"])
@pytest.mark.parametrize(
    "system",
    [pytest.param(name, marks=_slow_if(name != "edge_connect")) for name in ("deepfill_v1", "glcic", "edge_connect")],
)
def test_short_precisions(system, precision, photos, tmp_path):
    slim = {"window": 32, "holes": BOX, "settings.generator_every": 1} if system == "deepfill_v1" else SLIM[system]
    states = []
    for short in (precision, "float32"):
        config = config_of(system, photos, **slim | {"precision": short, "log_every": 1})
        train(config, tmp_path / short)
        states.append(state_of(tmp_path / short))
    model = [name for name in states[0] if "/networks/" in name and "generator" in name and name.endswith("weight")]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in model)
    for name in model:
        assert states[0][name].dtype == torch.float32
        assert states[0][name].isfinite().all()
    assert ("/scaler/scale" in states[0]) == (precision == "float16")


def test_two_processes_train_as_one(photos, tmp_path):
    """As torchrun starts them; DeepFill v2 has no batch norms, and its losses are means over images."""
    config = config_of("deepfill_v2", photos, 2, batch=4, holes=[KINDS["strokes"]], log_every=1)
    train(config, tmp_path / "one")
    path = tmp_path / "config.toml"
    path.write_text(write_config(config), encoding="utf-8")
    arguments = ("train", str(path), "-o", str(tmp_path / "two"))
    first, second = run_two(*arguments, port=29519, timeout=200, OMP_NUM_THREADS="1")
    assert [first.code, second.code] == [0, 0], first.errors + second.errors
    assert first.output.startswith("2 steps: ")
    assert second.output == ""
    one, two = (state_of(tmp_path / name) for name in ("one", "two"))
    moved = [name for name in one if "/networks/generator" in name and name.endswith("weight")]
    start = dict(_leaves(make_trainee(config, CPU).system.state_dict(), "/system"))
    for name in moved:
        distance = (one[name] - start[name]).norm()
        assert distance > 0
        assert (one[name] - two[name]).norm() < 1e-2 * distance, name
    means = [events_of(tmp_path / name, "loss/l1") for name in ("one", "two")]
    assert means[0] == pytest.approx(means[1], rel=1e-4)


def events_of(run: Path, name: str) -> list[float]:
    events = EventAccumulator(str(run))
    events.Reload()
    return [event.value for event in events.Scalars(name)]


def test_devices():
    assert device_of("cpu", 3) == CPU
    if not torch.cuda.is_available():
        assert device_of("auto", 3) == CPU
        with pytest.raises(ValueError, match="device: 'cuda' cannot be used"):
            device_of("cuda", 0)


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_shows_and_lists(tmp_path):
    run = CliRunner().invoke(app, ["train", "--list"])
    assert run.output.split() == recipes()
    run = CliRunner().invoke(app, ["train", "glcic", "--photos", "a b", "--set", "batch=8", "--show"])
    assert run.exit_code == 0
    path = tmp_path / "c.toml"
    path.write_text(run.output, encoding="utf-8")
    config = read_config(path)
    assert (config.batch, config.photos) == (8, Path("a b"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nothing", "-o", "run"], 1, "config: expected a TOML file or one of"),
        (["glcic", "-o", "run"], 1, "photos: expected the folder of the photos to train on, got none"),
        (["glcic"], 2, "--output: expected the folder of the run, got none"),
        (["glcic", "-o", "run", "--set", "batch"], 1, "set: expected NAME=VALUE, got 'batch'"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, code, message):
    run = CliRunner().invoke(app, ["train", *arguments])
    assert run.exit_code == code
    assert message in " ".join(run.output.replace("│", " ").split())


def test_the_command_names_absent_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "inpaint_kernels.trainer", None)
    run = CliRunner().invoke(app, ["train", "--list"])
    assert run.exit_code == 1
    assert "pip install 'inpaint-kernels[train]'" in run.output
