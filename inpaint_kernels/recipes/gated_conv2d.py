"""Blocks that compute ``activation(features) * sigmoid(gate)`` of one convolution or two."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inpaint_kernels.ops.dilated_conv2d import dilated_conv2d
from inpaint_kernels.ops.gated_conv2d import gated_conv2d
from inpaint_kernels.recipes._class_swap import child_at
from inpaint_kernels.recipes._convolution import (
    FUSED_ACTIVATIONS,
    BlockRecipe,
    BlockReplacement,
    Padding,
    Parts,
    activation_of,
    block_mismatch,
    map_kinds,
    paddings_of,
    parts_of,
    weight_of,
    weight_source,
)
from inpaint_kernels.recipes._replacement import Call, Replacement


@dataclass(frozen=True)
class GatedBlock(BlockReplacement):
    """A gated convolution with what stands around it.

    Attributes:
        parts: of the block.
        features: path of the convolution of the features, or of features and gate.
        gate: path of the gate's own convolution; empty: features has both.
        sources: paths of the modules that set their weights.
        padding: in front.
        activation: name and slope, fused; None: the module ``called_activation`` is called.
        called_activation: its path; empty: none.
        norm: path of a norm; empty: none.
        norm_first: whether the features' norm comes before the activation, instead of after the gate.
        gate_first: whether the gate is the first half of the channels.
        upsample: 2: the block doubles its input's sides first.
    """

    recipe: ClassVar[str] = "gated_conv2d"
    parts: Parts
    features: str
    gate: str
    sources: tuple[str, ...]
    padding: Padding
    activation: tuple[str, float] | None
    called_activation: str
    norm: str
    norm_first: bool
    gate_first: bool
    upsample: int

    @property
    def called(self) -> tuple[str, ...]:  # type: ignore[override]
        """Modules that are still called."""
        return tuple(path for path in (self.norm, self.called_activation) if path)

    def semantics(self) -> str:
        """The kind of gate."""
        act = self.activation[0] if self.activation is not None else "own"
        words = [
            "two convolutions" if self.gate else "gate first" if self.gate_first else "features first",
            f"{act} activation",
        ]
        if self.norm:
            words.append("norm before the activation" if self.norm_first else "norm after the gate")
        if self.upsample > 1:
            words.append("upsampled first")
        return ", ".join(words) + str(self.padding)

    def kinds(self, module: nn.Module, *args: Any, **kwargs: Any) -> frozenset[str] | str:
        """One map."""
        conv: Any = child_at(module, self.features)
        return map_kinds(conv, args, kwargs)

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """The block's output."""
        (x,) = args
        conv: Any = child_at(module, self.features)
        weight, bias = weight_of(module, self.features, self.sources[0])
        gate_weight, gate_bias = weight_of(module, self.gate, self.sources[1]) if self.gate else (None, None)
        x, padding, padding_mode = self.padding.apply(module, conv, x)
        if self.activation is not None and not (self.norm and self.norm_first):
            name, slope = self.activation
            y = gated_conv2d(
                x,
                weight,
                bias,
                conv.stride,
                padding,
                conv.dilation,
                conv.groups,
                gate_weight=gate_weight,
                gate_bias=gate_bias,
                activation=name,
                negative_slope=slope,
                padding_mode=padding_mode,
                upsample=self.upsample,
                gate_order="gate_first" if self.gate_first else "feature_first",
            )
        else:
            y = self._in_steps(module, x, weight, bias, gate_weight, gate_bias, padding, padding_mode)
        return child_at(module, self.norm)(y) if self.norm and not self.norm_first else y

    def _in_steps(
        self,
        module: nn.Module,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate_weight: Tensor | None,
        gate_bias: Tensor | None,
        padding: tuple[int, int],
        padding_mode: str,
    ) -> Tensor:
        """With a norm or an activation between convolution and gate that no kernel has."""
        conv: Any = child_at(module, self.features)
        if gate_weight is not None:
            weight = torch.cat((weight, gate_weight))
            bias = torch.cat((bias, gate_bias)) if bias is not None and gate_bias is not None else None
        sums = dilated_conv2d(
            x,
            weight,
            bias,
            conv.stride,
            padding,
            conv.dilation,
            conv.groups,
            activation="none",
            padding_mode=padding_mode,
        )
        halves = sums.chunk(2, 1)
        features, gate = halves[::-1] if self.gate_first else halves
        if self.norm and self.norm_first:
            features = child_at(module, self.norm)(features)
        if self.called_activation:
            features = child_at(module, self.called_activation)(features)
        elif self.activation is not None:
            features = _apply(features, *self.activation)
        return features * torch.sigmoid(gate)


def _apply(x: Tensor, name: str, slope: float) -> Tensor:
    if name == "none":
        return x
    if name == "leaky_relu":
        return nn.functional.leaky_relu(x, slope)
    return nn.functional.elu(x) if name == "elu" else nn.functional.relu(x)


class GatedConvolution(BlockRecipe):
    """One convolution to twice the channels, or two of the same form, and at most one norm."""

    name: ClassVar[str] = "gated_conv2d"

    def mismatch(self, module: nn.Module) -> str:
        """As in the base class."""
        parts = parts_of(module)
        convs: list[Any] = [module.get_submodule(path) for path in parts.convolutions]
        if len(convs) not in (1, 2):
            return f"{len(convs)} convolutions"
        if len(convs) == 1 and convs[0].out_channels % 2:
            return "an odd number of channels"
        if any(conv.groups > 1 for conv in convs):
            return "groups"
        if len(convs) == 2 and _form(convs[0]) != _form(convs[1]):
            return "two convolutions of different forms"
        if len(parts.norms) > 1 or len(parts.pads) > 1:
            return "more than one norm or padding"
        return block_mismatch(module, parts)

    def candidates(self, module: nn.Module, call: Call, output: Any) -> Iterable[Replacement]:
        """As in the base class."""
        parts = parts_of(module)
        conv: Any = module.get_submodule(parts.convolutions[0])
        two = len(parts.convolutions) == 2
        features = conv.out_channels if two else conv.out_channels // 2
        if not isinstance(output, Tensor) or output.dim() != 4 or output.shape[1] != features:
            return
        upsample = _upsample_of(conv, call.args[0], output)
        orders = [parts.convolutions, parts.convolutions[::-1]] if two else [(parts.convolutions[0], "")]
        norms = [(parts.norms[0], False), (parts.norms[0], True), ("", False)] if parts.norms else [("", False)]
        for (norm, norm_first), padding, (act, called), order, gate_first in itertools.product(
            norms, paddings_of(module, parts), _activations(module, parts), orders, (False,) if two else (False, True)
        ):
            in_steps = act is None or (norm != "" and norm_first)
            if in_steps and upsample > 1:
                continue
            yield GatedBlock(
                parts=parts,
                features=order[0],
                gate=order[1],
                sources=tuple(weight_source(module, path) for path in order if path),
                padding=padding,
                activation=act,
                called_activation=called,
                norm=norm,
                norm_first=norm_first,
                gate_first=gate_first,
                upsample=upsample,
            )


def _form(conv: Any) -> tuple[Any, ...]:
    return (
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.padding_mode,
        conv.bias is None,
    )


def _upsample_of(conv: Any, x: Tensor, output: Tensor) -> int:
    """2 if the output is about as large as if the block doubled its input, else 1."""
    return 2 if output.shape[2] * conv.stride[0] > 1.5 * x.shape[2] else 1


def _activations(module: nn.Module, parts: Parts) -> list[tuple[tuple[str, float] | None, str]]:
    """(fused, path of the called one) of every activation that the features may go through."""
    found: list[tuple[tuple[str, float] | None, str]] = []
    for path in parts.activations:
        fused = activation_of(module.get_submodule(path))
        found.append((fused, "" if fused is not None else path))
    functional = [] if any(fused is not None for fused, _ in found) else [(act, "") for act in FUSED_ACTIVATIONS]
    found += [*functional, (("none", 0.0), "")]
    return list(dict.fromkeys(found))
