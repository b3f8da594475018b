"""``accelerate`` on whole unmodified public networks, and on their training.

Optional: needs a folder with checkouts of the public repositories (``INPAINT_PEERS=DIR``, or ``--peers DIR`` where
benches/ is collected too); see benches/peer_models.py.

In float64 the gradients are compared to rounding. In float32 they cannot be: where a ReLU's input is zero to rounding,
another order of the same sums switches it, and the gradient of a deep network changes by up to some percent. There the
measure is what the published network itself changes by when its own convolutions are summed in another order.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benches.peer_models import (
    PEER_MODELS,
    Inputs,
    Outcome,
    PeerModel,
    copy_of_state,
    csa_depth,
    csa_options,
    hole_mask,
    relative_error,
    run,
    smooth_image,
)
from benches.peers import CSA_REPOSITORY, csa_as_written_for, find_checkout, import_file, import_module
from benches.published_trainer import REPOSITORY, PublishedTrainer
from inpaint_kernels import accelerate, accelerated

TOLERANCE = 1e-4
TOLERANCE_FLOAT64 = 1e-9
MMAGIC = ("mmagic_deepfillv1", "mmagic_deepfillv2")
# More than 15 seconds on two cores.
SLOW = ("mmagic_pconv", "naoto0804", "nvidia_resnet", "rfr", "tanimutomo", "ryanwongsa", "ctsdg", "madf")
SLOW_FLOAT64 = (*SLOW, "csqiangwen", "knazeri_inpaint", "knazeri_edge", "otenim", "csa", "lbam", *MMAGIC)


def _parametrize(slow: tuple[str, ...]) -> pytest.MarkDecorator:
    marks = {peer.name: [pytest.mark.slow] if peer.name in slow else [] for peer in PEER_MODELS}
    return pytest.mark.parametrize("peer", [pytest.param(p, id=p.name, marks=marks[p.name]) for p in PEER_MODELS])


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    given = request.config.getoption("--peers", None) or os.environ.get("INPAINT_PEERS")
    if not given:
        pytest.skip("no checkouts of public networks (INPAINT_PEERS=DIR)")
    return Path(given)


def _load(peer: PeerModel, folder: Path) -> nn.Module:
    if find_checkout(peer.repository, folder) is None:
        pytest.skip(f"no checkout of {peer.repository} in {folder}")
    return peer.load(folder)


def _double(nested: Any) -> Any:
    return nested.double() if isinstance(nested, Tensor) else tuple(_double(part) for part in nested)


def _run_from(state: dict[str, Tensor], peer: PeerModel, model: nn.Module, inputs: Inputs, **options: Any) -> Outcome:
    model.load_state_dict(state)
    return run(peer, model, inputs, **options)


# One pass ------------------------------------------------------------------------------------------------------------


def _as_one(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.double().flatten() for name, g in gradients.items() if name != "input"])


def _errors(actual: Outcome, expected: Outcome) -> dict[str, float]:
    """How far two passes are apart: outputs, gradients as a whole, and the worst gradient of a single layer."""
    assert actual.gradients.keys() == expected.gradients.keys()
    assert actual.state.keys() == expected.state.keys()
    pairs = zip(actual.outputs, expected.outputs, strict=True)
    result = {f"output {i}": relative_error(*pair) for i, pair in enumerate(pairs)}
    result["state"] = max(
        (relative_error(actual.state[name], value) for name, value in expected.state.items() if value.numel()),
        default=0.0,
    )
    if expected.gradients:
        result["input"] = relative_error(actual.gradients["input"], expected.gradients["input"])
        result["parameters"] = relative_error(_as_one(actual.gradients), _as_one(expected.gradients))
        result["layer"] = _worst_layer(actual.gradients, expected.gradients)
    return result


def _worst_layer(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of a parameter's gradient, in units of the largest gradient in its layer.

    A bias before a norm has gradient zero but for rounding. Layers with less than a thousandth of the whole gradient
    count as if they had that.
    """
    units: dict[str, float] = {}
    for name, gradient in expected.items():
        layer = name.rpartition(".")[0]
        units[layer] = max(units.get(layer, 0.0), gradient.double().norm().item())
    least = 1e-3 * _as_one(expected).norm().item()
    return max(
        relative_error(actual[name], gradient, max(units[name.rpartition(".")[0]], least))
        for name, gradient in expected.items()
    )


def _assert_close(actual: Outcome, expected: Outcome, noise: dict[str, float], tolerance: float) -> None:
    """The ``tolerance`` or, where the network's own rounding ``noise`` is more than that, a few times this."""
    for what, error in _errors(actual, expected).items():
        allowed = max(tolerance, (10 if what == "layer" else 4) * noise.get(what, 0.0))
        assert error <= allowed, f"{what}: {error:.1e}, more than {allowed:.1e}"
    for mask, published in zip(actual.others, expected.others, strict=True):
        assert (mask == published).double().mean() >= 0.99  # an attention's flow: ties


def _assert_same_bits(actual: Outcome, expected: Outcome) -> None:
    assert all(map(torch.equal, actual.outputs + actual.others, expected.outputs + expected.others))
    for got, wanted in ((actual.gradients, expected.gradients), (actual.state, expected.state)):
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], value) for name, value in wanted.items())


def _check_training_pass(peer: PeerModel, model: nn.Module, inputs: Inputs, tolerance: float) -> None:
    state, classes = copy_of_state(model), [type(module) for module in model.modules()]
    published = run(peer, model, inputs)
    with torch.backends.mkldnn.flags(enabled=False):
        noise = _errors(_run_from(state, peer, model, inputs), published)
    model.load_state_dict(state)

    report = accelerate(model)
    assert str(report).strip()
    print(f"\n{peer.name}\n{report}")
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[name], value) for name, value in state.items())
    _assert_close(_run_from(state, peer, model, inputs), published, noise, tolerance)

    report.undo()
    assert [type(module) for module in model.modules()] == classes
    _assert_same_bits(_run_from(state, peer, model, inputs), published)


@_parametrize(SLOW)
def test_training_pass(peer, folder):
    model = _load(peer, folder)
    _check_training_pass(peer, model, peer.inputs(peer.size, peer.batch, 1), TOLERANCE)


@_parametrize(SLOW_FLOAT64)
def test_training_pass_in_float64(peer, folder):
    model = _load(peer, folder).double()
    _check_training_pass(peer, model, _double(peer.inputs(peer.size, peer.batch, 1)), TOLERANCE_FLOAT64)


@_parametrize(SLOW)
def test_inference(peer, folder):
    model = _load(peer, folder)
    inputs = peer.inputs(peer.size, peer.batch, 1)
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = 1.0  # one pass, and its statistics are those of the features
    run(peer, model, inputs)
    model.eval()
    state = copy_of_state(model)
    published = run(peer, model, inputs, backward=False)
    with torch.backends.mkldnn.flags(enabled=False):
        noise = _errors(run(peer, model, inputs, backward=False), published)
    with accelerated(model) as report:
        assert str(report).strip()
        _assert_close(run(peer, model, inputs, backward=False), published, noise, TOLERANCE)
    _assert_same_bits(_run_from(state, peer, model, inputs, backward=False), published)


# Twenty steps of training --------------------------------------------------------------------------------------------

STEPS = 20
Losses = list[dict[str, float]]
Networks = Callable[..., None]
"""What a trainer calls with its networks before it starts."""


def _batches(size: int, batch: int, mask_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(STEPS):
        yield smooth_image(size, batch, 100 + step), hole_mask(size, mask_batch, 200 + step)


def _checkout(repository: str, folder: Path) -> Path:
    checkout = find_checkout(repository, folder)
    if checkout is None:
        pytest.skip(f"no checkout of {repository} in {folder}")
    return checkout


def _train_daa233(folder: Path, prepare: Networks, critics: bool = False) -> Losses:
    """Its trainer, which updates generator and critics in every step, on images of 64."""
    size, hole = 64, 32
    published = PublishedTrainer(_checkout(REPOSITORY, folder), size, hole)
    trainer = published.trainer
    prepare(trainer if critics else trainer.netG)
    places, result = np.random.default_rng(0), []
    for image, _ in _batches(size, 2, 1):
        top, left = places.integers(0, size - hole, 2).tolist()
        boxes, mask = torch.tensor([[top, left, hole, hole]] * 2), torch.zeros(2, 1, size, size)
        mask[:, :, top + 4 : top + hole - 4, left + 4 : left + hole - 4] = 1
        losses = published.losses(image * (1 - mask), boxes, mask, image)
        published.step(losses)
        result.append({name: loss.item() for name, loss in losses.items()})
    return result


def _train_nipponjo(folder: Path, prepare: Networks) -> Losses:
    """The loop of its train.py, on images of 64."""
    checkout = _checkout("nipponjo/deepfillv2-pytorch", folder)
    module, losses = import_file(checkout, "model/networks.py"), import_file(checkout, "model/losses.py")
    generator = module.Generator(cnum_in=5, cnum_out=3, cnum=48, return_flow=False)
    discriminator = module.Discriminator(cnum_in=4, cnum=64)
    generator.train()
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=1e-4, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=1e-4, betas=(0.5, 0.999))
    prepare(generator)
    result = []
    for real, mask in _batches(64, 4, 1):
        incomplete, masks = real * (1 - mask), mask.tile(4, 1, 1, 1)
        ones = torch.ones_like(incomplete)[:, :1]
        first, second = generator(torch.cat([incomplete, ones, ones * mask], 1), mask)
        complete = second * mask + incomplete * (1 - mask)
        pairs = torch.cat([torch.cat([real, masks], 1), torch.cat([complete.detach(), masks], 1)])
        loss_d = losses.hinge_loss_d(*torch.split(discriminator(pairs), 4))
        optimizer_d.zero_grad()
        loss_d.backward()
        optimizer_d.step()
        loss_1, loss_2 = (real - first).abs().mean(), (real - second).abs().mean()
        loss_g = losses.hinge_loss_g(discriminator(torch.cat([complete, masks], 1))) + loss_1 + loss_2
        optimizer_g.zero_grad()
        loss_g.backward()
        optimizer_g.step()
        named = {"d": loss_d, "g": loss_g, "ae1": loss_1, "ae2": loss_2}
        result.append({name: loss.item() for name, loss in named.items()})
    return result


def _vgg16(**_: object) -> SimpleNamespace:
    """In place of torchvision's pretrained network: the same layers, with random weights."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width:
            convolution = nn.Conv2d(channels, width, 3, padding=1)
            nn.init.kaiming_normal_(convolution.weight)
            layers += [convolution, nn.ReLU(inplace=True)]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2))
    return SimpleNamespace(features=layers)


def _train_csa(folder: Path, prepare: Networks) -> Losses:
    """Its trainer: two generators, two discriminators and the loss in between, on images of 64."""
    checkout = _checkout(CSA_REPOSITORY, folder)
    size = 64
    vision, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    vars(models)["vgg16"], vars(vision)["models"] = _vgg16, models
    module = import_module(checkout, "models.CSA", provided={"torchvision": vision, "torchvision.models": models})
    networks = module.networks

    def of_depth(network: Any) -> Callable[..., None]:
        published = network.__init__

        def build(self: nn.Module, in_channels: int, out_channels: int, _: int, *rest: Any, **options: Any) -> None:
            published(self, in_channels, out_channels, csa_depth(size), *rest, **options)

        return build

    fill = Tensor.masked_fill_

    def fill_by_bytes(tensor: Tensor, mask: Tensor, value: float) -> Tensor:
        return fill(tensor, mask.bool(), value)

    with (
        csa_as_written_for(torch.zeros(())),
        mock.patch.object(Tensor, "masked_fill_", fill_by_bytes),  # newer torch takes no masks of bytes
        # Its masks go through convolutions of the default dtype.
        mock.patch.object(Tensor, "float", lambda tensor: tensor.to(torch.get_default_dtype())),
        mock.patch.object(nn.Module, "cuda", lambda network: network),
        mock.patch.object(networks.UnetGenerator, "__init__", of_depth(networks.UnetGenerator)),
        mock.patch.object(networks.UnetGeneratorCSA, "__init__", of_depth(networks.UnetGeneratorCSA)),
    ):
        trainer = module.CSA()
        trainer.initialize(csa_options(size))
        trainer.device = torch.device("cpu")
        prepare(trainer.netG, trainer.netP)
        result = []
        for image, mask in _batches(size, 1, 1):
            trainer.set_input(image, mask.byte())
            trainer.set_gt_latent()
            trainer.optimize_parameters()
            result.append(dict(trainer.get_current_errors()))
    return result


TRAINERS: dict[str, Callable[[Path, Networks], Losses]] = {
    "daa233": _train_daa233,
    "daa233_with_critics": lambda folder, prepare: _train_daa233(folder, prepare, critics=True),
    "nipponjo": _train_nipponjo,
    "csa": _train_csa,
}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _train(trainer: str, folder: Path, dtype: torch.dtype, prepare: Networks) -> tuple[Losses, Tensor]:
    """The losses of every step, and how far training moved the parameters of the networks given to ``prepare``."""
    parameters: list[nn.Parameter] = []
    start: list[Tensor] = []

    def before(*networks: nn.Module) -> None:
        parameters.extend(parameter for network in networks for parameter in network.parameters())
        start.extend(parameter.detach().clone() for parameter in parameters)
        prepare(*networks)

    torch.manual_seed(0)
    with _default_dtype(dtype):
        losses = TRAINERS[trainer](folder, before)
    assert all(math.isfinite(loss) for step in losses for loss in step.values())
    moved = [(now.detach() - then).flatten() for now, then in zip(parameters, start, strict=True)]
    return losses, torch.cat(moved)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "dtype"),
    [*((trainer, torch.float64) for trainer in TRAINERS), ("daa233", torch.float32)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_training_steps_give_the_published_losses(trainer, dtype, folder):
    published, _ = _train(trainer, folder, dtype, lambda *networks: None)
    reports: list[object] = []
    losses, _ = _train(trainer, folder, dtype, lambda *networks: reports.extend(map(accelerate, networks)))
    assert all(str(report).strip() for report in reports)
    assert len(losses) == len(published) == STEPS
    for name in published[0]:
        scale = max(abs(step[name]) for step in published)
        for step, (got, wanted) in enumerate(zip(losses, published, strict=True)):
            assert abs(got[name] - wanted[name]) <= 1e-3 * scale, f"{name}, step {step}"


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_first_training_steps_move_parameters_as_published(trainer, folder, monkeypatch):
    """In float64. It says more than losses: fresh from its initialisation nipponjo's generator gives images of 1e-6.

    The first steps only: CSA's training doubles a difference with every step, from 1e-8 after 5 to 6e-3 after 20.
    """
    monkeypatch.setattr(sys.modules[__name__], "STEPS", 5)
    _, published = _train(trainer, folder, torch.float64, lambda *networks: None)
    reports: list[object] = []
    _, moved = _train(trainer, folder, torch.float64, lambda *networks: reports.extend(map(accelerate, networks)))
    assert reports
    assert published.norm() > 0
    assert relative_error(moved, published) <= 1e-6
