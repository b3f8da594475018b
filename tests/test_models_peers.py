"""Our networks and systems against the published code, weights and all.

Optional: needs a folder with checkouts (``INPAINT_PEERS=DIR``), see tests/model_pairs.py and benches/peer_models.py.
Both get the same weights: numbers mixed from the keys, biases and norms among them, which start trivial as published.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from inpaint_kernels.models.csa import CSA
from inpaint_kernels.models.edge_connect import EdgeConnect
from torch import Tensor, nn

from benches.peer_models import csa_options, relative_error, tensors_in
from benches.peers import CSA_REPOSITORY, csa_as_written_for, find_checkout, import_file, import_module
from tests.model_pairs import (
    CSA_CHANNELS,
    CSA_DEPTH,
    EDGE_CONNECT,
    PAIRS,
    Pair,
    Size,
    csa_mask,
    edges,
    hashed_image,
    hashed_state,
    holes,
    published_coarse,
    published_refinement,
)

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-10}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCES]


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    given = request.config.getoption("--peers", None) or os.environ.get("INPAINT_PEERS")
    if not given:
        pytest.skip("no checkouts of public networks (INPAINT_PEERS=DIR)")
    return Path(given)


def _checkout(repository: str, folder: Path) -> Path:
    checkout = find_checkout(repository, folder)
    if checkout is None:
        pytest.skip(f"no checkout of {repository} in {folder}")
    return checkout


def _to(dtype: torch.dtype, values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in values)


def _assert_equal(name: str, actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    errors = [relative_error(*pair) for pair in zip(actual, expected, strict=True)]
    print(f"{name:28} {str(dtype).removeprefix('torch.')}  {max(errors):.1e}")
    assert max(errors) <= TOLERANCES[dtype], (name, errors)


# Networks -------------------------------------------------------------------------------------------------------------

CASES = [
    pytest.param(pair, size, id=f"{pair.name}-{size[0]}x{size[1]}", marks=[pytest.mark.slow] if pair.slow else [])
    for pair in PAIRS
    for size in pair.sizes
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pair", "size"), CASES)
def test_network_equals_the_published_one(pair: Pair, size: Size, dtype: torch.dtype, folder: Path):
    checkout = _checkout(pair.repository, folder)
    inputs = _to(dtype, pair.inputs(size, pair.batch))
    first, *_ = inputs
    with pair.running(torch.zeros(())):
        published = pair.published(checkout, size).eval()
    published.load_state_dict(hashed_state(published.state_dict()))
    ours = pair.ours().eval()
    ours.load_state_dict(pair.transfer(published.state_dict()))
    ours.to(dtype), published.to(dtype)
    with torch.no_grad(), pair.running(first):
        expected = tensors_in(published(*_copies(pair.published_inputs(inputs))))
    with torch.no_grad():
        actual = tensors_in(ours(*inputs))
    recorded = [output.detach() for output in tensors_in(ours(*inputs))]
    name = f"{pair.name} {size[0]}x{size[1]}"
    _assert_equal(name, actual, expected, dtype)
    _assert_equal(f"{name} (recorded)", recorded, expected, dtype)


def _copies(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Published networks overwrite their inputs."""
    return tuple(v.clone() for v in values)


# Systems --------------------------------------------------------------------------------------------------------------


def _load(network: nn.Module) -> nn.Module:
    network.load_state_dict(hashed_state(network.state_dict()))
    return network.eval()


@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_connect_equals_the_published_test(dtype: torch.dtype, folder: Path):
    """The published forwards of both models, on what its Dataset loads in test mode: Canny's edges of known pixels."""
    feature, color = pytest.importorskip("skimage.feature"), pytest.importorskip("skimage.color")
    checkout = _checkout(EDGE_CONNECT, folder)
    networks = import_file(checkout, "src/networks.py")
    models = import_module(checkout, "src.models", stand_ins=("torchvision",))
    size = (64, 80)
    image, mask = _to(dtype, (hashed_image(size, 1), holes(size, 1)))
    gray = color.rgb2gray(image[0].permute(1, 2, 0).double().numpy())
    found = feature.canny(gray, sigma=2, mask=(1 - mask[0, 0]).bool().numpy())
    gray_map, canny_map = (torch.from_numpy(x)[None, None].to(dtype) for x in (gray, found))
    assert canny_map.sum() > 20
    edge, inpaint = (
        SimpleNamespace(generator=_load(n).to(dtype)) for n in (networks.EdgeGenerator(), networks.InpaintGenerator())
    )
    with torch.no_grad():
        predicted = models.EdgeModel.forward(edge, gray_map, canny_map, mask)
        output = models.InpaintingModel.forward(inpaint, image, predicted, mask)
    merged = output * mask + image * (1 - mask)

    model = EdgeConnect().eval()
    model.edge_generator.load_state_dict(edge.generator.state_dict())
    model.inpaint_generator.load_state_dict(inpaint.generator.state_dict())
    with torch.no_grad():
        result = model.to(dtype)(image, mask)
    assert result.edges is not None
    actual, expected = [result.edges, result.output, result.completed], [predicted, output, merged]
    _assert_equal("EdgeConnect.test", actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_connect_equals_the_published_joint_training_flow(dtype: torch.dtype, folder: Path):
    checkout = _checkout(EDGE_CONNECT, folder)
    networks = import_file(checkout, "src/networks.py")
    size = (64, 80)
    image, mask, known = _to(dtype, (hashed_image(size, 2), holes(size, 2), edges(size, 2)))
    edge, inpaint = _load(networks.EdgeGenerator()).to(dtype), _load(networks.InpaintGenerator()).to(dtype)
    gray = (image * image.new_tensor((0.2125, 0.7154, 0.0721)).view(1, 3, 1, 1)).sum(1, keepdim=True)
    with torch.no_grad():
        predicted = edge(torch.cat([gray * (1 - mask) + mask, known * (1 - mask), mask], 1))
        guide = predicted * mask + known * (1 - mask)
        output = inpaint(torch.cat([image * (1 - mask) + mask, guide], 1))
    model = EdgeConnect().eval()
    model.edge_generator.load_state_dict(edge.state_dict())
    model.inpaint_generator.load_state_dict(inpaint.state_dict())
    with torch.no_grad():
        result = model.to(dtype)(image, mask, canny_edges=known, edge_composite=True)
    assert result.edges is not None
    _assert_equal("EdgeConnect, composite", [result.edges, result.output], [guide, output], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_csa_equals_the_published_flow(dtype: torch.dtype, folder: Path):
    """``set_input`` and ``test`` of the published model, with slim networks and masks of bool instead of bytes."""
    checkout = _checkout(CSA_REPOSITORY, folder)
    size = (64, 64)
    image, mask = _to(dtype, (hashed_image(size, 1), csa_mask(size)))
    with csa_as_written_for(torch.zeros(())):
        system = import_module(checkout, "models.CSA", stand_ins=("torchvision",)).CSA()
        coarse, refinement = _load(published_coarse(checkout)), _load(published_refinement(checkout, size))
    latent = SimpleNamespace(set_mask=lambda *_: None)
    options = csa_options(size[0])
    options.mask_type = "random"
    vars(system).update(
        opt=options,
        device=torch.device("cpu"),
        mask_global=torch.zeros(0),
        input_A=image.new_empty(0),
        input_B=image.new_empty(0),
        netP=coarse.to(dtype),
        netG=refinement.to(dtype),
        Cosis_list=[latent],
        Cosis_list2=[latent],
        CSA_model=[latent],
    )
    with torch.no_grad(), csa_as_written_for(image), mock.patch.object(Tensor, "byte", Tensor.bool):
        system.set_input(2 * image - 1, mask.bool())
        system.test()

    model = CSA(CSA_CHANNELS, CSA_DEPTH).eval()
    model.coarse_generator.load_state_dict(coarse.state_dict())
    model.refinement_generator.load_state_dict(refinement.state_dict())
    with torch.no_grad():
        stages = model.to(dtype).stages(image, mask.bool())
    _assert_equal("CSA.test", [stages.coarse, stages.output], [system.fake_P, system.fake_B], dtype)
