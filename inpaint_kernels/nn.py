"""``torch.nn.Module`` faces of the ops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from inpaint_kernels.ops._convolution import Pair, check_activation, check_padding_mode
from inpaint_kernels.ops.coherent_semantic_attention import (
    CoherentSemanticAttentionResult,
    check_options,
    coherent_semantic_attention,
    flags_of_mask,
)
from inpaint_kernels.ops.contextual_attention import (
    Box,
    ContextualAttentionResult,
    contextual_attention,
    resolve_preset,
)
from inpaint_kernels.ops.dilated_conv2d import dilated_conv2d
from inpaint_kernels.ops.gated_conv2d import check_gate_order, gated_conv2d
from inpaint_kernels.ops.hog import HogResult, check_settings, hog
from inpaint_kernels.ops.partial_conv2d import PartialConv2dResult, check_rule, partial_conv2d


class ContextualAttention(torch.nn.Module):
    """:func:`inpaint_kernels.contextual_attention` with its preset fixed; it has no parameters.

    Args:
        preset: name of a published implementation.
        return_offsets: whether :meth:`forward` also returns the offsets and maxima.
        backend: as in the function.
        **overrides: fields of the preset to change.

    Example:
        >>> attention = ContextualAttention("nipponjo")
        >>> f = torch.rand(1, 8, 32, 32)
        >>> mask = torch.zeros(1, 1, 128, 128)  # of the image, 4 x the features; or 32 x 32
        >>> attention(f, f, mask).shape
        torch.Size([1, 8, 32, 32])
    """

    def __init__(
        self, preset: str = "nipponjo", *, return_offsets: bool = False, backend: str | None = None, **overrides: Any
    ) -> None:
        super().__init__()
        self.semantics = resolve_preset(preset, overrides)
        self.preset, self.overrides = preset, overrides
        self.return_offsets = return_offsets
        self.backend = backend

    def forward(
        self,
        f: Tensor,
        b: Tensor,
        mask: Tensor | None = None,
        *,
        value: Tensor | None = None,
        queries: Box | Tensor | None = None,
    ) -> Tensor | ContextualAttentionResult:
        """Shapes and result as in the function; the mask at feature resolution or a whole multiple of it."""
        return contextual_attention(
            f,
            b,
            mask,
            value=value,
            preset=self.semantics,
            queries=queries,
            return_offsets=self.return_offsets,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The preset and what was changed in it, for ``repr``."""
        options = "".join(f", {name}={value!r}" for name, value in self.overrides.items())
        return f"{self.preset!r}{options}"


class CSA(torch.nn.Module):
    """:func:`inpaint_kernels.coherent_semantic_attention` with its options and its mask; it has no parameters.

    Args:
        mask: the image's mask, for :meth:`set_mask`; it may be set later instead, or flags given to :meth:`forward`.
        variant: as in the function, as the next two.
        gradient: the same.
        triple_weight: the same.
        return_attention: whether :meth:`forward` also returns what the attention rows are made of.
        backend: as in the function.

    Attributes:
        mask_flags: what :meth:`set_mask` made, bool [B or 1, h, w] on the CPU; None before.

    Example:
        >>> csa = CSA()
        >>> mask = torch.zeros(1, 1, 256, 256)  # of the image, 8 x the features
        >>> mask[..., 64:128, 96:160] = 1
        >>> int(csa.set_mask(mask).sum())
        64
        >>> csa(torch.rand(1, 16, 32, 32)).shape
        torch.Size([1, 16, 32, 32])
    """

    mask_flags: Tensor | None

    def __init__(
        self,
        mask: Tensor | None = None,
        *,
        variant: str = "official",
        gradient: str = "official",
        triple_weight: float = 1.0,
        return_attention: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_options(variant, gradient, triple_weight)
        self.variant, self.gradient, self.triple_weight = variant, gradient, triple_weight
        self.return_attention, self.backend = return_attention, backend
        self.mask_flags = None
        if mask is not None:
            self.set_mask(mask)

    def set_mask(self, mask: Tensor, layers: int = 3, threshold: float | Fraction = 5 / 16) -> Tensor:
        """Make the flags of all following calls from an image's mask, as the published layer does in its first call.

        There, ``layers`` convolutions of 4 x 4 ones / 16 with stride 2 and a zero border follow each other, and a
        position is masked where the result is larger than ``threshold``. Results are multiples of 16^-layers, which
        float32 holds exactly, so every device decides alike. With the published values lines of up to 5 pixels are
        never masked, and squares from 12 pixels on always are.

        Args:
            mask: [H, W] or [B or 1, 1, H, W], any dtype, non-zero = hole.
            layers: how many times the mask is halved (rounded down), 1 to 6.
            threshold: a position is masked where the weighted share of the hole exceeds it; [0, 1).

        Returns:
            The flags, bool [B or 1, H // 2^layers, W // 2^layers] on the CPU. A mask on a GPU is read back here, once.

        Deviation from the published code: the flags follow every mask that is set (there: the first one only, in the
        published setting).
        """
        self.mask_flags = flags_of_mask(mask, layers, threshold)
        return self.mask_flags

    def forward(self, x: Tensor, mask_flags: Tensor | None = None) -> Tensor | CoherentSemanticAttentionResult:
        """Shapes and result as in the function; without ``mask_flags`` those of :meth:`set_mask`."""
        flags = self.mask_flags if mask_flags is None else mask_flags
        if flags is None:
            raise ValueError("mask_flags: expected flags, or set_mask() before the first call, got neither")
        return coherent_semantic_attention(
            x,
            flags,
            variant=self.variant,
            gradient=self.gradient,
            triple_weight=self.triple_weight,
            return_attention=self.return_attention,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """What differs from the defaults, for ``repr``."""
        return _options(self, {"variant": "official", "gradient": "official", "triple_weight": 1.0}).removeprefix(", ")


class GatedConv2d(torch.nn.Conv2d):
    """:func:`inpaint_kernels.gated_conv2d` with its weights.

    The parameters are ``weight`` [2 * out_channels, in_channels / groups, kh, kw] and ``bias`` [2 * out_channels]; with
    ``separate_gate`` they have ``out_channels`` and the gate has ``gate_weight`` and ``gate_bias``. Checkpoints load
    under these names and under the published ones::

        conv.weight, conv.bias                     nipponjo/deepfillv2-pytorch GConv, converted TensorFlow weights
        conv.conv.weight, conv.conv.bias           nipponjo GDeConv (upsample=2), mmagic SimpleGatedConvModule
        conv2d.*, mask_conv2d.*                    csqiangwen, zhaoyuzhi, avalonstrel: features and gate, joined
                                                   unless separate_gate

    so ``conv1 = GatedConv2d(...)`` stands where the published module did. Spectral norms must be folded first.

    Args:
        in_channels: Cin.
        out_channels: C, the channels that leave the gate.
        kernel_size: int or (rows, columns), as the next three.
        stride: as in the function.
        padding: the same.
        dilation: the same.
        groups: the same.
        bias: whether there are biases.
        activation: the same, as all that follow but separate_gate, device and dtype.
        negative_slope: the same.
        padding_mode: the same.
        upsample: the same.
        gate_order: the same.
        separate_gate: two weights instead of one; they are joined in every call.
        backend: the same.
        device: of the parameters.
        dtype: of the parameters.

    Example:
        >>> layer = GatedConv2d(5, 24, 5, padding_mode="same_tf")
        >>> layer(torch.rand(1, 5, 32, 48)).shape
        torch.Size([1, 24, 32, 48])
    """

    gate_weight: torch.nn.Parameter | None
    gate_bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        activation: str = "elu",
        negative_slope: float = 0.2,
        padding_mode: str = "zeros",
        upsample: int = 1,
        gate_order: str = "feature_first",
        separate_gate: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_activation(activation, negative_slope)
        check_padding_mode(padding_mode)
        check_gate_order(gate_order)
        outputs = out_channels if separate_gate else 2 * out_channels
        super().__init__(
            in_channels, outputs, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self.out_channels = out_channels
        self.padding_mode = padding_mode  # type: ignore[assignment]
        self.activation, self.negative_slope = activation, negative_slope
        self.upsample, self.gate_order, self.backend = upsample, gate_order, backend
        self.register_parameter("gate_weight", None)
        self.register_parameter("gate_bias", None)
        if separate_gate:
            self.gate_weight = torch.nn.Parameter(torch.empty_like(self.weight))
            if self.bias is not None:
                self.gate_bias = torch.nn.Parameter(torch.empty_like(self.bias))
            self._reset(self.gate_weight, self.gate_bias)
        self.register_load_state_dict_pre_hook(_load_published_gate)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as in the function."""
        return gated_conv2d(
            x,
            self.weight,
            self.bias,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            self.groups,
            gate_weight=self.gate_weight,
            gate_bias=self.gate_bias,
            activation=self.activation,
            negative_slope=self.negative_slope,
            padding_mode=self.padding_mode,
            upsample=self.upsample,
            gate_order=self.gate_order,
            backend=self.backend,
        )

    def reset_parameters(self) -> None:
        """New random values, as those of :class:`torch.nn.Conv2d`."""
        super().reset_parameters()
        if "gate_weight" in self._parameters and self.gate_weight is not None:  # not yet there in Conv2d's constructor
            self._reset(self.gate_weight, self.gate_bias)

    @staticmethod
    def _reset(weight: Tensor, bias: Tensor | None) -> None:
        torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if bias is not None and weight[0].numel() > 0:
            bound = 1 / math.sqrt(weight[0].numel())
            torch.nn.init.uniform_(bias, -bound, bound)

    def extra_repr(self) -> str:
        """What differs from a plain convolution, for ``repr``."""
        options = _options(self, {"activation": "", "upsample": 1, "gate_order": "feature_first"})
        return super().extra_repr() + options + (", separate_gate=True" if self.gate_weight is not None else "")


class DilatedConv2d(torch.nn.Conv2d):
    """:func:`inpaint_kernels.dilated_conv2d` with its weights: ``weight`` and ``bias``, as in :class:`torch.nn.Conv2d`.

    Args:
        in_channels: Cin.
        out_channels: C.
        kernel_size: int or (rows, columns), as the next three.
        stride: as in the function.
        padding: the same.
        dilation: the same.
        groups: the same.
        bias: whether there is one.
        activation: the same, as the next four.
        negative_slope: the same.
        padding_mode: the same.
        upsample: the same.
        backend: the same.
        device: of the parameters.
        dtype: of the parameters.

    Example:
        >>> layer = DilatedConv2d(8, 8, 3, padding=16, dilation=16)
        >>> x = torch.rand(1, 8, 32, 48)
        >>> layer(x, residual=x).shape
        torch.Size([1, 8, 32, 48])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        activation: str = "relu",
        negative_slope: float = 0.2,
        padding_mode: str = "zeros",
        upsample: int = 1,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_activation(activation, negative_slope)
        check_padding_mode(padding_mode)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self.padding_mode = padding_mode  # type: ignore[assignment]
        self.activation, self.negative_slope = activation, negative_slope
        self.upsample, self.backend = upsample, backend

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Shapes as in the function."""
        return dilated_conv2d(
            x,
            self.weight,
            self.bias,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            self.groups,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            padding_mode=self.padding_mode,
            upsample=self.upsample,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """What differs from a plain convolution, for ``repr``."""
        return super().extra_repr() + _options(self, {"activation": "", "upsample": 1})


class PartialConv2d(torch.nn.Conv2d):
    """:func:`inpaint_kernels.partial_conv2d` with its weights: ``weight`` and ``bias``, and no buffer for the mask.

    Checkpoints load under these names (NVIDIA/partialconv, mmagic) and as ``input_conv.weight``, ``input_conv.bias``
    (naoto0804); the constant ones ``mask_conv.weight`` and ``weight_mask_updater`` are dropped. Values are taken as
    they are: weights trained by rule "naoto" need that rule, or a division by kh * kw * in_channels.

    Args:
        in_channels: Cin.
        out_channels: C.
        kernel_size: int or (rows, columns), as the next three.
        stride: as in the function.
        padding: the same.
        dilation: the same.
        groups: the same.
        bias: whether there is one.
        rule: the same, as the next three.
        eps: the same.
        mask_channels: the same.
        backend: the same.
        device: of the parameters.
        dtype: of the parameters.

    Example:
        >>> layer = PartialConv2d(3, 8, 7, stride=2, padding=3)
        >>> output, mask = layer(torch.rand(1, 3, 32, 48), torch.ones(1, 1, 32, 48))
        >>> output.shape, mask.shape
        (torch.Size([1, 8, 16, 24]), torch.Size([1, 1, 16, 24]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        rule: str = "nvidia",
        eps: float = 1e-8,
        mask_channels: Sequence[int] | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_rule(rule, eps)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self.rule, self.eps, self.backend = rule, eps, backend
        self.mask_channels = None if mask_channels is None else tuple(mask_channels)
        self.register_load_state_dict_pre_hook(_load_published_partial)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> PartialConv2dResult:  # type: ignore[override]
        """Shapes as in the function. Without a mask all is known but the border: partial convolution based padding."""
        if mask is None:
            mask = x.new_ones(1, len(self.mask_channels or (1,)), x.shape[2], x.shape[3])
        return partial_conv2d(
            x,
            mask,
            self.weight,
            self.bias,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
            self.groups,
            rule=self.rule,
            eps=self.eps,
            mask_channels=self.mask_channels,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """What differs from a plain convolution, for ``repr``."""
        return super().extra_repr() + _options(self, {"rule": "", "eps": 1e-8, "mask_channels": None})


class HOG(torch.nn.Module):
    """:func:`inpaint_kernels.hog` with its settings fixed; it has no parameters.

    Args:
        orientations: as in the function, as all that follow.
        pixels_per_cell: the same.
        cells_per_block: the same.
        block_norm: the same.
        visualize: the same.
        transform_sqrt: the same.
        feature_vector: the same.
        target: the same.
        backend: the same.

    Example:
        >>> features = HOG(orientations=8, pixels_per_cell=16, cells_per_block=1)
        >>> features(torch.rand(2, 3, 64, 96)).shape
        torch.Size([2, 192])
    """

    def __init__(
        self,
        orientations: int = 9,
        pixels_per_cell: int | tuple[int, int] = (8, 8),
        cells_per_block: int | tuple[int, int] = (3, 3),
        block_norm: str = "L2-Hys",
        *,
        visualize: bool = False,
        transform_sqrt: bool = False,
        feature_vector: bool = True,
        target: str = "blocks",
        backend: str | None = None,
    ) -> None:
        check_settings(orientations, pixels_per_cell, cells_per_block, block_norm, visualize, transform_sqrt, target)
        super().__init__()
        self.orientations, self.pixels_per_cell, self.cells_per_block = orientations, pixels_per_cell, cells_per_block
        self.block_norm, self.visualize, self.transform_sqrt = block_norm, visualize, transform_sqrt
        self.feature_vector, self.target, self.backend = feature_vector, target, backend

    def forward(self, images: Tensor) -> Tensor | HogResult:
        """Shapes and result as in the function."""
        return hog(
            images,
            self.orientations,
            self.pixels_per_cell,
            self.cells_per_block,
            self.block_norm,
            self.visualize,
            self.transform_sqrt,
            self.feature_vector,
            self.target,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        size = f"{self.orientations}, pixels_per_cell={self.pixels_per_cell}, cells_per_block={self.cells_per_block}"
        defaults = {"block_norm": "L2-Hys", "visualize": False, "transform_sqrt": False, "target": "blocks"}
        return size + _options(self, defaults)


def _options(module: torch.nn.Module, defaults: Mapping[str, Any]) -> str:
    values = {name: getattr(module, name) for name in defaults}
    return "".join(f", {name}={value!r}" for name, value in values.items() if value != defaults[name])


def _load_published_gate(module: GatedConv2d, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Brings a checkpoint's entries for one :class:`GatedConv2d` to its own names."""
    for kind in ("weight", "bias"):
        _rename(state_dict, prefix, f"conv.conv.{kind}", kind)
        _rename(state_dict, prefix, f"conv.{kind}", kind)
        features, gate = f"{prefix}conv2d.{kind}", f"{prefix}mask_conv2d.{kind}"
        if module.gate_weight is not None:
            _rename(state_dict, prefix, f"conv2d.{kind}", kind)
            _rename(state_dict, prefix, f"mask_conv2d.{kind}", f"gate_{kind}")
        elif features in state_dict and gate in state_dict:
            halves = [state_dict.pop(features), state_dict.pop(gate)]
            state_dict[prefix + kind] = torch.cat(halves if module.gate_order == "feature_first" else halves[::-1])


def _load_published_partial(module: PartialConv2d, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """The same for one :class:`PartialConv2d`."""
    for kind in ("weight", "bias"):
        _rename(state_dict, prefix, f"input_conv.{kind}", kind)
    for constant in ("mask_conv.weight", "weight_mask_updater"):
        state_dict.pop(prefix + constant, None)


def _rename(state_dict: dict[str, Tensor], prefix: str, theirs: str, ours: str) -> None:
    if prefix + theirs in state_dict and prefix + ours not in state_dict:
        state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
