"""Does one forward compute what another does? Calls on copies: results, gradients, and everything that they change."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inpaint_kernels.recipes._class_swap import original_class, settings_of
from inpaint_kernels.recipes._replacement import Call, Replacement

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far two results of a dtype may be apart, as a share of their norm."""

ORIGINAL_RAISES = "the original raises"

_SMALL_GRADIENT = 0.01
"""Share of the largest gradient of a call below which a gradient's error is measured by that share."""

_DISCRETE_SHARE = 0.05
"""Share of pixels of a result made of an argmax that ties may decide otherwise; 0.02 with tiny scores in float32."""

Forward = Callable[..., Any]


class Outcome(NamedTuple):
    """What one call did.

    Attributes:
        output: what it returned.
        gradients: of its inputs and of the module's parameters; None where nothing depends on them.
        changed: tensors and plain attributes of the module that it changed, by name, as they are now.
        written: arguments that it wrote to, by position, as they are now.
        error: what it raised instead.
    """

    output: Any = None
    gradients: tuple[Tensor | None, ...] = ()
    changed: dict[str, Any] = {}  # noqa: RUF012 (never written to)
    written: dict[int, Tensor] = {}  # noqa: RUF012
    error: str = ""


@dataclass
class Agreement:
    """How well a replacement agrees with the original.

    Attributes:
        allowed: kinds of calls that agreed.
        refused: kinds that did not, and why.
        output_error: largest relative error of a result of an allowed call.
        gradient_error: the same of a gradient.
        nan: whether the original returned NaN where the replacement returned numbers.
    """

    allowed: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)
    output_error: float = 0.0
    gradient_error: float = 0.0
    nan: bool = False


class Disagreement(Exception):  # noqa: N818 (an ordinary result of a comparison)
    """Two outcomes differ; the message says how."""


def detached_copy(module: nn.Module) -> nn.Module:
    """A deep copy. Results of earlier calls that the module holds, which torch refuses to copy, are taken as values."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in part.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


def copy_in_mode(module: nn.Module, training: bool) -> nn.Module:
    """A :func:`detached_copy` for training or evaluation."""
    copied = detached_copy(module)
    copied.train(training)  # not in one expression: some modules' own train() returns nothing
    return copied


def run_calls(module: nn.Module, calls: Sequence[Call], forward: Forward, gradient: bool = True) -> Iterator[Outcome]:
    """The outcomes of ``forward(module, ...)``, one after the other on one copy of the module."""
    for number, call in enumerate(calls):
        yield _observe(module, call, forward, number, gradient)


def works(module: nn.Module, call: Call) -> bool:
    """Whether the module can be called so."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            module(*call.args, **call.kwargs)
    except Exception:  # whatever a foreign module raises
        return False
    return True


def original_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward."""
    return original_class(module).forward(module, *args, **kwargs)


def compare(
    replacement: Replacement,
    module: nn.Module,
    calls: Sequence[Call],
    expected: Sequence[Outcome],
    dtype: torch.dtype,
    gradient: bool = True,
    gradient_slack: float = 1,
) -> Agreement:
    """Run a replacement on calls whose outcomes are known; ``module`` is a fresh copy.

    A call that fails refuses the kinds in which it differs from the first one. Where the first fails, all do.
    ``gradient_slack``: how many times as far as results gradients may be apart.
    """
    agreement = Agreement()
    core = _kinds(replacement, module, calls[0])
    for number, (call, outcome) in enumerate(zip(calls, expected, strict=True)):
        kinds = _kinds(replacement, module, call)
        blamed = kinds - core - agreement.allowed if number else kinds
        if outcome.error:
            agreement.refused.update(dict.fromkeys(blamed, f"{ORIGINAL_RAISES} {outcome.error}"))
            continue
        if not kinds and replacement.warms_up:
            _observe(module, call, original_forward, number, gradient=False)
        if not kinds or kinds & agreement.refused.keys():
            continue
        try:
            if number == 0 and gradient:  # most candidates fail here, before anything dear
                quick = _observe(detached_copy(module), call, replacement.run, number, gradient=False)
                _differences(_without_graph(quick), _without_graph(outcome), replacement, TOLERANCE[dtype])
            actual = _observe(module, call, replacement.run, number, gradient)
            agreement.output_error, agreement.gradient_error = (
                max(pair)
                for pair in zip(
                    (agreement.output_error, agreement.gradient_error),
                    _differences(actual, outcome, replacement, TOLERANCE[dtype], gradient_slack),
                    strict=True,
                )
            )
            agreement.nan |= any(not torch.isfinite(x).all() for x in _tensors(outcome.output) if x.is_floating_point())
            agreement.allowed |= kinds
        except Disagreement as difference:
            if not blamed:  # an ordinary call: it is something else
                agreement.allowed.clear()
                agreement.refused = dict.fromkeys(sorted(kinds), str(difference))
                break
            for kind in blamed:
                agreement.refused.setdefault(kind, str(difference))
        if number == 0 and agreement.refused:
            break
    return agreement


def _kinds(replacement: Replacement, module: nn.Module, call: Call) -> set[str]:
    kinds = replacement.kinds(module, *call.args, **call.kwargs)
    return set() if isinstance(kinds, str) else set(kinds)


def disagreement(actual: Outcome, expected: Outcome, dtype: torch.dtype) -> str:
    """How two outcomes of the same forward differ; empty if they do not."""
    if actual.error or expected.error:
        return "" if actual.error == expected.error else f"{actual.error or 'no error'} and {expected.error or 'none'}"
    try:
        _differences(_without_graph(actual), _without_graph(expected), None, TOLERANCE[dtype])
    except Disagreement as difference:
        return str(difference)
    return ""


# Observing ------------------------------------------------------------------------------------------------------------


def _observe(module: nn.Module, call: Call, forward: Forward, seed: int, gradient: bool) -> Outcome:
    gradient &= call.gradient
    args = [x.detach().clone(memory_format=torch.preserve_format) if isinstance(x, Tensor) else x for x in call.args]
    if len(call.args) > 1 and call.args[0] is call.args[1]:  # self-attention gets one tensor twice
        args[1] = args[0]
    inputs = [args[i] for i in call.differentiable if i < len(args) and isinstance(args[i], Tensor)]
    inputs = list({id(x): x.requires_grad_() for x in inputs}.values())
    before = _state(module)
    given = [x + 0 if i in call.differentiable and isinstance(x, Tensor) else x for i, x in enumerate(args)]
    if len(given) > 1 and args[0] is args[1]:
        given[1] = given[0]
    saved = [x.detach().clone() if isinstance(x, Tensor) else None for x in given]
    try:
        with torch.random.fork_rng(devices=()), torch.set_grad_enabled(gradient):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach GPUs
            output = forward(module, *given, **call.kwargs)
        written = {
            i: x.detach().clone()
            for i, (x, old) in enumerate(zip(given, saved, strict=True))
            if old is not None and not torch.equal(x, old)
        }
        gradients = _gradients(output, inputs, module) if gradient else ()
    except Exception as error:  # whatever a foreign module raises is its outcome
        return Outcome(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    after = _state(module)
    changed = {name: value for name, value in after.items() if not _same(before.get(name), value)}
    return Outcome(_detached(output), gradients, changed, written)


def _gradients(output: Any, inputs: Sequence[Tensor], module: nn.Module) -> tuple[Tensor | None, ...]:
    outputs = [x for x in _tensors(output) if x.is_floating_point() and x.requires_grad]
    wanted = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    if not outputs or not wanted:
        return tuple(None for _ in wanted)
    cotangents = []
    for number, x in enumerate(outputs):
        generator = torch.Generator().manual_seed(number)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        # A result that is not finite has no gradient to compare, and must not spoil the others'.
        cotangents.append(torch.where(torch.isfinite(x.detach()), noise, 0))
    return torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)


def _state(module: nn.Module) -> dict[str, Any]:
    """Tensors that are no parameters, and plain attributes, of the module and those in it."""
    state: dict[str, Any] = {}
    for prefix, part in module.named_modules():
        tensors = {name: value for name, value in part._buffers.items() if value is not None}
        tensors.update({name: value for name, value in part.__dict__.items() if isinstance(value, Tensor)})
        settings = settings_of(part, frozenset())
        state.update({f"{prefix}.{name}".lstrip("."): value for name, value in settings.items()})
        state.update({f"{prefix}.{name}".lstrip("."): value.detach().clone() for name, value in tensors.items()})
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:  # the vectors of some spectral norms
            state[name] = parameter.detach().clone()
    return state


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old.shape == new.shape and old.dtype == new.dtype and torch.equal(old, new)
    return not isinstance(old, Tensor) and not isinstance(new, Tensor) and type(old) is type(new) and old == new


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)


def _detached(value: Any, keep_wish: bool = True) -> Any:
    """Tensors without their graph; with ``keep_wish`` they still tell whether they had one."""
    if isinstance(value, Tensor):
        wish = keep_wish and value.requires_grad
        return value.detach().requires_grad_(wish) if value.is_floating_point() else value
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_detached(part, keep_wish) for part in value)
    return {name: _detached(part, keep_wish) for name, part in value.items()} if isinstance(value, dict) else value


def _without_graph(outcome: Outcome) -> Outcome:
    return outcome._replace(output=_detached(outcome.output, keep_wish=False), gradients=())


# Comparing ------------------------------------------------------------------------------------------------------------


def _differences(
    actual: Outcome, expected: Outcome, replacement: Replacement | None, limit: float, gradient_slack: float = 1
) -> tuple[float, float]:
    """Relative errors of results and gradients; Disagreement where they are too large, or anything else differs."""
    if actual.error:
        raise Disagreement(f"raises {actual.error}")
    discrete = replacement.discrete_outputs if replacement is not None else ()
    output_error = _check_output("result", actual.output, expected.output, limit, discrete)
    gradient_error = 0.0
    # A bias in front of a norm has gradient zero but for rounding: small ones count as a share of the largest.
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64).item() for g in expected.gradients if g is not None]
    least = _SMALL_GRADIENT * max(filter(math.isfinite, norms), default=0.0)
    for number, (got, wanted) in enumerate(zip(actual.gradients, expected.gradients, strict=False)):
        if (got is None) != (wanted is None):
            raise Disagreement(f"gradient {number} is {'none' if got is None else 'not none'}")
        if got is not None and wanted is not None:
            gradient_error = max(
                gradient_error, _check_tensor(f"gradient {number}", got, wanted, limit * gradient_slack, least)
            )
    changes: tuple[tuple[str, dict[Any, Any], dict[Any, Any]], ...] = (
        ("attribute ", actual.changed, expected.changed),
        ("argument ", actual.written, expected.written),
    )
    for what, ours, theirs in changes:
        if ours.keys() != theirs.keys():
            names = ", ".join(sorted(map(str, ours.keys() ^ theirs.keys())))
            raise Disagreement(f"{what}{names}: changed by one of the two only")
        for name in ours:
            _check_output(f"{what}{name}", ours[name], theirs[name], limit, ())
    return output_error, gradient_error


def _check_output(name: str, actual: Any, expected: Any, limit: float, discrete: Sequence[int]) -> float:
    if isinstance(expected, Tensor):
        if not isinstance(actual, Tensor):
            raise Disagreement(f"{name}: a {type(actual).__name__} instead of a tensor")
        return _check_tensor(name, actual, expected, limit)
    if type(actual) is not type(expected):
        raise Disagreement(f"{name}: a {type(actual).__name__} instead of a {type(expected).__name__}")
    if isinstance(expected, (tuple, list)):
        if len(actual) != len(expected):
            raise Disagreement(f"{name}: {len(actual)} parts instead of {len(expected)}")
        errors = [0.0]
        for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            if number in discrete and isinstance(theirs, Tensor) and isinstance(ours, Tensor):
                _check_discrete(f"{name} {number}", ours, theirs)
            else:
                errors.append(_check_output(f"{name} {number}", ours, theirs, limit, ()))
        return max(errors)
    if isinstance(expected, dict):
        if actual.keys() != expected.keys():
            raise Disagreement(f"{name}: other keys")
        return max([0.0, *(_check_output(f"{name}[{k!r}]", actual[k], expected[k], limit, ()) for k in expected)])
    if actual != expected:
        raise Disagreement(f"{name}: {actual!r} instead of {expected!r}")
    return 0.0


def _check_form(name: str, actual: Tensor, expected: Tensor) -> None:
    for what in ("shape", "dtype", "device", "requires_grad"):
        ours, theirs = getattr(actual, what), getattr(expected, what)
        if ours != theirs:
            got, wanted = (list(x) if what == "shape" else x for x in (ours, theirs))
            raise Disagreement(f"{name}: {what} {got} instead of {wanted}")


def _check_tensor(name: str, actual: Tensor, expected: Tensor, limit: float, least: float = 0.0) -> float:
    _check_form(name, actual, expected)
    if not expected.is_floating_point():
        if not torch.equal(actual, expected):
            raise Disagreement(f"{name}: other values")
        return 0.0
    error = relative_error(actual, expected, least)
    if not error <= limit:
        raise Disagreement(f"{name}: off by {error:.2g} of its norm")
    return error


def _check_discrete(name: str, actual: Tensor, expected: Tensor) -> None:
    _check_form(name, actual, expected)
    differs = (actual - expected).abs() > 1e-3
    share = differs.double().mean().item()
    if share > _DISCRETE_SHARE:
        raise Disagreement(f"{name}: {share:.0%} of its values differ")


def relative_error(actual: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """||actual - expected|| / ||expected|| where ``expected`` is finite; the norm itself where it is to be zero.

    ``least``: what is divided by at least.
    """
    ours, theirs = actual.detach(), expected.detach()
    norm = torch.linalg.vector_norm(theirs, dtype=torch.float64).item()
    if not math.isfinite(norm):
        known = torch.isfinite(theirs)
        ours, theirs = torch.where(known, ours, 0), torch.where(known, theirs, 0)
        norm = torch.linalg.vector_norm(theirs, dtype=torch.float64).item()
    error = torch.linalg.vector_norm(ours - theirs, dtype=torch.float64).item()
    return error / (max(norm, least) or 1.0) if math.isfinite(error) else math.inf
