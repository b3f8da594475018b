"""The adapters for IOPaint and ComfyUI: against stand-ins of the hosts' contracts, and IOPaint's own base class.

The latter needs its checkout (``INPAINT_PEERS=DIR``, ``DIR/Sanster+IOPaint``) and loguru and pydantic.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from inpaint_kernels.models import GLCIC

from inpaint_kernels import inpaint
from inpaint_kernels.plugins import comfyui, iopaint
from tests.model_cases import photo, seeded

pytestmark = pytest.mark.filterwarnings("ignore::inpaint_kernels.pretrained.LicenceNotice")

HEIGHT, WIDTH = 45, 62
HOLE = np.zeros((HEIGHT, WIDTH), bool)
HOLE[12:24, 20:40] = True


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "glcic.pth"
    torch.save(seeded(GLCIC("otenim")).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def image() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return (photo(HEIGHT, WIDTH)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)


def module(name: str, **content: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(content)
    return made


# IOPaint --------------------------------------------------------------------------------------------------------------


class InpaintModel:
    """What IOPaint's base class does with a model that takes any size: prepares it, calls it."""

    name = "base"

    def __init__(self, device: Any, **kwargs: Any) -> None:
        self.device = device
        self.init_model(device, **kwargs)  # type: ignore[attr-defined]

    def __call__(self, image: Any, mask: Any, config: Any) -> Any:
        return self.forward(image, mask[:, :, None], config)  # type: ignore[attr-defined]


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """IOPaint's table of models."""
    table: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "iopaint", module("iopaint"))
    monkeypatch.setitem(sys.modules, "iopaint.model", module("iopaint.model", models=table))
    monkeypatch.setitem(sys.modules, "iopaint.model.base", module("iopaint.model.base", InpaintModel=InpaintModel))
    return table


def test_iopaint_gets_bgr_of_what_inpaint_fills(models, weights, image):
    made = iopaint.register(weights, "mine", blend="poisson")
    assert models == {"mine": made}
    assert made.name == "mine"
    assert made.is_downloaded()
    model = made("cpu", model_info=None)
    mask = np.where(HOLE, 255, 0).astype(np.uint8)
    result = model(image, mask, None)
    expected = inpaint(model.model, image, HOLE, blend="poisson").completed
    assert np.array_equal(result, expected[:, :, ::-1])
    assert np.array_equal(model(image, 0 * mask, None), image[:, :, ::-1])


def test_iopaint_downloads_nothing(models, tmp_path):
    assert not iopaint.register(tmp_path / "nothing.pth").is_downloaded()


def test_iopaints_command_line_gets_the_model(models, monkeypatch, weights, capsys):
    calls: list[list[str]] = []
    monkeypatch.setitem(sys.modules, "iopaint.cli", module("iopaint.cli", typer_app=calls.append))
    for words in (["start", "--port", "8080"], ["run", "--model", "lama"], ["list"]):
        monkeypatch.setattr(sys, "argv", ["iopaint.py", str(weights), *words])
        iopaint.main()
    torch.set_grad_enabled(True)
    assert calls == [["start", "--model", iopaint.NAME, "--port", "8080"], ["run", "--model", "lama"], ["list"]]
    monkeypatch.setattr(sys, "argv", ["iopaint.py"])
    with pytest.raises(SystemExit) as end:
        iopaint.main()
    assert end.value.code == 2
    assert "WEIGHTS start|run|list" in capsys.readouterr().err


def test_iopaints_own_base_class_runs_the_model(monkeypatch, weights, image):
    """Its crop and resize strategies too; of its package only the files that the base class needs are run."""
    folder = Path(os.environ.get("INPAINT_PEERS", "")) / "Sanster+IOPaint"
    if not os.environ.get("INPAINT_PEERS") or not folder.is_dir():
        pytest.skip("no checkout of IOPaint (INPAINT_PEERS=DIR)")
    pytest.importorskip("loguru")
    pytest.importorskip("pydantic")
    for name in [name for name in sys.modules if name.partition(".")[0] == "iopaint"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(folder))
    package = module("iopaint.model", models={}, __path__=[str(folder / "iopaint" / "model")])
    monkeypatch.setitem(sys.modules, "iopaint.model", package)
    # Neither the schedulers of diffusion models nor what extends their pictures is used.
    monkeypatch.setitem(sys.modules, "iopaint.model.utils", module("iopaint.model.utils", get_scheduler=None))
    monkeypatch.setitem(sys.modules, "iopaint.model.helper", module("iopaint.model.helper", __path__=[]))
    diffuser = "iopaint.model.helper.g_diffuser_bot"
    monkeypatch.setitem(sys.modules, diffuser, module(diffuser, expand_image=None))
    schema = importlib.import_module("iopaint.schema")

    model = iopaint.register(weights)("cpu")
    mask = np.where(HOLE, 255, 0).astype(np.uint8)
    expected = inpaint(model.model, image, HOLE).completed
    whole = model(image, mask, schema.InpaintRequest(hd_strategy="Original"))
    assert np.array_equal(whole, expected[:, :, ::-1])
    crop = schema.InpaintRequest(hd_strategy="Crop", hd_strategy_crop_trigger_size=20, hd_strategy_crop_margin=8)
    resize = schema.InpaintRequest(hd_strategy="Resize", hd_strategy_resize_limit=32)
    for request in (crop, resize):
        filled = model(image.copy(), mask, request)
        assert np.array_equal(filled[~HOLE], image[:, :, ::-1][~HOLE])
        assert not np.array_equal(filled[HOLE], image[:, :, ::-1][HOLE])


# ComfyUI --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder_paths(monkeypatch: pytest.MonkeyPatch, weights: Path) -> SimpleNamespace:
    """ComfyUI's module of folders, with a folder of weights."""
    names: dict[str, list[str]] = {}
    host = SimpleNamespace(
        folder_names_and_paths=names,
        models_dir=str(weights.parent),
        add_model_folder_path=lambda name, path: names.setdefault(name, []).append(path),
        get_filename_list=lambda name: [weights.name],
        get_full_path_or_raise=lambda name, file: str(weights.parent / file),
    )
    monkeypatch.setitem(sys.modules, "folder_paths", host)
    return host


def test_comfyui_nodes_keep_its_contract(folder_paths):
    assert comfyui.NODE_CLASS_MAPPINGS.keys() == comfyui.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in comfyui.NODE_CLASS_MAPPINGS.values():
        required = node.INPUT_TYPES()["required"]
        assert all(isinstance(kind, tuple) for kind in required.values())
        assert callable(getattr(node(), node.FUNCTION))
        assert isinstance(node.RETURN_TYPES, tuple)
        assert isinstance(node.CATEGORY, str)
    assert comfyui.LoadModel.INPUT_TYPES() == {"required": {"weights": (["glcic.pth"],)}}
    assert folder_paths.folder_names_and_paths["inpaint"] == [str(Path(folder_paths.models_dir) / "inpaint")]


@pytest.mark.parametrize(
    "settings", [("pad", 512, "none", "paste"), ("resize", 64, "residual", "feather"), ("crop", 64, "none", "poisson")]
)
def test_comfyui_fills_batches(folder_paths, weights, settings):
    (model,) = comfyui.LoadModel().load(weights.name)
    images = photo(HEIGHT, WIDTH, 2).permute(0, 2, 3, 1)
    mask = torch.from_numpy(HOLE).float()[None]
    (filled,) = comfyui.Inpaint().fill(model, images, mask, *settings)
    assert filled.shape == images.shape
    assert filled.dtype == torch.float32
    assert torch.equal(filled[:, ~HOLE], images[:, ~HOLE])
    assert not torch.equal(filled[:, HOLE], images[:, HOLE])


def test_a_host_that_is_absent_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "folder_paths", None)
    with pytest.raises(ModuleNotFoundError, match="folder_paths"):
        comfyui.LoadModel.INPUT_TYPES()
    monkeypatch.setitem(sys.modules, "iopaint", None)
    with pytest.raises(ModuleNotFoundError, match="iopaint"):
        iopaint.register("weights.pth")
