"""The networks of a run, with what trains them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from inpaint_kernels.fillers import MODELS, name_of
from inpaint_kernels.models import InpaintingModel, perceptual
from inpaint_kernels.models import training as steps
from inpaint_kernels.models.checkpoints import OURS
from inpaint_kernels.models.perceptual import VGGFeatures, download_vgg
from inpaint_kernels.models.training import Settings, TrainingSystem
from inpaint_kernels.pretrained import read_pretrained
from inpaint_kernels.trainer.config import TrainingConfig


@dataclass(frozen=True)
class Trainee:
    """What is trained.

    Attributes:
        system: the networks and their step.
        arguments: that the model was made with.
        origin: "repository" and "licence" of the weights.
    """

    system: TrainingSystem
    arguments: dict[str, Any]
    origin: dict[str, str]

    @property
    def model(self) -> InpaintingModel:
        """The generators."""
        return self.system.model


@dataclass(frozen=True)
class _System:
    """How a system is made.

    Attributes:
        settings: their class.
        make: (model, settings, features, configuration) -> system.
        vgg: architecture and layers that its losses take; None: it takes none.
        normalise: of VGG.
    """

    settings: type[Settings]
    make: Callable[[Any, Any, Any, TrainingConfig], TrainingSystem]
    vgg: tuple[str, tuple[str, ...]] | None = None
    normalise: bool = False


def _deepfill_v1(model: Any, settings: Any, _: Any, config: TrainingConfig) -> TrainingSystem:
    assert config.window is not None  # the configuration has seen to it
    return steps.DeepFillV1Training(model, settings, image_size=config.image_size, box_size=config.window)


def _glcic(model: Any, settings: Any, _: Any, config: TrainingConfig) -> TrainingSystem:
    assert config.window is not None
    layers = 6 if config.image_size >= 256 else 5  # otenim's "places2", and its "celeba" of 160 pixels
    return steps.GLCICTraining(
        model, settings, image_size=config.image_size, box_size=config.window, global_layers=layers
    )


_SYSTEMS: Mapping[str, _System] = {
    "deepfill_v1": _System(steps.DeepFillV1Settings, _deepfill_v1),
    "deepfill_v2": _System(
        steps.DeepFillV2Settings, lambda model, settings, _, config: steps.DeepFillV2Training(model, settings)
    ),
    "glcic": _System(steps.GLCICSettings, _glcic),
    "edge_connect": _System(
        steps.EdgeConnectSettings,
        lambda model, settings, features, config: steps.EdgeConnectTraining(model, features, settings),
        ("vgg19", (*perceptual.EDGE_CONNECT_CONTENT, *perceptual.EDGE_CONNECT_STYLE)),
    ),
    "csa": _System(
        steps.CSASettings,
        lambda model, settings, features, config: steps.CSATraining(model, features, settings),
        ("vgg16", (perceptual.CSA_ADVERSARIAL, perceptual.CSA_CONSISTENCY)),
    ),
    "guided_face": _System(
        steps.GuidedFaceSettings,
        lambda model, settings, features, config: steps.GuidedFaceTraining(model, features, settings),
        ("vgg16", perceptual.GUIDED_FACE),
    ),
    "partial_conv_unet": _System(
        steps.PartialConvSettings,
        lambda model, settings, features, config: steps.PartialConvTraining(model, features, settings),
        ("vgg16", perceptual.PARTIAL_CONV),
        normalise=True,
    ),
}


def make_trainee(config: TrainingConfig, device: torch.device) -> Trainee:
    """The networks of a run before its first step; their random weights depend on the seed alone.

    Raises:
        ValueError: the configuration's ``model``, ``start``, ``settings``, ``vgg`` or ``phases`` do not fit the system;
            the message names it.
        CheckpointError: the weights cannot be read.
    """
    system = _SYSTEMS[config.system]
    settings = _settings(system.settings, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model, arguments, origin = _model(config)
        features = _features(system, config, device)
        trained = system.make(model.to(device), settings, features, config)
    for phase in config.phases:
        if phase.name not in trained.phases:
            raise ValueError(f"phases: expected names out of {', '.join(trained.phases)}, got {phase.name!r}")
    return Trainee(trained, arguments, origin)


def _settings(kind: type[Settings], config: TrainingConfig) -> Settings:
    known = {field.name for field in fields(kind)}
    for name in config.settings:
        if name not in known:
            raise ValueError(f"settings.{name}: expected one of {', '.join(sorted(known))}")
    try:
        return TypeAdapter(kind).validate_python(config.settings)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(["settings", *map(str, problem["loc"])])
        raise ValueError(f"{where}: {problem['msg'].removeprefix('Value error, ')}") from error


def _model(config: TrainingConfig) -> tuple[InpaintingModel, dict[str, Any], dict[str, str]]:
    kind = MODELS[config.system]
    if config.start is None:
        dialect = inspect.signature(kind).parameters.get("dialect")
        arguments = ({} if dialect is None else {"dialect": dialect.default}) | config.model
        try:
            return kind(**arguments), arguments, {"repository": OURS, "licence": "that of the photos"}
        except TypeError as error:
            raise ValueError(f"model: {error}") from error
    beside = config.model.keys() - {"dialect"}
    if beside:
        raise ValueError(f"model.{min(beside)}: the weights of {config.start} say that")
    pretrained = read_pretrained(config.start, dialect=config.model.get("dialect"))
    if not isinstance(pretrained.model, kind):
        raise ValueError(f"start: {config.start} holds {name_of(pretrained.model)}, expected {config.system}")
    origin = {
        "repository": pretrained.layout.repository,
        "licence": pretrained.licence,
        "trained on from": Path(config.start).name,
    }
    return pretrained.model, pretrained.arguments, origin


def _features(
    system: _System, config: TrainingConfig, device: torch.device
) -> Callable[[Tensor], Mapping[str, Tensor]] | None:
    if system.vgg is None:
        if config.vgg is not None:
            raise ValueError(f"vgg: {config.system} takes none, got {str(config.vgg)!r}")
        return None
    architecture, layers = system.vgg
    if config.vgg is None:
        if all(phase.name == "guide" for phase in config.phases):
            return None
        raise ValueError(
            f"vgg: expected torchvision's file of {architecture}, or 'download', or for a trial 'random', got none"
        )
    if config.vgg == "random":
        weights = None
    else:
        weights = download_vgg(architecture) if config.vgg == "download" else config.vgg
    return VGGFeatures(architecture, layers, weights=weights, normalise=system.normalise).to(device)
