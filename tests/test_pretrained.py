"""Published checkpoints: every layout becomes our model, whatever it is wrapped in; everything else is refused.

``published_names.json`` lists the names of the published files; in one of its rows stand the names of one tensor.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inpaint_kernels.models import (
    CSA,
    GLCIC,
    DeepFillV1,
    DeepFillV2,
    EdgeConnect,
    GuidedFace,
    PartialConvUNet,
    checkpoints,
    key_maps,
)
from inpaint_kernels.models.edge_connect import fold_spectral_norm
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from inpaint_kernels import CheckpointError, LicenceNotice, convert_checkpoint, load_pretrained, pretrained
from inpaint_kernels.checkpoint_files._crc32c import crc32c
from tests import tensorflow_bundle_writer
from tests.model_cases import holes, photo, seeded
from tests.torch7_writer import Instance, array, table, write_torch7
from tests.torch7_writer import tensor as tensor_of_torch7

NAMES: dict[str, Any] = json.loads((Path(__file__).parent / "published_names.json").read_text(encoding="utf-8"))

pytestmark = pytest.mark.filterwarnings("ignore::inpaint_kernels.pretrained.LicenceNotice")


# Published files ------------------------------------------------------------------------------------------------------


def tensors(model: str, file: str) -> dict[str, Tensor]:
    """The i-th tensor of a model by its name in a published file: the same values in each, but of the official ones'
    layout, and of what only one of them has.
    """
    entry = NAMES[model]
    column = entry["files"].index(file)
    state = {}
    for number, names in enumerate(entry["names"]):
        shapes = entry.get(f"{file}_shapes", entry["shapes"])
        name, tensor = names[column], numbered(number, shapes[number], names[0])
        if name == "-":
            continue
        state[name] = tensor.permute(2, 3, 1, 0).contiguous() if name.endswith("/kernel") else tensor
    return state


def numbered(number: int, shape: list[int], name: str) -> Tensor:
    """Values by the number; of a size that neither explodes nor saturates, and scales of norms near 1."""
    if not shape:
        return torch.tensor(number)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(number))
    if len(shape) > 1:
        return values / values[0].numel() ** 0.5
    return 1 + 0.1 * values.abs() if name.endswith(("weight", "running_var")) else 0.1 * values


def csqiangwen() -> dict[str, Tensor]:
    return {name: numbered(number, shape, name) for number, (name, shape) in enumerate(NAMES["csqiangwen"])}


FILES = [
    (DeepFillV1, "daa233", lambda state: state),
    (DeepFillV1, "daa233", lambda state: {f"netG.{name}": value for name, value in state.items()}),
    (DeepFillV1, "nbei", lambda state: state),
    (DeepFillV1, "mmagic", lambda state: mmagic(state, fuse="stage2.contextual_attention_neck.contextual_attention")),
    (DeepFillV2, "nipponjo_tf", lambda state: {"G": state}),
    (
        DeepFillV2,
        "nipponjo",
        lambda state: {
            "G": state | {"stage2.contextual_attention.fuse_weight": torch.eye(3)[None, None]},
            "D": {"conv1.conv.weight_orig": torch.zeros(3)},
            "G_optim": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{}]},
            "n_iter": 7,
        },
    ),
    (DeepFillV2, "mmagic", lambda state: mmagic(state, fuse="stage2.contextual_attention_neck.contextual_attention")),
    (GLCIC, "otenim", lambda state: state),
    (GLCIC, "iizuka", lambda state: state),
    (GLCIC, "yangwangx", lambda state: {"model": state}),
    (GLCIC, "mmagic", lambda state: mmagic(state)),
    (PartialConvUNet, "naoto", lambda state: {"model": naoto(state), "optimizer": {}, "n_iter": 3}),
    (PartialConvUNet, "mmagic", lambda state: mmagic(state)),
]


def mmagic(state: dict[str, Tensor], fuse: str | None = None) -> dict[str, Any]:
    wrapped = {f"generator.{name}": value for name, value in state.items()}
    if fuse is not None:
        wrapped[f"generator.{fuse}.fuse_kernel"] = torch.eye(3)[None, None]
    masks = {
        f"generator.{name}_mask_updater": torch.ones(1)
        for name in state
        if name.endswith("conv.weight") and "enc7" in name
    }
    return {
        "meta": {"epoch": 3, "config": "a = 1"},
        "state_dict": wrapped | masks | {"disc.conv.weight": torch.zeros(3)},
    }


def naoto(state: dict[str, Tensor]) -> dict[str, Tensor]:
    masks = {name.replace("input_conv", "mask_conv"): torch.ones(1) for name in state if "input_conv.weight" in name}
    return state | masks


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


IDS = [f"{model.__name__}-{file}-{number}" for number, (model, file, _) in enumerate(FILES)]
OURS = {DeepFillV1: "daa233", DeepFillV2: "nipponjo_tf", GLCIC: "otenim", PartialConvUNet: "naoto"}
BGR = ("official", "nbei", "mmagic")
COLOURS = {
    DeepFillV1: key_maps.DEEPFILL_V1_COLOURS,
    DeepFillV2: key_maps.DEEPFILL_V2_COLOURS,
    GLCIC: key_maps.GLCIC_COLOURS,
    PartialConvUNet: key_maps.PARTIAL_CONV_UNET_COLOURS,
}


def names_of(model: type[nn.Module], file: str) -> Iterator[tuple[str, str]]:
    """(our name, that in the file) of every tensor that both have."""
    entry = NAMES[model.__name__]
    ours, theirs = entry["files"].index(OURS[model]), entry["files"].index(file)
    yield from ((names[ours], names[theirs]) for names in entry["names"] if "-" not in (names[ours], names[theirs]))


@pytest.mark.parametrize(("model", "file", "wrap"), FILES, ids=IDS)
def test_published_files_become_our_models(tmp_path, model, file, wrap):
    """Every tensor lies where the table of names says; where colours go in and out, see the next test."""
    state = tensors(model.__name__, file)
    loaded = load_pretrained(saved(wrap(state), tmp_path / "weights.bin"))
    assert type(loaded) is model
    assert loaded.dialect == model("iizuka" if file == "yangwangx" else file).dialect
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    ours = loaded.state_dict()
    swapped = (*COLOURS[model].inputs, *COLOURS[model].outputs) if file in BGR else ()
    for own, name in names_of(model, file):
        if own.rpartition(".")[0] in swapped:
            continue
        expected = state[name]
        if file == "naoto" and "input_conv.weight" in name:  # its code leaves out the window's size
            expected = expected / expected[0].numel()
        torch.testing.assert_close(ours[own], expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "dialect", "conversions"),
    [
        (DeepFillV1, "nbei", key_maps.DEEPFILL_V1),
        (DeepFillV1, "mmagic", key_maps.DEEPFILL_V1),
        (DeepFillV2, "mmagic", key_maps.DEEPFILL_V2),
        (GLCIC, "mmagic", key_maps.GLCIC),
        (PartialConvUNet, "mmagic", key_maps.PARTIAL_CONV_UNET),
    ],
)
def test_networks_for_bgr_become_networks_for_rgb(tmp_path, model, dialect, conversions):
    """With the tensors as they are, the network paints for red, green, blue what ours paints for blue, green, red."""
    state = tensors(model.__name__, dialect)
    loaded = load_pretrained(saved(state, tmp_path / "weights.pth"))
    as_published = model(dialect)
    as_published.load_state_dict(conversions[dialect](state), strict=False)  # of batches GLCIC's file counts none
    as_published.eval()
    size = (128, 128) if model is PartialConvUNet else (80, 96)
    image, mask = photo(*size), holes(*size, (20, 24, 50, 60))
    with torch.no_grad():
        expected = as_published(image.flip(1), mask).output.flip(1)
        torch.testing.assert_close(loaded(image, mask).output, expected, rtol=1e-4, atol=1e-4)
        assert (loaded(image.flip(1), mask).output.flip(1) - expected).norm() > 1e-2 * expected.norm()


def test_csqiangwen_keeps_two_convolutions_and_spectral_norms(tmp_path):
    state = csqiangwen()
    loaded = load_pretrained(saved(state, tmp_path / "deepfillv2_WGAN_G_epoch40_batchsize4.pth"))
    assert isinstance(loaded, DeepFillV2)
    assert loaded.dialect == DeepFillV2("csqiangwen").dialect
    ours = loaded.state_dict()
    joined = torch.cat([state["coarse.0.conv2d.weight"], state["coarse.0.mask_conv2d.weight"]])
    torch.testing.assert_close(ours["conv1.conv.weight"], joined, rtol=0, atol=0)
    prefix = "coarse.12.gated_conv2d.conv2d.module"
    weight, u, v = (state[f"{prefix}.weight_{kind}"] for kind in ("bar", "u", "v"))
    sigma = torch.dot(u, torch.mv(weight.flatten(1), v))
    torch.testing.assert_close(ours["conv13_upsample.conv.conv.weight"][:96], weight / sigma)


def test_a_guided_network_is_told_by_its_channels(tmp_path):
    state = DeepFillV2("nipponjo_tf", guided=True).state_dict()
    assert load_pretrained(saved(state, tmp_path / "sketch.pth")).guided


def test_weights_may_run_in_another_dialect(tmp_path):
    path = saved(tensors("DeepFillV2", "nipponjo_tf"), tmp_path / "states_tf_places2.pth")
    assert load_pretrained(path).dialect.fuse == 0
    assert load_pretrained(path, dialect="official").dialect == DeepFillV2("official").dialect
    with pytest.raises(ValueError, match=r"dialect: expected one of 'official', .*got 'offical'"):
        load_pretrained(path, dialect="offical")


def test_half_precision_and_data_parallel(tmp_path):
    state = {f"module.{name}": value.half() for name, value in DeepFillV1().state_dict().items()}
    loaded = load_pretrained(saved(state, tmp_path / "weights.pth"))
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}


def test_files_of_old_torch(tmp_path):
    state = DeepFillV1().state_dict()
    path = tmp_path / "gen_00430000.pt"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    loaded = load_pretrained(path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name])


def test_the_mean_of_otenims_training_stands_beside_its_weights(tmp_path):
    path = saved(GLCIC("otenim").state_dict(), tmp_path / "model_cn")
    (tmp_path / "config.json").write_text('{"mpv": [0.1, 0.2, 0.3], "bsize": 16}', encoding="utf-8")
    assert load_pretrained(path).mean_color == (0.1, 0.2, 0.3)
    (tmp_path / "config.json").write_text('{"mpv": [0.1, 0.2]}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config.json: mpv: expected three numbers, got \[0.1, 0.2\]"):
        load_pretrained(path)


# Torch7 and TensorFlow ------------------------------------------------------------------------------------------------


def layer_of_torch7(number: int, state: dict[str, Tensor]) -> Instance:
    """The i-th entry of the published Sequential: convolution, norm, ReLU, and so on, a sigmoid last."""
    fields = {name.partition(".")[2]: value for name, value in state.items() if name.startswith(f"{number}.")}
    values: dict[str, Any] = {key: tensor_of_torch7(value.numpy()) for key, value in fields.items() if value.dim()}
    if "running_mean" in fields:
        return Instance("nn.SpatialBatchNormalization", table(eps=1e-5, train=False, **values))
    if "weight" not in fields:
        return Instance("nn.Sigmoid" if number == 49 else "nn.ReLU", table(inplace=True))
    enlarges = fields["weight"].shape[-1] == 4
    kind = "Full" if enlarges else "Dilated" if number == 18 else ""
    return Instance(f"nn.Spatial{kind}Convolution", table(kW=3, kH=3, **values))


def test_iizukas_torch7_file(tmp_path):
    state = tensors("GLCIC", "iizuka")
    layers = array(*(layer_of_torch7(number, state) for number in range(50)))
    content = table(model=Instance("nn.Sequential", table(modules=layers)), mean=tensor_of_torch7([0.5, 0.25, 0.125]))
    write_torch7(tmp_path / "completionnet_celeba.t7", content)
    loaded = load_pretrained(tmp_path / "completionnet_celeba.t7")
    assert isinstance(loaded, GLCIC)
    assert loaded.dialect == GLCIC("iizuka").dialect
    assert loaded.mean_color == (0.5, 0.25, 0.125)
    ours = loaded.state_dict()
    for own, name in names_of(GLCIC, "iizuka"):
        if not own.endswith("num_batches_tracked"):
            torch.testing.assert_close(ours[own], state[name], rtol=0, atol=0)


def test_a_torch7_file_of_something_else(tmp_path):
    layer = Instance("nn.Linear", table(weight=tensor_of_torch7([[1.0]])))
    path = write_torch7(tmp_path / "other.t7", table(model=layer))
    with pytest.raises(CheckpointError, match=r"other.t7: .*nn.Linear"):
        load_pretrained(path)


@pytest.mark.parametrize("model", [DeepFillV1, DeepFillV2])
def test_jiahuiyus_tensorflow_checkpoints(tmp_path, monkeypatch, model):
    """With the optimiser's slots and a discriminator, which are not read; the network is one for BGR."""
    monkeypatch.setattr(tensorflow_bundle_writer, "crc32c", crc32c)  # in Python alone it takes seconds
    state = tensors(model.__name__, "official")
    others = {"inpaint_net/conv1/kernel/Adam": torch.zeros(3), "discriminator/conv1/kernel": torch.zeros(3)}
    arrays = {name: value.numpy() for name, value in (state | others).items()}
    tensorflow_bundle_writer.write_bundle(tmp_path / "snap-0", arrays)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/logs/snap-0"\n', encoding="utf-8")
    for path in (tmp_path, tmp_path / "snap-0", tmp_path / "snap-0.index"):
        loaded = load_pretrained(path)
        assert type(loaded) is model
        assert loaded.dialect == model("official").dialect
    ours = loaded.state_dict()
    swapped = (*COLOURS[model].inputs, *COLOURS[model].outputs)
    for own, name in names_of(model, "official"):
        expected = state[name].permute(3, 2, 0, 1) if name.endswith("kernel") else state[name]
        if own.rpartition(".")[0] not in swapped:
            torch.testing.assert_close(ours[own], expected, rtol=0, atol=0)
    first = next(own for own, name in names_of(model, "official") if name == "inpaint_net/conv1/kernel")
    published = state["inpaint_net/conv1/kernel"].permute(3, 2, 0, 1)
    torch.testing.assert_close(ours[first][:, :3], published[:, [2, 1, 0]], rtol=0, atol=0)
    torch.testing.assert_close(ours[first][:, 3:], published[:, 3:], rtol=0, atol=0)
    metadata = convert_checkpoint(tmp_path / "snap-0", tmp_path / "converted.safetensors")
    assert metadata["source"] == "snap-0.index snap-0.data-00000-of-00001"
    assert_same_state(load_pretrained(tmp_path / "converted.safetensors"), loaded)


# Models in two files --------------------------------------------------------------------------------------------------


def edge_connect_files(folder: Path, blocks: int = 2) -> EdgeConnect:
    model = seeded(EdgeConnect(blocks))
    for name, generator in (("EdgeModel", model.edge_generator), ("InpaintingModel", model.inpaint_generator)):
        torch.save({"iteration": 5, "generator": generator.state_dict()}, folder / f"{name}_gen.pth")
        torch.save({"discriminator": {"conv1.0.weight_orig": torch.zeros(3)}}, folder / f"{name}_dis.pth")
    return model


def csa_files(folder: Path, epoch: str = "30") -> CSA:
    model = CSA(channels=8, depth=5)
    torch.save(model.coarse_generator.state_dict(), folder / f"{epoch}_net_P.pth")
    torch.save(model.refinement_generator.state_dict(), folder / f"{epoch}_net_G.pth")
    return model


def assert_same_state(loaded: nn.Module, expected: nn.Module) -> None:
    ours, theirs = loaded.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("write", "names"),
    [
        (edge_connect_files, ("", "EdgeModel_gen.pth", "InpaintingModel_gen.pth")),
        (csa_files, ("", "30_net_P.pth", "30_net_G.pth")),
    ],
)
def test_a_model_in_two_files_loads_from_either_and_from_the_folder(tmp_path, write, names):
    expected = write(tmp_path)
    for name in names:
        assert_same_state(load_pretrained(tmp_path / name), expected)


def test_spectral_norms_are_folded_when_asked(tmp_path):
    expected = edge_connect_files(tmp_path)
    folded = load_pretrained(tmp_path, fold_spectral_norm=True)
    assert not any(name.endswith("weight_orig") for name in folded.state_dict())
    image, mask, edges = photo(32, 32), holes(32, 32, (8, 8, 20, 20)), torch.zeros(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            folded(image, mask, canny_edges=edges).output, expected(image, mask, canny_edges=edges).output
        )


def test_files_that_are_no_pair(tmp_path):
    edge_connect_files(tmp_path)
    (tmp_path / "InpaintingModel_gen.pth").unlink()
    with pytest.raises(CheckpointError, match=r"EdgeConnect.edge_generator .*missing: .*InpaintingModel_gen.pth"):
        load_pretrained(tmp_path / "EdgeModel_gen.pth")
    (tmp_path / "EdgeModel_gen.pth").rename(tmp_path / "mine.pth")
    with pytest.raises(CheckpointError, match=r"mine.pth: .*looked for by its name: \*EdgeModel_gen.pth and"):
        load_pretrained(tmp_path / "mine.pth")
    edge_connect_files(tmp_path, blocks=1)
    torch.save({"generator": EdgeConnect(2).inpaint_generator.state_dict()}, tmp_path / "InpaintingModel_gen.pth")
    with pytest.raises(CheckpointError, match=r"expected a network of .*: 1.* got .*: 2"):
        load_pretrained(tmp_path / "EdgeModel_gen.pth")
    with pytest.raises(CheckpointError, match=r"EdgeModel_dis.pth: a discriminator's file"):
        load_pretrained(tmp_path / "EdgeModel_dis.pth")


def test_a_folder_with_several_epochs(tmp_path):
    csa_files(tmp_path, "20")
    csa_files(tmp_path, "30")
    with pytest.raises(CheckpointError, match=r"several models; give one of 20_net_P.pth, 30_net_P.pth"):
        load_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a folder without a checkpoint"):
        load_pretrained(make(tmp_path / "empty"))


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


# Conversion to safetensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        lambda: DeepFillV1("daa233"),
        lambda: GLCIC("otenim"),
        lambda: PartialConvUNet("naoto"),
        lambda: EdgeConnect(1),
        lambda: fold_spectral_norm(EdgeConnect(1)),
        lambda: CSA(channels=8, depth=5),
        lambda: GuidedFace("literal", 1),
    ],
    ids=["v1", "glcic", "pconv", "edge", "folded edge", "csa", "face"],
)
def test_our_own_files_and_their_conversions_load(tmp_path, model):
    expected = model()
    path = saved(expected.state_dict(), tmp_path / "own.pth")
    assert_same_state(load_pretrained(path), expected)
    convert_checkpoint(path, tmp_path / "own.safetensors")
    converted = load_pretrained(tmp_path / "own.safetensors")
    assert type(converted) is type(expected)
    assert_same_state(converted, expected)


def test_conversion_says_where_the_weights_are_from(tmp_path):
    path = saved({"state_dict": tensors("DeepFillV2", "mmagic")}, tmp_path / "published.pth")
    target = tmp_path / "deepfill_v2.safetensors"
    metadata = convert_checkpoint(path, target)
    with safe_open(target, framework="pt") as file:
        assert file.metadata() == metadata
    assert metadata["model"] == "DeepFillV2"
    assert metadata["dialect"] == "mmagic"
    assert metadata["source"] == "published.pth"
    assert metadata["repository"] == "open-mmlab/mmagic"
    assert metadata["licence"] == "Apache-2.0"
    assert len(metadata["sha256"]) == 64
    loaded = load_pretrained(target)
    assert loaded.dialect == DeepFillV2("mmagic").dialect
    assert_same_state(loaded, load_pretrained(path))
    again = convert_checkpoint(target, tmp_path / "again.safetensors")
    assert again["repository"] == "open-mmlab/mmagic"
    assert again["arguments"] == metadata["arguments"]


def test_conversion_keeps_the_mean(tmp_path):
    path = saved(GLCIC("otenim").state_dict(), tmp_path / "model_cn")
    (tmp_path / "config.json").write_text('{"mpv": [0.1, 0.2, 0.3]}', encoding="utf-8")
    convert_checkpoint(path, make(tmp_path / "new") / "glcic.safetensors")
    assert load_pretrained(tmp_path / "new" / "glcic.safetensors").mean_color == (0.1, 0.2, 0.3)


def test_conversion_loses_nothing(tmp_path):
    path = saved(DeepFillV1().state_dict(), tmp_path / "own.pth")
    target = tmp_path / "own.safetensors"
    with pytest.raises(ValueError, match=r"target: expected a name that ends in .safetensors, got 'own.pth'"):
        convert_checkpoint(path, "own.pth")
    target.write_text("mine")
    with pytest.raises(ValueError, match=r"own.safetensors: exists"):
        convert_checkpoint(path, target)
    (tmp_path / "bad.pth").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError):
        convert_checkpoint(tmp_path / "bad.pth", target, force=True)
    assert target.read_text() == "mine"
    convert_checkpoint(path, target, force=True)
    assert_same_state(load_pretrained(target), load_pretrained(path))
    with pytest.raises(ValueError, match="is an input"):
        convert_checkpoint(target, target, force=True)


def test_the_licence_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "_said", set())
    path = saved(DeepFillV1().state_dict(), tmp_path / "gen.pt")
    with pytest.warns(LicenceNotice, match=r"gen.pt: weights of daa233/.* CC BY-NC 4.0"):
        load_pretrained(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pretrained(path)


def test_every_layout_says_its_licence_and_no_two_are_the_same():
    assert all(layout.licence and layout.model in checkpoints.PAPERS for layout in checkpoints.LAYOUTS)
    signatures = [(layout.names, layout.shape) for layout in checkpoints.LAYOUTS]
    assert len(set(signatures)) == len(signatures)


# Files that are refused -----------------------------------------------------------------------------------------------


class Command:
    """What a malicious file holds: it runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_runs_nothing(tmp_path, zipped):
    marker, path = tmp_path / "ran", tmp_path / "weights.pth"
    state = DeepFillV1().state_dict() | {"extra": Command(marker)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"weights.pth: it names (posix|nt).system; only tensors"):
        load_pretrained(path)
    assert not marker.exists()
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Command(marker), protocol=2))
    with pytest.raises(CheckpointError, match=r"plain.pkl"):
        load_pretrained(tmp_path / "plain.pkl")
    assert not marker.exists()


def test_a_file_claims_no_more_than_it_has(tmp_path):
    storage = torch.zeros(1)
    path = saved({"coarse_generator.conv1.conv.weight": storage.expand(1 << 20, 1 << 20)}, tmp_path / "wide.pth")
    with pytest.raises(CheckpointError, match=r"conv1.conv.weight of \[1048576, 1048576\] is larger than the file"):
        load_pretrained(path)
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (1 << 22))
    with pytest.raises(CheckpointError, match=r"data.pkl is compressed"):
        load_pretrained(bomb)


def test_a_legacy_file_claims_no_more_elements_than_it_has(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"a": torch.zeros(300)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    claimed = content.replace(b"M" + (300).to_bytes(2, "little") + b"N", b"J" + (1 << 30).to_bytes(4, "little") + b"N")
    assert claimed != content
    path.write_bytes(claimed)
    with pytest.raises(CheckpointError, match=r"a storage claims 1,073,741,824 elements, the file has"):
        load_pretrained(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_is_cut_off(tmp_path, zipped):
    path = tmp_path / "weights.pth"
    torch.save(EdgeConnect(0).inpaint_generator.state_dict(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for length in (0, 1, 3, 9, 40, 500, 5000, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.pth").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut.pth"):
            load_pretrained(tmp_path / "cut.pth")


def test_safetensors_that_are_cut_off(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(DeepFillV1().state_dict(), path)
    content = path.read_bytes()
    for length in (9, 100, 5000, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"weights.safetensors: no safetensors file, damaged or cut off"):
            load_pretrained(path)


def test_safetensors_of_somebody_else(tmp_path):
    save_file(tensors("DeepFillV2", "nipponjo"), tmp_path / "theirs.safetensors")
    assert load_pretrained(tmp_path / "theirs.safetensors").dialect == DeepFillV2("nipponjo").dialect
    save_file(DeepFillV1().state_dict(), tmp_path / "x.safetensors", {"inpaint_kernels": "1", "arguments": "[3"})
    with pytest.raises(CheckpointError, match="metadata do not say the model's arguments"):
        load_pretrained(tmp_path / "x.safetensors")


def test_what_is_missing_or_wrong_is_named_as_in_the_file(tmp_path):
    path = tmp_path / "weights.pth"
    state = tensors("DeepFillV1", "mmagic")
    name = "stage2.decoder.dec3.conv.weight"
    saved(state | {name: torch.zeros(64, 128, 5, 5)}, path)
    with pytest.raises(CheckpointError, match=rf"{name}: expected the shape \[64, 128, 3, 3\], got \[64, 128, 5, 5\]"):
        load_pretrained(path)
    saved({key: value for key, value in state.items() if key != name}, path)
    with pytest.raises(CheckpointError, match=rf"{name} is missing; the file looks like DeepFillV1 of open-mmlab"):
        load_pretrained(path)
    saved(state | {"stage3.conv.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"stage3.conv.weight is not needed"):
        load_pretrained(path)
    with pytest.warns(UserWarning, match=r"stage3.conv.weight is not needed"):
        load_pretrained(path, strict=False)


def test_what_is_missing_keeps_its_start_when_not_strict(tmp_path):
    state = DeepFillV1().state_dict()
    gone = "fine_generator.allconv12.conv.weight"
    path = saved({name: value for name, value in state.items() if name != gone}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=rf"{gone} is missing"):
        load_pretrained(path)
    with pytest.warns(UserWarning, match=rf"{gone} is missing"):
        loaded = load_pretrained(path, strict=False)
    assert loaded.state_dict()[gone].abs().sum() > 0
    assert torch.equal(
        loaded.state_dict()["coarse_generator.conv1.conv.weight"], state["coarse_generator.conv1.conv.weight"]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"conv.weight": torch.zeros(3)}, r"no known model has tensors of these names: conv.weight"),
        ({"coarse.0.conv2d.weight": torch.zeros(64, 4, 7, 7)}, r"conv2d.weight has the shape \[64, 4, 7, 7\]"),
        ({"iteration": 3}, "it holds no tensors by name"),
        ([1, 2], "it holds no tensors by name"),
        ({"localD": {"a.weight": torch.zeros(1)}}, "a discriminator's file"),
    ],
)
def test_files_of_other_networks(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(saved(content, tmp_path / "other.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a checkpoint of torch, safetensors, Torch7 or TensorFlow"),
        (b"<html>Quota exceeded", "expected a checkpoint of .* starts with b'<html>Qu'"),
        (b"\x89HDF\r\n\x1a\n and more", "a Keras file"),
        (b"version https://git-lfs", "expected a checkpoint"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, message):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"nothing.pth: no such file"):
        load_pretrained(tmp_path / "nothing.pth")


# Our own files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        (GLCIC, {"dialect": "iizuka", "mean_color": [0.1, 0.2, 0.3]}),
        (CSA, {"channels": 4, "depth": 6, "variant": "paper", "gradient": "exact"}),
    ],
)
def test_written_models_are_loaded_as_they_were_made(model, arguments, tmp_path):
    written = model(**arguments)
    origin = {"repository": "somebody/something", "licence": "that of the photos"}
    metadata = pretrained.write_model(written, arguments, tmp_path / "m.safetensors", origin)
    assert metadata["licence"] == "that of the photos"
    pretrained._said.clear()
    with pytest.warns(LicenceNotice, match=r"weights of somebody/something, licence: that of the photos"):
        loaded = load_pretrained(tmp_path / "m.safetensors")
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in written.state_dict().items())
    image, mask = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
    mask[..., 16:40, 16:40] = 1
    with torch.no_grad():
        assert torch.equal(loaded(image, mask).output, written.eval()(image, mask).output)
