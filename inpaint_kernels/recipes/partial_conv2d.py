"""Partial convolutions: a map and a mask in, a map and often the new mask out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaint_kernels.ops.partial_conv2d import partial_conv2d
from inpaint_kernels.recipes._class_swap import argument_names, child_at, has_foreign_hooks
from inpaint_kernels.recipes._convolution import is_plain_convolution
from inpaint_kernels.recipes._probe import works
from inpaint_kernels.recipes._replacement import (
    Call,
    Recipe,
    Replacement,
    arguments_of,
    device_of,
    is_map,
    probe_holes,
    probe_map,
)

_RETURN_MASK = "return_mask"


@dataclass(frozen=True)
class PartialConvolution(Replacement):
    """A module that is a partial convolution, or holds its convolution and that of the mask.

    Attributes:
        names: of its arguments.
        convolution: path of the convolution; empty: the module itself.
        mask_convolution: path of the constant one; empty: none.
        rule: of the op.
        eps: of the op.
        mask_channels: of the returned mask: as many as the output has ("all"), or 1; 0: no mask is returned.
        returns_mask_by: "argument" if an argument says whether the mask is returned, else "always" or "never".
        keeps_mask: whether the module keeps the new mask and the ratio in attributes.
    """

    recipe: ClassVar[str] = "partial_conv2d"
    names: tuple[str, ...]
    convolution: str
    mask_convolution: str
    rule: str
    eps: float
    all_channels: bool
    returns_mask: str
    keeps_mask: bool

    @property
    def state(self) -> frozenset[str]:  # type: ignore[override]
        """What the published layer keeps from call to call."""
        return frozenset({"last_size", "update_mask", "mask_ratio", "weight_maskUpdater"} if self.keeps_mask else ())

    def semantics(self) -> str:
        """The rule."""
        kept = ", keeps its last mask" if self.keeps_mask else ""
        return f"rule {self.rule}" + (f", eps {self.eps:g}" if self.rule == "nvidia" else "") + kept

    def covered(self) -> tuple[str, ...]:
        """The convolutions inside."""
        return ("", *(path for path in (self.convolution, self.mask_convolution) if path))

    def kinds(self, module: nn.Module, *args: Any, **kwargs: Any) -> frozenset[str] | str:
        """The mask's channels, and whether the mask is wanted back."""
        arguments = arguments_of(self.names, args, kwargs)
        if arguments is None:
            return "other arguments"
        x, mask = arguments.get(self.names[0]), arguments.get(self.names[1])
        if mask is None:
            return "no mask"
        conv: Any = child_at(module, self.convolution)
        if not is_map(x) or x.dtype != conv.weight.dtype:
            return "not a map [B, C, H, W] of the weight's dtype"
        if not is_map(mask) or mask.dtype != x.dtype or mask.requires_grad or mask.shape[2:] != x.shape[2:]:
            return "not a mask of the map's size and dtype without gradient"
        if mask.shape[1] not in (1, x.shape[1]) or len(mask) not in (1, len(x)):
            return "a mask of another number of channels or samples"
        kinds = {"a mask for all channels" if mask.shape[1] == 1 else "a mask per channel"}
        if len(mask) != len(x):
            kinds.add("one mask for a batch")
        if self.returns_mask == "argument" and not arguments.get(_RETURN_MASK, True):
            kinds.add("no mask wanted back")
        if set(arguments) - {*self.names[:2], _RETURN_MASK}:
            return "more arguments than a map and a mask"
        return frozenset(kinds)

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        arguments = arguments_of(self.names, args, kwargs)
        assert arguments is not None
        x, mask = (arguments[name] for name in self.names[:2])
        conv: Any = child_at(module, self.convolution)
        output, known = partial_conv2d(
            x,
            _one_channel_if_equal(mask),
            conv.weight,
            conv.bias,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            rule=self.rule,
            eps=self.eps,
        )
        wanted = self.returns_mask == "always" or (
            self.returns_mask == "argument" and bool(arguments.get(_RETURN_MASK, True))
        )
        if not (wanted or self.keeps_mask):
            return output
        if self.all_channels:
            known = known.expand(-1, conv.out_channels, -1, -1).contiguous()
        if self.keeps_mask:
            known = self._keep(module, x, mask, known)
        return (output, known) if wanted else output

    def _keep(self, module: Any, x: Tensor, mask: Tensor, known: Tensor) -> Tensor:
        """Leave in the module what its own forward leaves there: a call without a mask reads it."""
        module.last_size = tuple(x.shape[-len(module.last_size) :])  # older versions keep height and width only
        if module.weight_maskUpdater.type() != x.type():
            module.weight_maskUpdater = module.weight_maskUpdater.to(x)
        ones = module.weight_maskUpdater[:1, :1]
        with torch.no_grad():
            sums = F.conv2d(mask.sum(1, keepdim=True), ones, None, module.stride, module.padding, module.dilation)
            if self.all_channels:
                sums = sums.expand(-1, module.out_channels, -1, -1)
            module.mask_ratio = module.slide_winsize / (sums + self.eps) * known
        module.update_mask = known
        return known


def _one_channel_if_equal(mask: Tensor) -> Tensor:
    """One channel of a mask whose channels are one memory, as torch.expand makes them."""
    return mask[:, :1] if mask.shape[1] > 1 and mask.stride(1) == 0 else mask


class PartialConvolutions(Recipe):
    """One trained convolution, and ones that count the mask: as a buffer, an attribute or a constant convolution."""

    name: ClassVar[str] = "partial_conv2d"

    def mismatch(self, module: nn.Module) -> str:
        """As in the base class."""
        names = argument_names(module)
        if len(names) not in (2, 3) or (len(names) == 3 and names[2] != _RETURN_MASK):
            return "not a map and a mask"
        paths = _convolutions(module)
        if paths is None:
            return "not one trained convolution and one of ones"
        if not isinstance(module, nn.Conv2d) and len(list(module.children())) > 2:
            return "more than two convolutions"
        conv: Any = module.get_submodule(paths[0])
        if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return "groups or another padding than zeros"
        hooked = any(has_foreign_hooks(module.get_submodule(path)) or _hooked(module, path) for path in paths if path)
        return "its convolutions have hooks" if hooked else ""

    def calls(self, module: nn.Module, dtype: torch.dtype, example: Call | None) -> Sequence[Call]:
        """As in the base class."""
        paths = _convolutions(module)
        assert paths is not None
        conv: Any = module.get_submodule(paths[0])
        device = device_of(module)
        reach = max((k - 1) * d for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
        side = max(reach + 3, 8)

        def call(
            height: int,
            width: int,
            holes: str,
            channels: int,
            masks: int,
            scale: float,
            seed: int,
            gradient: bool = False,
        ) -> Call:
            x = probe_map((2, conv.in_channels, height, width), dtype, device, seed, scale)
            known = 1 - probe_holes((masks, 1, height, width), dtype, device, holes)
            return Call((x, known.expand(-1, channels, -1, -1).contiguous()), gradient=gradient)

        forms = [(c, m) for c in dict.fromkeys((1, conv.in_channels)) for m in (2, 1)]
        ordinary = next((f for f in forms if works(module, call(side, side, "some", *f, 1, 0))), forms[0])
        calls = [call(2 * side, side, holes, *ordinary, 1, 1, True) for holes in ("some", "none", "all")]
        calls.append(call(side + 1, side + 3, "some", *ordinary, 0.01, 2))
        calls += [call(side, side, "some", *form, 1, 3) for form in forms if form != ordinary]
        if argument_names(module)[2:]:
            without = call(side, side, "some", *ordinary, 1, 4)
            calls.append(Call(without.args, {_RETURN_MASK: False}, gradient=False))
        layout = call(side, side + 2, "some", *ordinary, 0.1, 5)
        last = layout.args[0].contiguous(memory_format=torch.channels_last)
        calls.append(Call((last, layout.args[1]), gradient=False))
        return calls

    def candidates(self, module: nn.Module, call: Call, output: Any) -> Iterable[Replacement]:
        """As in the base class."""
        paths = _convolutions(module)
        assert paths is not None
        conv: Any = module.get_submodule(paths[0])
        names = argument_names(module)
        if isinstance(output, tuple) and len(output) == 2 and is_map(output[1]):
            all_channels = output[1].shape[1] == conv.out_channels and conv.out_channels > 1
            returns = "argument" if len(names) == 3 else "always"
        elif is_map(output):
            all_channels, returns = bool(getattr(module, "multi_channel", False)), "never"
        else:
            return
        keeps = {"last_size", "update_mask", "mask_ratio", "weight_maskUpdater", "slide_winsize"} <= vars(module).keys()
        own_eps = getattr(module, "eps", None)
        epsilons = [own_eps] if isinstance(own_eps, float) else [1e-8, 1e-6]
        rules = [*(("nvidia", eps) for eps in epsilons), ("naoto", 0.0), ("paper", 0.0)]
        for (rule, eps), kept in itertools.product(rules, (True, False) if keeps else (False,)):
            yield PartialConvolution(names, paths[0], paths[1], rule, eps, all_channels, returns, kept)


def _hooked(module: nn.Module, path: str) -> bool:
    return bool(module.get_submodule(path)._forward_pre_hooks)


def _convolutions(module: nn.Module) -> tuple[str, str] | None:
    """Paths of the trained convolution and of the constant one; None if the module has not one trained one."""
    if isinstance(module, nn.Conv2d):
        constants = [*module.buffers(recurse=False), *(v for v in vars(module).values() if isinstance(v, Tensor))]
        return ("", "") if any(_ones(constant) for constant in constants) else None
    convs = [(name, child) for name, child in module.named_children() if is_plain_convolution(child)]
    trained = [name for name, child in convs if any(p.requires_grad for p in child.parameters()) or not _is_ones(child)]
    constant = [name for name, child in convs if name not in trained]
    others = len(list(module.children())) - len(convs)
    return (trained[0], constant[0]) if len(trained) == len(constant) == 1 and not others else None


def _ones(x: Tensor) -> bool:
    return x.dim() == 4 and x.numel() > 0 and bool((x == 1).all())


def _is_ones(conv: nn.Module) -> bool:
    weight = conv._parameters.get("weight")
    return weight is not None and not weight.requires_grad and _ones(weight)
