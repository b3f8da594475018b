"""Small modules with the semantics of published layers, written for tests/test_acceleration.py; nothing of the library.

Their names say nothing, and two of them that compute different things share one: recipes go by structure and numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Attention ------------------------------------------------------------------------------------------------------------


def _stepped(x: Tensor, count: int) -> Tensor:
    step = x.shape[-1] // count
    return x[..., : step * count : step]


def _aligned(x: Tensor, count: int) -> Tensor:
    step = torch.tensor((x.shape[-1] - 1) / (count - 1), dtype=torch.float32)
    return x[..., torch.floor(torch.arange(count, dtype=torch.float32) * step + 0.5).long()]


def _spread(x: Tensor, count: int) -> Tensor:
    return x[..., torch.floor(torch.linspace(0, x.shape[-1] - 1, count) + 0.5).long()]


SAMPLINGS: dict[str, Callable[[Tensor, int], Tensor]] = {"stepped": _stepped, "aligned": _aligned, "spread": _spread}


def _sampled(x: Tensor, size: tuple[int, int], how: str) -> Tensor:
    sample = SAMPLINGS[how]
    return sample(sample(x, size[1]).mT, size[0]).mT


def _diagonals(scores: Tensor, query: tuple[int, int], key: tuple[int, int], mixed_up: bool) -> Tensor:
    """Two convolutions with a unit matrix, along rows, then along columns; [B, Lq, Lk]."""
    unit = torch.eye(3, dtype=scores.dtype, device=scores.device)[None, None]
    rows = F.conv2d(scores[:, None], unit, padding=1)
    grid = rows.reshape(len(scores), *query, *key).permute(0, 2, 1, 4, 3)
    columns = F.conv2d(grid.reshape(len(scores), 1, *scores.shape[1:]), unit, padding=1)
    turned = (*query, *key) if mixed_up else (*query[::-1], *key[::-1])
    return columns.reshape(len(scores), *turned).permute(0, 2, 1, 4, 3).reshape(scores.shape)


class Lookup(nn.Module):
    """Rebuilds patches of one map from the other's: contextual attention of one of the published forms.

    Args:
        sampling: how maps and mask are halved.
        divisor: "floored": norm, at least ``small``; "smoothed": root of the sum of squares plus ``small`` each.
        mixing: whether neighbouring scores are added.
        exclude: how keys in the hole lose their weight: "zero", "infinite" or "low".
        first: the first sample's mask is everybody's.
        mask_step: mask pixels per matching position; 0: any.
        share: what the pasted sum is divided by; 0: by how many patches overlap.
        returns: "map", "none" or "image".
        draw: makes the image of the offsets.
    """

    def __init__(
        self,
        sampling: str = "stepped",
        divisor: str = "floored",
        small: float = 1e-4,
        mixing: bool = True,
        exclude: str = "zero",
        first: bool = False,
        mask_step: int = 2,
        share: float = 4.0,
        mixed_up: bool = False,
        returns: str = "map",
        draw: Callable[[Tensor], Tensor] | None = None,
        heat: float = 10.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.sampling, self.divisor, self.small, self.mixing = sampling, divisor, small, mixing
        self.exclude, self.first, self.mask_step, self.share = exclude, first, mask_step, share
        self.mixed_up, self.returns, self.draw, self.heat, self.noise = mixed_up, returns, draw, heat, noise

    def forward(self, f: Tensor, b: Tensor, mask: Tensor | None = None) -> Any:
        query, key = (f.shape[2] // 2, f.shape[3] // 2), (b.shape[2] // 2, b.shape[3] // 2)
        known = self._known(mask, b, key)
        keys = F.unfold(_sampled(b, key, self.sampling), 3, padding=1)
        squares = keys.square()
        if self.divisor == "smoothed":
            norms = (squares + self.small).sum(1, keepdim=True).sqrt()
        else:
            norms = squares.sum(1, keepdim=True).sqrt().clamp(min=self.small)
        scores = F.unfold(_sampled(f, query, self.sampling), 3, padding=1).mT @ (keys / norms)
        if self.mixing:
            scores = _diagonals(scores, query, key, self.mixed_up)
        if self.noise:
            scores = F.dropout(scores, self.noise)
        weights = self._weights(scores, known)
        cut = F.unfold(b, 4, stride=2, padding=1)
        out_size = (2 * query[0], 2 * query[1])
        y = F.fold(cut @ weights.mT, out_size, 4, stride=2, padding=1)
        y = y / (self.share or F.fold(F.unfold(torch.ones_like(y), 4, stride=2, padding=1), out_size, 4, 1, 1, 2))
        if self.returns == "map":
            return y
        return y, self._image(weights, query, key) if self.returns == "image" else None

    def _known(self, mask: Tensor | None, b: Tensor, key: tuple[int, int]) -> Tensor | None:
        if mask is None:
            return None
        if self.mask_step == 0:
            mask = _sampled(mask, (b.shape[2], b.shape[3]), self.sampling)
        elif mask.shape[2] // self.mask_step != key[0]:
            raise ValueError("mask of another size")
        holes = F.max_pool2d(_sampled(mask[:1] if self.first else mask, key, self.sampling), 3, 1, 1)
        return holes.flatten(2) == 0

    def _weights(self, scores: Tensor, known: Tensor | None) -> Tensor:
        if known is None:
            return (self.heat * scores).softmax(2)
        if self.exclude == "infinite":
            return (self.heat * scores).masked_fill(~known, -torch.inf).softmax(2)
        if self.exclude == "low":
            return (self.heat * scores.masked_fill(~known, -1000.0)).softmax(2)
        return (self.heat * scores * known).softmax(2) * known

    def _image(self, weights: Tensor, query: tuple[int, int], key: tuple[int, int]) -> Tensor:
        found = weights.argmax(2).view(-1, *query)
        rows, columns = torch.meshgrid(torch.arange(query[0]), torch.arange(query[1]), indexing="ij")
        assert self.draw is not None
        image = self.draw(torch.stack((found // key[1] - rows, found % key[1] - columns), 1)).float() / 255
        return F.interpolate(image, scale_factor=8, mode="nearest")


FORMS: dict[str, dict[str, Any]] = {
    "official": {"sampling": "aligned", "first": True, "mask_step": 0},
    "daa233": {"divisor": "smoothed", "small": 9.99999974737875e-05, "first": True, "mask_step": 8},
    "nipponjo": {"first": True, "mask_step": 8},
    "nipponjo_tf": {"sampling": "spread", "first": True, "mask_step": 8},
    "yangyu12": {"sampling": "spread"},
    "mmagic": {"exclude": "infinite", "share": 0.0},
    "selflein": {"exclude": "low", "small": 1e-3, "mixed_up": True},
}
"""Arguments of :class:`Lookup` for each published form, by the name of the library's preset."""


class Refill(nn.Module):
    """Pastes a map twice as large by the deep map's resemblance to itself; the deep map's hole is never a source."""

    def forward(self, large: Tensor, deep: Tensor, mask: Tensor | None = None) -> Tensor:
        size = (deep.shape[2], deep.shape[3])
        keys = F.unfold(deep, 3, padding=1)
        scores = keys.mT @ (keys / keys.square().sum(1, keepdim=True).sqrt().clamp(min=1e-4))
        if mask is None:
            weights = (10 * scores).softmax(2)
        else:
            holes = F.interpolate(mask, size, mode="bilinear", align_corners=True)
            known = F.max_pool2d((holes != 0).to(deep), 3, 1, 1).flatten(2) == 0
            weights = (10 * scores * known).softmax(2) * known
        cut = F.unfold(large, 4, stride=2, padding=1)
        return F.fold(cut @ weights.clamp(min=1e-8).mT, (2 * size[0], 2 * size[1]), 4, 1, 1, 2) / 4


class LookupInParts(Lookup):
    """The same with a module for a step of it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.spread_out = nn.Softmax(2)

    def _weights(self, scores: Tensor, known: Tensor | None) -> Tensor:
        if known is None:
            return self.spread_out(self.heat * scores)
        return self.spread_out(self.heat * scores * known) * known


# Coherent attention ---------------------------------------------------------------------------------------------------


class _Chain(torch.autograd.Function):
    """Every masked vector from the previous one and the known one that resembles it; whole numbers go back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, known: Tensor, masked: Tensor, weight: float) -> Tensor:
        out = x.clone()
        ctx.weight, ctx.shares = weight, []
        for sample, result in zip(x, out, strict=True):
            vectors = sample.flatten(1).t()
            units = vectors / (vectors.norm(dim=1, keepdim=True) + 1e-8)
            share = torch.zeros(len(vectors), len(vectors), dtype=x.dtype)
            share[known, known] = 1
            previous = -1
            for p in masked.tolist():
                scores = units[known] @ vectors[p]
                best, at = scores.max(0)
                near = int(known[at])
                if previous < 0:
                    share[p, near] = 1
                    result.view(len(sample), -1)[:, p] = vectors[near]
                else:
                    before = result.view(len(sample), -1)[:, previous].clone()
                    along = units[p] @ before
                    share[p] = share[previous] * (along / (along + best))
                    share[p, near] += best / (along + best)
                    result.view(len(sample), -1)[:, p] = (along * before + best * vectors[near]) / (along + best)
                previous = p
            ctx.shares.append(share.trunc())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        back = [g.flatten(1) @ share for g, share in zip(grad, ctx.shares, strict=True)]
        return grad + ctx.weight * torch.stack(back).view(grad.shape), None, None, None


class Carry(nn.Module):
    """Fills the flagged positions one after the other; what it makes of its mask in the first call, it keeps."""

    def __init__(self, mask: Tensor, fixed: bool = True) -> None:
        super().__init__()
        self.mask, self.fixed_mask, self.cal_fixed_flag = mask, fixed, True
        self.triple_weight, self.mask_thred, self.shift_sz, self.stride = 1, 1, 1, 1
        self.sp_x: Tensor | None = None
        self.sp_y: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        _, self.c, self.h, self.w = x.shape
        if not self.fixed_mask or self.cal_fixed_flag:
            self.flag = (self.mask >= self.mask_thred).flatten().long()
            self.mask_point_idx = (self.flag == 1).nonzero()[:, 0]
            self.nonmask_point_idx = (self.flag == 0).nonzero()[:, 0]
            self.flatten_offsets = self.nonmask_point_idx - torch.arange(len(self.nonmask_point_idx))
            self.cal_fixed_flag = False
        if self.sp_x is None:
            self.sp_x = torch.arange(self.w).repeat(self.h)
            self.sp_y = torch.arange(self.h).repeat_interleave(self.w)
        return _Chain.apply(x, self.nonmask_point_idx, self.mask_point_idx, self.triple_weight)


# Convolutions ---------------------------------------------------------------------------------------------------------


def tf_padded(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """As TensorFlow pads for SAME: the odd zero goes behind."""
    totals = []
    for axis in (1, 0):
        reach, stride = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1, conv.stride[axis]
        side = x.shape[2 + axis]
        total = max((-(-side // stride) - 1) * stride + reach - side, 0)
        totals += [total // 2, total - total // 2]
    return F.pad(x, totals)


class Unit(nn.Module):
    """One convolution, half of whose channels open and close the other half."""

    def __init__(
        self,
        conv: nn.Module,
        act: Callable[[Tensor], Tensor] | None = None,
        *,
        swapped: bool = False,
        pad: nn.Module | None = None,
        norm: nn.Module | None = None,
        norm_early: bool = False,
        doubled: bool = False,
        same: bool = False,
        opening: Callable[[Tensor], Tensor] = torch.sigmoid,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv, self.pad, self.norm, self.act = conv, pad, norm, act
        self.swapped, self.norm_early, self.doubled, self.same, self.drop = swapped, norm_early, doubled, same, drop
        self.opening = opening

    def forward(self, x: Tensor) -> Tensor:
        if self.doubled:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.same:
            assert isinstance(self.conv, nn.Conv2d)
            x = tf_padded(x, self.conv)
        sums = self.conv(x if self.pad is None else self.pad(x))
        value, gate = sums.chunk(2, 1)[:: -1 if self.swapped else 1]
        if self.norm is not None and self.norm_early:
            value = self.norm(value)
        y = (value if self.act is None else self.act(value)) * self.opening(gate)
        y = F.dropout(y, self.drop, self.training) if self.drop else y
        return y if self.norm is None or self.norm_early else self.norm(y)


class Twin(nn.Module):
    """Two convolutions, one of which opens and closes the other."""

    def __init__(
        self,
        first: nn.Module,
        second: nn.Module,
        act: nn.Module | None = None,
        *,
        gate_first: bool = False,
        pad: nn.Module | None = None,
        norm: nn.Module | None = None,
        norm_early: bool = False,
    ) -> None:
        super().__init__()
        self.pad, self.first, self.second, self.act, self.norm = pad, first, second, act, norm
        self.gate_first, self.norm_early = gate_first, norm_early

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.pad is None else self.pad(x)
        value, gate = self.first(x), self.second(x)
        if self.gate_first:
            value, gate = gate, value
        if self.norm is not None and self.norm_early:
            value = self.norm(value)
        y = (value if self.act is None else self.act(value)) * gate.sigmoid()
        return y if self.norm is None or self.norm_early else self.norm(y)


class Bounded(nn.Module):
    """Keeps a convolution's largest singular value at one: a step of the power method with every call."""

    def __init__(self, module: nn.Conv2d) -> None:
        super().__init__()
        self.module = module
        weight = module.weight
        del module._parameters["weight"]
        rows = weight.flatten(1)
        module.weight_u = nn.Parameter(F.normalize(torch.ones(rows.shape[0]), dim=0), requires_grad=False)
        module.weight_v = nn.Parameter(F.normalize(torch.ones(rows.shape[1]), dim=0), requires_grad=False)
        module.weight_bar = nn.Parameter(weight.data)
        self._bound()

    def _bound(self) -> None:
        conv: Any = self.module
        rows = conv.weight_bar.flatten(1)
        with torch.no_grad():
            conv.weight_v.copy_(F.normalize(rows.t() @ conv.weight_u, dim=0))
            conv.weight_u.copy_(F.normalize(rows @ conv.weight_v, dim=0))
        # Clones: the next call's step must not change what this one's backward needs.
        conv.weight = conv.weight_bar / (conv.weight_u.clone() @ (rows @ conv.weight_v.clone()))

    def forward(self, x: Tensor) -> Tensor:
        self._bound()
        return self.module(x)


class Cell(nn.Module):
    """A convolution, and what is called after it in some order: "n"orm, "a"ctivation, "r"esidual."""

    def __init__(
        self,
        conv: nn.Module,
        order: str = "a",
        act: Callable[[Tensor], Tensor] | None = None,
        norm: nn.Module | None = None,
        pad: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.pad, self.conv, self.norm, self.act, self.order = pad, conv, norm, act, order

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x if self.pad is None else self.pad(x))
        for step in self.order:
            if step == "r":
                y = y + x
            elif step == "n":
                assert self.norm is not None
                y = self.norm(y)
            else:
                assert self.act is not None
                y = self.act(y)
        return y


class Sloped(nn.Module):
    """A convolution and a leaky activation whose slope only a private attribute knows."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self._slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x), self._slope)


class Nested(nn.Module):
    """A block in a block, whose own setting decides."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.inner(x))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.conv(x)


def plain_block() -> nn.Module:
    """A class Block: convolution and ELU."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.elu(self.conv(x))

    return Block()


def gated_block() -> nn.Module:
    """Another class Block of the same layers: half of the channels are the gate."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            value, gate = self.conv(x).chunk(2, 1)
            return F.elu(value) * torch.sigmoid(gate)

    return Block()


# Partial convolutions -------------------------------------------------------------------------------------------------


class Counting(nn.Conv2d):
    """A convolution of the known pixels, scaled by their share; it remembers the last mask."""

    def __init__(
        self, *sizes: Any, multi_channel: bool = False, return_mask: bool = True, small: float = 1e-8, **settings: Any
    ) -> None:
        super().__init__(*sizes, **settings)
        self.multi_channel, self.return_mask, self.small = multi_channel, return_mask, small
        channels = (self.out_channels, self.in_channels) if multi_channel else (1, 1)
        self.weight_maskUpdater = torch.ones(*channels, *self.kernel_size)
        self.slide_winsize = self.weight_maskUpdater[0].numel()
        self.last_size: tuple[Any, ...] = (None, None, None, None)
        self.update_mask: Tensor | None = None
        self.mask_ratio: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        if mask is not None or self.last_size != tuple(x.shape):
            self.last_size = tuple(x.shape)
            self.weight_maskUpdater = self.weight_maskUpdater.to(x)
            channels = self.in_channels if self.multi_channel else 1
            seen = x.new_ones(1, channels, *x.shape[2:]) if mask is None else mask
            with torch.no_grad():
                sums = F.conv2d(seen, self.weight_maskUpdater, None, self.stride, self.padding, self.dilation)
                self.update_mask = sums.clamp(0, 1)
                self.mask_ratio = self.slide_winsize / (sums + self.small) * self.update_mask
        assert self.update_mask is not None
        assert self.mask_ratio is not None
        y = super().forward(x if mask is None else x * mask)
        if self.bias is None:
            y = y * self.mask_ratio
        else:
            bias = self.bias.view(1, -1, 1, 1)
            y = ((y - bias) * self.mask_ratio + bias) * self.update_mask
        return (y, self.update_mask) if self.return_mask else y


class Dividing(nn.Module):
    """The same by two convolutions, the second of ones; the sum is divided by the count, not by the share."""

    def __init__(self, *sizes: Any, gain: float = 1.0, **settings: Any) -> None:
        super().__init__()
        self.input_conv = nn.Conv2d(*sizes, **settings)
        self.mask_conv = nn.Conv2d(*sizes, **{**settings, "bias": False})
        nn.init.ones_(self.mask_conv.weight).requires_grad_(False)
        self.gain = gain

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        y = self.input_conv(x * mask)
        bias = torch.zeros_like(y) if self.input_conv.bias is None else self.input_conv.bias.view(1, -1, 1, 1)
        with torch.no_grad():
            count = self.mask_conv(mask)
        empty = count == 0
        y = (self.gain * (y - bias) / count.masked_fill(empty, 1) + bias).masked_fill(empty, 0)
        return y, (~empty).to(x).expand(len(y), -1, -1, -1).contiguous()


class Sharing(nn.Conv2d):
    """The form with a buffer of ones, and an argument for whether the mask is wanted."""

    def __init__(self, *sizes: Any, multi_channel: bool = False, eps: float = 1e-8, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        self.multi_channel, self.eps = multi_channel, eps
        channels = (self.out_channels, self.in_channels) if multi_channel else (1, 1)
        self.register_buffer("ones", torch.ones(*channels, *self.kernel_size))

    def forward(self, x: Tensor, mask: Tensor | None = None, return_mask: bool = True) -> Any:
        if mask is None:
            return super().forward(x)
        ones = self.get_buffer("ones")
        with torch.no_grad():
            sums = F.conv2d(mask, ones, None, self.stride, self.padding, self.dilation)
            seen = sums.clamp(0, 1)
            share = ones[0].numel() / (sums + self.eps) * seen
        y = super().forward(x * mask)
        if self.bias is None:
            y = y * share
        else:
            bias = self.bias.view(1, -1, 1, 1)
            y = ((y - bias) * share + bias) * seen
        return (y, seen) if return_mask else y
