"""Our models against the public networks whose weights they load; needs their checkouts (``INPAINT_PEERS=DIR``).

Weights are drawn by their names (model_cases.py), so that the golden values of test_models.py, which guard the models
without the checkouts, are checked to be the published networks' own.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benches.peer_models import relative_error
from benches.published_models import PUBLISHED_MODELS, PublishedModel
from inpaint_kernels import load_pretrained
from tests.model_cases import golden_case, holes, photo, probes, seeded

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}
UNCHECKED = {
    "deepfill_v2-csqiangwen": "the conversion joins features and gates",
    "deepfill_v1-nbei": "rounding decides which pixels it samples where sizes are no powers of two",
}
SIZES = ((128, 128), (128, 256))
GOLDEN = json.loads((Path(__file__).parent / "golden_pictures.json").read_text())


@pytest.fixture(scope="module")
def folder() -> Path:
    given = os.environ.get("INPAINT_PEERS")
    if not given:
        pytest.skip("no checkouts of public networks (INPAINT_PEERS=DIR)")
    return Path(given)


def load(published: PublishedModel, folder: Path) -> nn.Module:
    try:
        return published.load_published(folder)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def seed(published: PublishedModel, network: nn.Module) -> None:
    """Weights drawn by the public network's own names."""
    seeded(network, gain(published))
    if published.peer_name == "naoto0804":  # it leaves out the factor that makes means of sums
        with torch.no_grad():
            for name, weight in network.named_parameters():
                if name.endswith("input_conv.weight"):
                    weight.mul_(weight[0].numel())


def gain(published: PublishedModel) -> float:
    """Of the weights, see model_cases.py."""
    return 5.0 if published.name.startswith("deepfill_v2") else 1.5


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("published", PUBLISHED_MODELS, ids=lambda published: published.name)
def test_pictures_are_the_published_ones(published: PublishedModel, dtype: torch.dtype, size: tuple[int, int], folder):
    network = load(published, folder)
    seed(published, network)
    network.to(dtype)
    height, width = size
    mask = holes(height, width, (20, 30, 60, 80), (90, 60, 110, 120)).to(dtype).repeat(2, 1, 1, 1)
    image = photo(height, width, 2, dtype)
    torch.set_default_dtype(dtype)
    try:
        expected = published.run_published(network, image * (1 - mask), mask)
    finally:
        torch.set_default_dtype(torch.float32)
    # After the run: csqiangwen's spectral norms take a step in every one.
    ours = published.load_ours(network)
    with torch.no_grad():
        result = ours(image, mask, **published.guidance(image, mask))
    actual = (result.coarse, result.output) if published.coarse else (result.output,)
    errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    print(f"{published.name:26} {dtype} {size}: {max(errors):.1e}")
    assert max(errors) <= TOLERANCES[dtype]


@pytest.mark.filterwarnings("ignore::inpaint_kernels.pretrained.LicenceNotice")
@pytest.mark.parametrize("published", PUBLISHED_MODELS, ids=lambda published: published.name)
def test_files_of_the_public_networks_load(published: PublishedModel, folder, tmp_path):
    """Saved by the public network's own code, loaded by ours: the same picture, for RGB where theirs is for BGR."""
    network = load(published, folder)
    seed(published, network)
    mask = holes(128, 128, (20, 30, 60, 80), (90, 60, 110, 120)).float().repeat(2, 1, 1, 1)
    image = photo(128, 128, 2)
    colours = 1 if published.name.endswith(("mmagic", "nbei")) else ()
    *_, expected = published.run_published(network, (image * (1 - mask)).flip(colours), mask)
    ours = load_pretrained(saved(network, tmp_path))
    with torch.no_grad():
        actual = ours(image, mask, **published.guidance(image, mask)).output
    assert relative_error(actual, expected.flip(colours)) <= 1e-4


def saved(network: nn.Module, folder: Path) -> Path:
    """A file of the network's state; of EdgeConnect the folder of both."""
    generators = dict(network.named_children())
    if generators.keys() == {"edge_generator", "inpaint_generator"}:
        for name, stage in (("EdgeModel", "edge_generator"), ("InpaintingModel", "inpaint_generator")):
            torch.save({"iteration": 1, "generator": generators[stage].state_dict()}, folder / f"{name}_gen.pth")
        return folder
    torch.save({"state_dict": network.state_dict()}, folder / "weights.pth")
    return folder / "weights.pth"


def _state_of(published: PublishedModel, network: nn.Module, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of the public network that becomes ours: found by following each tensor through the conversion."""
    state = dict(network.state_dict())
    names = list(state)
    marked = {name: torch.full_like(state[name], 1 + i, dtype=torch.float64) for i, name in enumerate(names)}
    for name, value in published.convert(marked).items():
        mark = float(value.flatten()[0])
        divided = published.peer_name == "naoto0804" and name.endswith("input_conv.weight")
        scale = float(value[0].numel()) if divided else 1.0
        state[names[round(mark * scale) - 1]] = ours[name] * scale
    return state


@pytest.mark.parametrize("published", PUBLISHED_MODELS, ids=lambda published: published.name)
def test_golden_values_are_the_published_ones(published: PublishedModel, folder):
    if published.name in UNCHECKED:
        pytest.skip(UNCHECKED[published.name])
    if published.name not in GOLDEN:
        pytest.skip("its networks' values are in golden_models.json")
    network = load(published, folder).double()
    ours = seeded(published.build(), gain(published)).double()
    network.load_state_dict(_state_of(published, network, ours.state_dict()))
    image, mask = golden_case(ours)
    torch.set_default_dtype(torch.float64)
    try:
        *coarse, output = published.run_published(network, image.masked_fill(mask, 0), mask.double())
    finally:
        torch.set_default_dtype(torch.float32)
    golden = GOLDEN[published.name]
    torch.testing.assert_close(torch.tensor(probes(output)), torch.tensor(golden["output"]), rtol=1e-6, atol=1e-7)
    for picture in coarse:
        torch.testing.assert_close(torch.tensor(probes(picture)), torch.tensor(golden["coarse"]), rtol=1e-6, atol=1e-7)
