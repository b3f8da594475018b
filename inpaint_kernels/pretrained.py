"""Published checkpoints into our models, and out of them into one safe format."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inpaint_kernels import checkpoint_files
from inpaint_kernels._files import check_output, write_atomically
from inpaint_kernels.checkpoint_files import CheckpointError, Contents, torch7
from inpaint_kernels.models import GLCIC, InpaintingModel, checkpoints
from inpaint_kernels.models.checkpoints import Converted, Layout
from inpaint_kernels.models.edge_connect import fold_spectral_norm as fold

__all__ = [
    "CheckpointError",
    "LicenceNotice",
    "Pretrained",
    "convert_checkpoint",
    "load_pretrained",
    "read_pretrained",
    "write_model",
]

_UNSEEN = ("dialect", "mean_color", "variant", "gradient")
"""Arguments of models that the tensors do not tell."""
_METADATA = "inpaint_kernels"
"""Key of the metadata of what :func:`convert_checkpoint` writes."""


class LicenceNotice(UserWarning):
    """Under which licence loaded weights are; said once in a process for each licence and repository."""


@dataclass(frozen=True)
class Pretrained:
    """A model and where it comes from.

    Attributes:
        model: with its weights.
        arguments: that it was made with.
        layout: of the file.
        files: that were read.
        licence: of the weights.
    """

    model: InpaintingModel
    arguments: dict[str, Any]
    layout: Layout
    files: tuple[Path, ...]
    licence: str


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    dialect: str | None = None,
    strict: bool = True,
    fold_spectral_norm: bool = False,
) -> InpaintingModel:
    """The model whose weights a published checkpoint holds, on the CPU, in float32 and in evaluation mode.

    System and dialect are recognised by the names of the tensors, whatever the file is called and wrapped in; nothing
    in the file is run. Networks that were trained on BGR become ones for RGB, exactly. The table
    ``inpaint_kernels.models.checkpoints.LAYOUTS`` lists what is known.

    Args:
        path: a file of ``torch.save`` (.pth, .pt, .p), safetensors, Torch7 (.t7), or a TensorFlow checkpoint (its
            .index, its prefix or its folder). Of EdgeConnect and CSA one of their two files, the other beside it, or
            the folder of both.
        dialect: of the model, where the one that the weights were published with is not wanted. For example
            "official" for nipponjo's converted weights, whose code leaves out the fuse.
        strict: whether tensors that are missing or not needed are an error; else they are warned of, and what is
            missing keeps its random start.
        fold_spectral_norm: whether EdgeConnect's spectral norms are divided into the weights once and for all: the same
            outputs, not to be trained on.

    Returns:
        A model of :mod:`inpaint_kernels.models`.

    Raises:
        CheckpointError: no such file; damaged, cut off, or of no known kind; a tensor is missing, not needed or of
            another shape than the model's; the message names the first one.
        ValueError: the dialect is none of the model's.

    Warns:
        LicenceNotice: the licence of the weights; most of the published ones are not for commercial use.
    """
    pretrained = read_pretrained(path, dialect=dialect, strict=strict)
    if fold_spectral_norm:
        fold(pretrained.model)
    return pretrained.model


def read_pretrained(path: str | os.PathLike[str], *, dialect: str | None = None, strict: bool = True) -> Pretrained:
    """:func:`load_pretrained`, with what the file says beside the weights."""
    pretrained = _load(Path(path), dialect, strict)
    _say_licence(pretrained)
    return pretrained


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dialect: str | None = None,
    force: bool = False,
) -> dict[str, str]:
    """Write what :func:`load_pretrained` reads as one safetensors file, which it reads too.

    Args:
        source: as there.
        target: the file to write, which must end in ``.safetensors``; it appears whole or not at all.
        dialect: as there.
        force: whether an existing file is replaced.

    Returns:
        The metadata in the file: model, arguments (JSON), dialect, source, sha256, repository and licence.

    Raises:
        CheckpointError: as there.
        OutputError: the target cannot be written, exists, or is the source.
        ValueError: it ends in something else.
    """
    if Path(target).suffix != ".safetensors":
        raise ValueError(f"target: expected a name that ends in .safetensors, got {os.fspath(target)!r}")
    check_output(target, force=force, inputs=[source])
    pretrained = read_pretrained(source, dialect=dialect)
    origin = {
        "source": " ".join(file.name for file in pretrained.files),
        "sha256": " ".join(_sha256(file) for file in pretrained.files),
        "repository": pretrained.layout.repository,
        "licence": pretrained.licence,
    }
    return write_model(pretrained.model, pretrained.arguments, target, origin)


def write_model(
    model: InpaintingModel,
    arguments: Mapping[str, Any],
    target: str | os.PathLike[str],
    origin: Mapping[str, str],
) -> dict[str, str]:
    """Write a model as a safetensors file that :func:`load_pretrained` reads; it appears whole or not at all.

    Args:
        model: on any device.
        arguments: that it was made with; plain values.
        target: the file; replaced where it exists.
        origin: where the weights are from, as strings: "repository" and "licence", and what else is known.

    Returns:
        The metadata in the file.
    """
    from safetensors.torch import save

    metadata = {
        "format": "pt",
        _METADATA: "1",
        "model": type(model).__name__,
        "arguments": json.dumps(dict(arguments)),
        "dialect": arguments.get("dialect", ""),
        **origin,
    }
    content = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, metadata)
    write_atomically(target, lambda stream: stream.write(content))
    return metadata


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# Licences -------------------------------------------------------------------------------------------------------------

_said: set[tuple[str, str]] = set()


def _say_licence(pretrained: Pretrained) -> None:
    notice = (pretrained.layout.repository, pretrained.licence)
    if notice not in _said:
        _said.add(notice)
        text = f"{pretrained.files[0].name}: weights of {notice[0]}, licence: {notice[1]}"
        warnings.warn(text, LicenceNotice, stacklevel=3)


# Loading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """One file of a model: what it holds under our names, and what it says beside its tensors."""

    contents: Contents
    converted: Converted
    settings: dict[str, Any]

    @property
    def path(self) -> Path:
        return self.contents.files[0]


def _load(path: Path, dialect: str | None, strict: bool) -> Pretrained:
    parts = [_read_part(_first_file(path))]
    layout = parts[0].converted.layout
    if layout.part:
        parts.append(_read_part(_partner(parts[0].path, layout)))
        _check_pair(parts)
    arguments = _arguments(parts, dialect)
    state: dict[str, Tensor] = {}
    for part in parts:
        state |= part.converted.state
    model = _with_weights(parts, arguments, state, strict)
    files = tuple(file for part in parts for file in part.contents.files)
    own = parts[0].contents.metadata if _METADATA in parts[0].contents.metadata else {}
    layout = replace(layout, repository=own.get("repository", layout.repository))
    return Pretrained(model.eval(), arguments, layout, files, own.get("licence", layout.licence))


def _read_part(path: Path) -> _Part:
    contents = checkpoint_files.read(path, wanted=_is_weight_of_tensorflow)
    value, settings = _unpacked(contents)
    recognised = checkpoints.recognise(value)
    if recognised is None:
        raise CheckpointError(f"{path}: {_why_unknown(value)}")
    layout, state = recognised
    size = sum(file.stat().st_size for file in contents.files)
    for name, tensor in state.items():
        if tensor.numel() * tensor.element_size() > size:
            raise CheckpointError(f"{path}: {name} of {list(tensor.shape)} is larger than the file of {size:,} bytes")
    converted = checkpoints.convert(layout, state)
    if converted.missing is not None:
        raise CheckpointError(f"{path}: {converted.missing} is missing; the file looks like {layout.title}")
    return _Part(contents, converted, settings | _settings_beside(path, layout))


def _is_weight_of_tensorflow(name: str) -> bool:
    return name.startswith("inpaint_net/") and name.endswith(("/kernel", "/bias"))


def _unpacked(contents: Contents) -> tuple[Any, dict[str, Any]]:
    """The tensors as dictionaries, and arguments of the model that stand beside them."""
    if contents.container == "torch7":
        return _unpacked_torch7(contents)
    if contents.container == "safetensors" and _METADATA in contents.metadata:
        return contents.value, _own_settings(contents)
    return contents.value, {}


def _unpacked_torch7(contents: Contents) -> tuple[Any, dict[str, Any]]:
    """GLCIC's ``{model = nn.Sequential, mean = tensor of RGB}``."""
    value = contents.value
    model, mean = (value.get(name) for name in ("model", "mean")) if isinstance(value, dict) else (value, None)
    settings = {}
    if isinstance(mean, Tensor) and mean.numel() == 3:
        settings["mean_color"] = tuple(float(channel) for channel in mean.flatten())
    if not isinstance(model, torch7.Torch7Object):
        return {}, settings
    try:
        return torch7.state_dict_of(model), settings
    except ValueError as error:
        raise CheckpointError(f"{contents.files[0]}: {error}") from error


def _own_settings(contents: Contents) -> dict[str, Any]:
    """Those of :data:`_UNSEEN` that were written."""
    try:
        arguments = json.loads(contents.metadata["arguments"])
        settings = {name: arguments[name] for name in _UNSEEN if name in arguments}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{contents.files[0]}: its metadata do not say the model's arguments") from error
    if "mean_color" in settings:
        settings["mean_color"] = _colour(settings["mean_color"], contents.files[0], "mean_color")
    return settings


def _settings_beside(path: Path, layout: Layout) -> dict[str, Any]:
    """Otenim's training keeps the mean of its images in a file of its own."""
    config = path.parent / "config.json"
    if layout.model is not GLCIC or layout.dialect != "otenim" or not config.is_file():
        return {}
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config}: cannot be read: {error}") from error
    mean = settings.get("mpv") if isinstance(settings, dict) else None
    return {} if mean is None else {"mean_color": _colour(mean, config, "mpv")}


def _colour(value: Any, path: Path, name: str) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(v, (int, float)) for v in value):
        raise CheckpointError(f"{path}: {name}: expected three numbers, got {value!r}")
    return tuple(float(channel) for channel in value)


def _why_unknown(value: Any) -> str:
    near = checkpoints.nearest(value)
    if near is not None:
        state = next(state for state in checkpoints.states_in(value) if near.has_names_of(state))
        return f"{near.names[0]} has the shape {list(state[near.names[0]].shape)}, which no known model has"
    names = [name for state in checkpoints.states_in(value) for name in state]
    if not names:
        return "it holds no tensors by name"
    judges = (
        "a discriminator's file? The generator's is needed: "
        if isinstance(value, dict) and any(key in value for key in ("discriminator", "localD", "globalD"))
        else ""
    )
    return (
        f"{judges}no known model has tensors of these names: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
    )


# Models in two files --------------------------------------------------------------------------------------------------


def _first_file(path: Path) -> Path:
    """A file itself; of a folder that holds a pair, the pair's first."""
    if not path.is_dir():
        return path
    names = sorted(file.name for file in path.iterdir())
    firsts = [
        name
        for name in names
        for first, second in checkpoints.PARTNERS
        if name.endswith(first) and name.removesuffix(first) + second in names
    ]
    if len(firsts) > 1:
        raise CheckpointError(f"{path}: holds several models; give one of {', '.join(firsts)}")
    return path / firsts[0] if firsts else path


def _partner(path: Path, layout: Layout) -> Path:
    """The file with the other network of the model."""
    for pair in checkpoints.PARTNERS:
        for own, other in (pair, pair[::-1]):
            if path.name.endswith(own):
                partner = path.with_name(path.name.removesuffix(own) + other)
                if partner.is_file():
                    return partner
                raise CheckpointError(f"{path}: is {layout.title}; the model's other network is missing: {partner}")
    ends = " or ".join(f"*{first} and *{second}" for first, second in checkpoints.PARTNERS)
    raise CheckpointError(
        f"{path}: is {layout.title}, one of the model's two networks; the other one is looked for by its name: {ends}"
    )


def _check_pair(parts: Sequence[_Part]) -> None:
    first, second = (part.converted for part in parts)
    if first.layout.model is not second.layout.model or first.layout.part == second.layout.part:
        raise CheckpointError(
            f"{parts[1].path}: expected the other network of {first.layout.title}, got {second.layout.title}"
        )
    if first.arguments() != second.arguments():
        raise CheckpointError(
            f"{parts[1].path}: expected a network of {first.arguments()} as {parts[0].path.name} is, "
            f"got {second.arguments()}"
        )


# The model ------------------------------------------------------------------------------------------------------------


def _arguments(parts: Sequence[_Part], dialect: str | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for part in parts:
        arguments |= part.converted.arguments() | part.settings
    if dialect is not None:
        if "dialect" not in arguments:
            raise ValueError(f"dialect: expected None for {parts[0].converted.layout.model.__name__}, got {dialect!r}")
        arguments["dialect"] = dialect
    return arguments


def _with_weights(
    parts: Sequence[_Part], arguments: dict[str, Any], state: dict[str, Tensor], strict: bool
) -> InpaintingModel:
    with torch.device("meta"):  # nothing is allocated before the shapes are known to be right
        model = _build(parts, arguments, state)
    expected = model.state_dict()
    missing = _check_tensors(parts, expected, state, strict)
    kept = {name: tensor for name, tensor in state.items() if name in expected}
    if missing:
        model = _build(parts, arguments, state)
        model.load_state_dict(kept, strict=False)
    else:
        counts = {name: torch.zeros((), dtype=torch.int64) for name in expected.keys() - kept.keys()}
        model.load_state_dict(kept | counts, assign=True)
    return model


def _build(parts: Sequence[_Part], arguments: dict[str, Any], state: dict[str, Tensor]) -> InpaintingModel:
    try:
        model = parts[0].converted.layout.model(**arguments)
    except ValueError as error:
        raise CheckpointError(f"{parts[0].path}: {error}") from error
    if not any(name.endswith("weight_orig") for name in state):
        fold(model)
    return model


def _check_tensors(
    parts: Sequence[_Part], expected: dict[str, Tensor], state: dict[str, Tensor], strict: bool
) -> list[str]:
    """Names that are missing; raises for a wrong shape, and if strict for anything missing or not needed."""
    origins = {ours: theirs for part in parts for ours, theirs in part.converted.origins.items()}
    where = " and ".join(str(part.path) for part in parts)
    for name, tensor in expected.items():
        if name in state and state[name].shape != tensor.shape:
            got, want = list(state[name].shape), list(tensor.shape)
            raise CheckpointError(f"{where}: {origins.get(name, name)}: expected the shape {want}, got {got}")
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unused = [origins.get(name, name) for name in state if name not in expected]
    unused += [name for part in parts for name in part.converted.unused]
    for kind, names in (("is missing", missing), ("is not needed", unused)):
        if names:
            others = f", and {len(names) - 1} more" if len(names) > 1 else ""
            text = f"{where}: {names[0]} {kind}{others}; the file looks like {parts[0].converted.layout.title}"
            if strict:
                raise CheckpointError(text)
            warnings.warn(text, stacklevel=5)
    return missing
