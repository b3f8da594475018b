"""The op ``contextual_attention``: patch matching, fuse, softmax and paste in one bounded-memory pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from inpaint_kernels import _native, _workspaces
from inpaint_kernels._backends import OpBackends
from inpaint_kernels._checks import (
    check_choice,
    check_floating,
    check_same_device,
    check_same_dtype,
    check_shape,
)
from inpaint_kernels.cuda_kernels import _contextual_attention_plan as cuda_plan
from inpaint_kernels.cuda_kernels import contextual_attention as cuda_kernels
from inpaint_kernels.ops._autograd import register_autograd
from inpaint_kernels.ops._common import accumulation_dtype, always, cpu_reasons, cuda_reasons
from inpaint_kernels.ops._contextual_attention_presets import (
    PRESETS,
    ContextualAttentionPreset,
    check_preset,
    resample,
    valid_keys,
)
from inpaint_kernels.portable import contextual_attention as portable
from inpaint_kernels.reference import contextual_attention as reference

Box = tuple[int, int, int, int]

# Read here, for torch.compile cannot.
_PRESET_FIELDS = frozenset(field.name for field in dataclasses.fields(ContextualAttentionPreset))


class ContextualAttentionResult(NamedTuple):
    """What ``contextual_attention(..., return_offsets=True)`` returns.

    Attributes:
        output: [B, Cv, rate * hq, rate * wq].
        offsets: [B, 2, hq, wq] int64, (row, column) of the most attended key minus that of the query; 0 where not
            computed, without meaning where ``maximum`` is 0 (every probability underflows).
        maximum: [B, hq, wq] probability of that key, in [0, 1] (not differentiable); 0 where not computed.
    """

    output: Tensor
    offsets: Tensor
    maximum: Tensor


# 1. The public function -----------------------------------------------------------------------------------------------


@overload
def contextual_attention(
    f: Tensor, b: Tensor, mask: Tensor | None = ..., *, return_offsets: Literal[False] = ..., **options: Any
) -> Tensor: ...
@overload
def contextual_attention(
    f: Tensor, b: Tensor, mask: Tensor | None = ..., *, return_offsets: Literal[True], **options: Any
) -> ContextualAttentionResult: ...
@overload
def contextual_attention(
    f: Tensor, b: Tensor, mask: Tensor | None = ..., *, return_offsets: bool, **options: Any
) -> Tensor | ContextualAttentionResult: ...


def contextual_attention(
    f: Tensor,
    b: Tensor,
    mask: Tensor | None = None,
    *,
    value: Tensor | None = None,
    preset: str | ContextualAttentionPreset = "nipponjo",
    queries: Box | Tensor | None = None,
    key_scale: Tensor | None = None,
    key_bias: Tensor | None = None,
    return_offsets: bool = False,
    backend: str | None = None,
    **overrides: Any,
) -> Tensor | ContextualAttentionResult:
    """Rebuild every patch of ``f`` from the patches of ``b`` that it resembles most (DeepFill v1, section 4.1).

    On the matching grid (every ``rate``-th pixel), with patches of ``patch`` x ``patch``::

        S0(p, q) = <patch of f at p, patch of b at q> / n_q          zero outside the maps
        S        = fuse: diagonal sums of S0 over ``fuse`` steps, along rows, then columns, running on past line ends
        A(p, .)  = softmax over q of scale * key_scale_q * S(p, q) + key_bias_q, invalid keys as ``masking`` says
        output   = sum over p, q of A(p, q) * (K x K patch of value at rate * q), pasted at rate * p, / divisor

    The score matrix is never stored: memory is bounded by a strip of queries (at most 0.63 GiB), and only the
    ``queries`` asked for are computed. Scores and softmax accumulate in float32 (float64 for float64 inputs); the
    result has the dtype of ``f``. Bit-identical from run to run and for any number of threads.

    Args:
        f: [B, C, H, W] float16, bfloat16, float32 or float64; the map whose patches look for partners.
        b: [B, C, Hb, Wb], same dtype; keys, and values unless ``value`` is given. Often ``b is f``.
        mask: [B or 1, 1, Hm, Wm], any dtype, non-zero = hole, at the resolution of b or a whole multiple of it (the
            image's); keys whose patch touches the hole are invalid. None: every key is valid.
        value: [B, Cv, Hv, Wv], what is pasted, at ``rate`` pixels per key. None: ``b``.
        preset: name of a published implementation (see :data:`inpaint_kernels.PRESETS`, each with its description) or
            an own :class:`ContextualAttentionPreset`.
        queries: positions of the matching grid that are wanted: a box (y0, x0, y1, x1), end exclusive, or a bool mask
            [hq, wq]. The rate x rate output cell of each of them, its offset and its maximum equal the full call's;
            all other output pixels are 0. Cost and memory are proportional to their number. None: all.
        key_scale: [B or 1, hk, wk] floating, scale of each valid key's logit; no gradient. None: 1.
        key_bias: [B or 1, hk, wk] floating, offset of each valid key's logit; no gradient. None: 0.
        return_offsets: also return the offsets and maxima.
        backend: "cpu", "cuda", "portable" or "reference"; None: the first that can run, see
            :func:`inpaint_kernels.explain`.
        **overrides: fields of the preset to change, e.g. ``fuse=0``, ``scale=20.0``, ``rate=4``.

    Returns:
        [B, Cv, rate * hq, rate * wq], differentiable once with respect to f, b and value; or a
        :class:`ContextualAttentionResult`. With no valid key the output is 0 (masking "multiply" and "inf") or the
        plain mean (masking "fill"). NaN stays in the outputs that depend on it.

    Raises:
        ValueError, TypeError: an argument has the wrong rank, size, dtype, device or value; the message names it.
        RuntimeError: an explicitly requested backend cannot run; the message says why.

    Deviations from the sources: the gradient at an all-zero key patch is 0 (NaN in several ports), and those that a
    preset's description names.

    References:
        Yu et al., Generative Image Inpainting with Contextual Attention, CVPR 2018, section 4.1.
        Yu et al., Free-Form Image Inpainting with Gated Convolution, ICCV 2019.
    """
    problem, selected = _pose(f, b, mask, value, preset, queries, key_scale, key_bias, overrides)
    backend = BACKENDS.choose(problem, backend)
    call = _forward
    if not _only_computes(problem):
        call = torch.ops.inpaint_kernels.contextual_attention
        if not torch.compiler.is_compiling():
            _workspaces.announce(lambda: _workspace_bytes(problem, queries, backend))
    output, index, maximum = call(*problem[:6], selected, *_scalars(problem.semantics), return_offsets, backend)
    if not return_offsets:
        return output
    return ContextualAttentionResult(output, _offsets(index, problem.key.shape[3]), maximum)


def _only_computes(problem: _Problem) -> bool:
    """Whether nobody but the kernel looks at this call: no gradient, autocast, compilation, tracing or subclass.

    The dispatcher, autograd and autocast layers of a Python op cost 20 us a call, as much as a kernel on a small map.
    """
    query, key, value, *_ = problem
    return (
        type(query) is type(key) is type(value) is Tensor
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu" if query.is_cpu else query.device.type)
        and not torch._C._len_torch_dispatch_stack()
    )


def _offsets(index: Tensor, key_width: int) -> Tensor:
    """Flat key indices [B, hq, wq] (-1: not computed) -> displacement of the key from the query, [B, 2, hq, wq]."""
    height, width = index.shape[1], index.shape[2]
    rows = torch.arange(height, device=index.device)[:, None]
    columns = torch.arange(width, device=index.device)
    offsets = torch.stack((index.div(key_width, rounding_mode="floor") - rows, index % key_width - columns), 1)
    return offsets.masked_fill(index[:, None] < 0, 0)


# 2. Checks ------------------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """One call after the front end: what the op receives, and what the backends judge."""

    query: Tensor
    key: Tensor
    value: Tensor
    valid: Tensor | None
    key_scale: Tensor | None
    key_bias: Tensor | None
    semantics: ContextualAttentionPreset

    @property
    def device(self) -> torch.device:
        return self.query.device


def _pose(
    f: Tensor,
    b: Tensor,
    mask: Tensor | None,
    value: Tensor | None,
    preset: str | ContextualAttentionPreset,
    queries: Box | Tensor | None,
    key_scale: Tensor | None,
    key_bias: Tensor | None,
    overrides: dict[str, Any],
) -> tuple[_Problem, Tensor | None]:
    """Check the arguments and bring them to the matching grid; also the bool [hq, wq] mask of wanted queries."""
    semantics = resolve_preset(preset, overrides)
    rate = semantics.rate if semantics.grid != "none" else 1
    query_size = _check_map("f", f, rate, semantics)
    query = resample(f, query_size, semantics.grid, rate)
    key_size, key = query_size, query
    if b is not f:
        key_size = _check_map("b", b, rate, semantics, like=f)
        key = resample(b, key_size, semantics.grid, rate)
    if value is None:
        value = b
    else:
        check_shape("value", value, "B Cv Hv Wv", B=f.shape[0])
        check_same_device(f=f, value=value)
        check_same_dtype(f=f, value=value)
    valid = None
    if mask is not None:
        _check_mask(mask, f, b)
        one_for_all = semantics.mask_batch == "first"
        valid = valid_keys(mask[:1] if one_for_all else mask, (b.shape[2], b.shape[3]), key_size, semantics)
    if key_scale is not None:
        _check_per_key("key_scale", key_scale, f, key_size)
    if key_bias is not None:
        _check_per_key("key_bias", key_bias, f, key_size)
    selected = None if queries is None else query_mask(queries, query_size)
    return _Problem(query, key, value, valid, key_scale, key_bias, semantics), selected


def resolve_preset(preset: str | ContextualAttentionPreset, overrides: dict[str, Any]) -> ContextualAttentionPreset:
    """The preset of that name, or the one given, with some of its fields replaced and then checked."""
    if isinstance(preset, str):
        check_choice("preset", preset, PRESETS)
        preset = PRESETS[preset]
    elif not isinstance(preset, ContextualAttentionPreset):
        raise TypeError(f"preset: expected a name or a ContextualAttentionPreset, got {type(preset).__name__}")
    if not overrides:
        return preset
    unknown = sorted(set(overrides) - _PRESET_FIELDS)
    if unknown:
        raise TypeError(f"contextual_attention: unexpected argument {unknown[0]!r}, not a field of the preset")
    preset = dataclasses.replace(preset, **overrides)
    check_preset(preset)
    return preset


def _check_map(
    name: str, x: Tensor, rate: int, semantics: ContextualAttentionPreset, like: Tensor | None = None
) -> tuple[int, int]:
    """Check f, or b against f; the size of its matching grid."""
    if like is None:
        check_floating(name, x)
        if x.dim() != 4:  # what check_shape looks for, and 2 us of every call
            check_shape(name, x, "B C H W")
        height, width = x.shape[2], x.shape[3]
    else:
        sizes = check_shape(name, x, "B C Hb Wb", B=like.shape[0], C=like.shape[1])
        check_same_device(f=like, **{name: x})
        check_same_dtype(f=like, **{name: x})
        height, width = sizes["Hb"], sizes["Wb"]
    if height < rate or width < rate:
        raise ValueError(f"{name}: expected H and W of at least rate={rate}, got H={height}, W={width}")
    if not semantics.odd_sizes and (height % rate or width % rate):
        raise ValueError(
            f"{name}: expected H and W divisible by rate={rate} (this preset is not defined elsewhere; "
            f"odd_sizes=True crops), got H={height}, W={width}"
        )
    return height // rate, width // rate


def query_mask(queries: Box | Tensor, size: tuple[int, int]) -> Tensor:
    """A box (y0, x0, y1, x1) or a bool [hq, wq] as a bool [hq, wq] on the CPU: it decides how much there is to do."""
    height, width = size
    if isinstance(queries, Tensor):
        check_shape("queries", queries, "hq wq", hq=height, wq=width)
        if queries.dtype != torch.bool:
            raise TypeError(f"queries: expected dtype torch.bool, got {queries.dtype}")
        return queries.cpu()
    if len(queries) != 4 or not (0 <= queries[0] <= queries[2] <= height and 0 <= queries[1] <= queries[3] <= width):
        raise ValueError(f"queries: expected a box (y0, x0, y1, x1) inside {height} x {width}, got {queries}")
    selected = torch.zeros(size, dtype=torch.bool, device="cpu")
    selected[queries[0] : queries[2], queries[1] : queries[3]] = True
    return selected


def _check_mask(mask: Tensor, f: Tensor, b: Tensor) -> None:
    sizes = check_shape("mask", mask, "B|1 1 Hm Wm", B=f.shape[0])
    check_same_device(mask=mask, f=f)
    height, width = sizes["Hm"], sizes["Wm"]
    factor = max(1, height // b.shape[2])
    if height != factor * b.shape[2] or width != factor * b.shape[3]:
        raise ValueError(
            f"mask: expected the size of b, {b.shape[2]} x {b.shape[3]}, or a whole multiple of it, "
            f"got {height} x {width}"
        )


def _check_per_key(name: str, x: Tensor, f: Tensor, key_size: tuple[int, int]) -> None:
    check_shape(name, x, "B|1 hk wk", B=f.shape[0], hk=key_size[0], wk=key_size[1])
    check_same_device(**{name: x, "f": f})
    if x.requires_grad:
        raise ValueError(f"{name}: expected a tensor that requires no gradient (there is none; detach it)")


# 3. Schema ------------------------------------------------------------------------------------------------------------

_SEMANTICS_SCHEMA = (
    "int patch, str norm, float eps, int fuse, float scale, str masking, float fill, float? floor, "
    "int rate, int paste_size, int pad_cut, int pad_put, float divisor"
)
_INPUTS_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? valid, Tensor? key_scale, Tensor? key_bias, Tensor? queries"
)

_library = torch.library.Library("inpaint_kernels", "FRAGMENT")
_library.define(
    f"contextual_attention({_INPUTS_SCHEMA}, {_SEMANTICS_SCHEMA}, bool return_offsets, str backend)"
    " -> (Tensor output, Tensor index, Tensor maximum)"
)
_library.define(
    f"contextual_attention_backward(Tensor grad, {_INPUTS_SCHEMA}, {_SEMANTICS_SCHEMA}, str backend)"
    " -> (Tensor, Tensor, Tensor)"
)


# 4. Fake --------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("inpaint_kernels::contextual_attention", lib=_library)
def _fake_forward(
    query: Tensor, key: Tensor, value: Tensor, valid: Any, key_scale: Any, key_bias: Any, queries: Any, *semantics: Any
) -> tuple[Tensor, Tensor, Tensor]:
    rate, return_offsets = semantics[8], semantics[13]
    batch, height, width = query.shape[0], query.shape[2], query.shape[3]
    match_shape = (batch, height, width) if return_offsets else (0,)
    return (
        value.new_empty(batch, value.shape[1], rate * height, rate * width),
        query.new_empty(match_shape, dtype=torch.int64),
        query.new_empty(match_shape, dtype=accumulation_dtype(query)),
    )


@torch.library.register_fake("inpaint_kernels::contextual_attention_backward", lib=_library)
def _fake_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))  # type: ignore[return-value]


# 5. Backends ----------------------------------------------------------------------------------------------------------


def _prepare(
    f: Tensor,
    b: Tensor,
    mask: Tensor | None = None,
    *,
    value: Tensor | None = None,
    preset: str | ContextualAttentionPreset = "nipponjo",
    queries: Box | Tensor | None = None,
    key_scale: Tensor | None = None,
    key_bias: Tensor | None = None,
    return_offsets: bool = False,
    **overrides: Any,
) -> _Problem:
    """The problem that a public call with these arguments poses (for :func:`inpaint_kernels.explain`)."""
    return _pose(f, b, mask, value, preset, queries, key_scale, key_bias, overrides)[0]


def _cpu_reasons(problem: _Problem) -> list[str]:
    reasons = cpu_reasons("contextual_attention_forward", problem.query)
    if reasons:
        return reasons
    halo = problem.semantics.fuse // 2
    if halo > 1 and min(*problem.query.shape[2:], *problem.key.shape[2:]) < halo:
        return [f"a matching grid is smaller than fuse // 2 = {halo}"]
    return []


def _cuda_reasons(problem: _Problem) -> list[str]:
    is_bfloat16 = problem.query.dtype == torch.bfloat16
    return cuda_reasons("contextual_attention_scores", problem.query, bfloat16=is_bfloat16)


def _scalars(s: ContextualAttentionPreset) -> tuple[Any, ...]:
    """The fields of a preset in the order of the schema."""
    return (
        *(s.patch, s.norm, s.eps, s.fuse, s.scale, s.masking, s.fill, s.floor),
        *(s.rate, s.paste_size, s.pad_cut, s.pad_put, s.divisor),
    )


BACKENDS = OpBackends(
    "contextual_attention",
    _prepare,
    {"cpu": _cpu_reasons, "cuda": _cuda_reasons, "portable": always, "reference": always},
)


def _cpu_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    try:
        return torch.ops.inpaint_native.contextual_attention_forward(*args)
    except RuntimeError as error:
        _native.raise_if_interrupted(error)
        raise


def _cpu_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    try:
        return torch.ops.inpaint_native.contextual_attention_backward(*args)
    except RuntimeError as error:
        _native.raise_if_interrupted(error)
        raise


_FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "cpu": _cpu_forward,
    "cuda": cuda_kernels.forward,
    "portable": portable.forward,
    "reference": reference.forward,
}
_BACKWARD: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "cpu": _cpu_backward,
    "cuda": cuda_kernels.backward,
    "portable": portable.backward,
    "reference": reference.backward,
}


@torch.library.impl(_library, "contextual_attention", "CompositeExplicitAutograd")
def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    valid, key_scale, key_bias, selected, *semantics, backend = rest
    dtype = accumulation_dtype(query)
    maps = _MAPS.get(backend, _dense_maps)
    per_position = _dense_per_position(dtype, valid, key_scale, key_bias, selected)
    output, index, maximum = _FORWARD[backend](*maps(dtype, query, key, value), *per_position, *semantics)
    return _cast(output, value.dtype), index, maximum


@torch.library.impl(_library, "contextual_attention_backward", "CompositeExplicitAutograd")
def _backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, backend = rest
    dtype = accumulation_dtype(query)
    maps = _dense_maps_as_they_are if backend == "cuda" else _dense_maps
    dquery, dkey, dvalue = _BACKWARD[backend](
        grad.to(dtype).contiguous(),
        *maps(dtype, query, key, value),
        *_dense_per_position(dtype, *arguments[:4]),
        *arguments[4:],
    )
    return dquery.to(query.dtype), dkey.to(key.dtype), dvalue.to(value.dtype)


def _dense_maps(dtype: torch.dtype, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous maps in the dtype that the scores accumulate in; one copy where query and key are one tensor."""
    dense_query = _cast(query, dtype).contiguous()
    dense_key = dense_query if key is query else _cast(key, dtype).contiguous()
    return dense_query, dense_key, _cast(value, dtype).contiguous()


def _strided_maps(dtype: torch.dtype, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same without copying query and key, views of every ``rate``-th pixel of f and b: 134 MB each at 4096x4096.

    Nor is a value map in channels_last copied.
    """
    value = _cast(value, dtype)
    in_order = value.is_contiguous() or value.is_contiguous(memory_format=torch.channels_last)
    return _cast(query, dtype), _cast(key, dtype), value if in_order else value.contiguous()


def _dense_maps_as_they_are(
    dtype: torch.dtype, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous maps in their own dtype: tensor cores multiply short ones and sum in float32."""
    return query.contiguous(), key.contiguous(), value.contiguous()


_MAPS = {"cpu": _strided_maps, "cuda": _dense_maps_as_they_are}


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)  # a .to() that changes nothing still goes through the dispatcher


def _dense_per_position(
    dtype: torch.dtype,
    valid: Tensor | None,
    key_scale: Tensor | None,
    key_bias: Tensor | None,
    selected: Tensor | None,
) -> tuple[Tensor | None, ...]:
    return (
        None if valid is None else valid.contiguous(),
        None if key_scale is None else key_scale.to(dtype).contiguous(),
        None if key_bias is None else key_bias.to(dtype).contiguous(),
        None if selected is None else selected.contiguous(),
    )


# The constants of csrc/cpu/contextual_attention.h.
_STRIP_ROWS, _VALUE_BYTES, _VALUE_BAND_BYTES = 16, 160 << 20, 64 << 20
_STRIP_BYTES, _LEAST_BYTES, _TOGETHER_BYTES = (24 << 20, 640 << 20), 160 << 20, 880 << 20
_BOUNDED_WORKSPACES = {"cuda": cuda_plan.WORKSPACE_BYTES, "portable": portable.WORKSPACE_BYTES}


def _workspace_bytes(problem: _Problem, queries: Box | Tensor | None, backend: str) -> int:
    """About what a forward call holds beside its inputs and its output; a mask of queries counts as all of them."""
    height, width = problem.query.shape[2:]
    size = torch.finfo(accumulation_dtype(problem.query)).bits // 8
    keys = problem.key.shape[2] * problem.key.shape[3] * size
    if backend != "cpu":
        return min(_BOUNDED_WORKSPACES.get(backend, height * width * keys), height * width * keys)
    rate = problem.semantics.rate
    values = problem.value[0].numel() * size
    values = values if values <= _VALUE_BYTES else _VALUE_BAND_BYTES
    output = rate**2 * problem.value.shape[1] * size * height * width
    most = min(max(_TOGETHER_BYTES - output - values, _LEAST_BYTES), _STRIP_BYTES[1])
    if queries is not None and not isinstance(queries, Tensor):
        beside = 2 * (-(-problem.semantics.paste_size // rate) - 1)  # cells of neighbours reach into the box's
        height, width = min(queries[2] - queries[0] + beside, height), min(queries[3] - queries[1] + beside, width)
    strip = min(max(_STRIP_ROWS * width * keys, _STRIP_BYTES[0]), most)
    return values + min(strip, height * width * keys)


# 6. Autograd and autocast ---------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(*inputs[:7])
    ctx.semantics, ctx.backend = inputs[7:-2], inputs[-1]


def _autograd_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    gradients = torch.ops.inpaint_kernels.contextual_attention_backward(
        grad, *ctx.saved_tensors, *ctx.semantics, ctx.backend
    )
    return (*gradients, *(None,) * (6 + len(ctx.semantics)))


def _no_second_backward(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("contextual_attention: double backward is not implemented (the gradient has no gradient)")


register_autograd(_library, "contextual_attention", _autograd_backward, _setup_context)
register_autograd(_library, "contextual_attention_backward", _no_second_backward)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast("inpaint_kernels::contextual_attention", _device, torch.float32, lib=_library)
