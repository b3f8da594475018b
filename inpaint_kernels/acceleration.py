"""``accelerate(model)``: the fast kernels under somebody else's model, without a change of its code."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from inpaint_kernels.recipes import _class_swap, _probe
from inpaint_kernels.recipes._class_swap import Swap, is_swapped, original_class, restore_class, swap_class
from inpaint_kernels.recipes._convolution import is_plain_convolution
from inpaint_kernels.recipes._probe import (
    Agreement,
    Outcome,
    copy_in_mode,
    detached_copy,
    disagreement,
    original_forward,
    run_calls,
)
from inpaint_kernels.recipes._replacement import Call, Form, Recipe, Replacement, form_of
from inpaint_kernels.recipes.coherent_semantic_attention import CoherentSemanticAttentions
from inpaint_kernels.recipes.contextual_attention import ContextualAttention
from inpaint_kernels.recipes.diagonal_fuse import DiagonalFuses
from inpaint_kernels.recipes.dilated_conv2d import Convolution, ConvolutionBlock, PlainConvolution
from inpaint_kernels.recipes.gated_conv2d import GatedConvolution
from inpaint_kernels.recipes.partial_conv2d import PartialConvolutions
from inpaint_kernels.recipes.sequential import FusedSequential, Segment, runs_of

RECIPES: tuple[Recipe, ...] = (
    ContextualAttention(),
    CoherentSemanticAttentions(),
    PartialConvolutions(),
    GatedConvolution(),
    Convolution(),
    PlainConvolution(),
)

AROUND_CHILDREN: tuple[Recipe, ...] = (DiagonalFuses(),)
"""Recipes whose replacement still calls the module's children."""

_ATTENTION = ("contextual_attention", "coherent_semantic_attention", "diagonal_fuse")

_GAIN = 1.03
"""How many times faster a layout, or a convolution of which nothing is fused, must be to be worth a change."""

_KINK_SLACK = 100
"""How much farther than results gradients may be apart in a short dtype: where a sum is zero to rounding, two orders of
adding put it on two sides of a ReLU's kink, and one such pixel of 100,000 changes the gradient by 0.003 of its norm."""

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


@dataclass
class ModuleReport:
    """What was found of one module.

    Attributes:
        name: where it is in the model; empty: the model itself.
        kind: name of its class.
        replaced: whether its forward is a replacement now.
        recipe: name of the op.
        semantics: what it was taken for.
        output_error: largest relative error of a result when it was probed.
        gradient_error: the same of a gradient.
        reason: why it is as it was, or what a reader should know of the replacement.
        refused: kinds of calls that its own forward still runs, and why.
        speedup: times faster at the size of the example inputs, where that was measured; else None.
    """

    name: str
    kind: str
    replaced: bool
    recipe: str = ""
    semantics: str = ""
    output_error: float = 0.0
    gradient_error: float = 0.0
    reason: str = ""
    speedup: float | None = None
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        name = self.name or "(the model)"
        if not self.replaced:
            return f"  kept      {name} ({self.kind}): {self.reason}"
        errors = (
            f"off by {self.output_error:.0e}, gradients {self.gradient_error:.0e}" if self.recipe != _LAYOUT else ""
        )
        own = f"own forward for {', '.join(self.refused)}" if self.refused else ""
        parts = [self.semantics, errors, f"{self.speedup:.1f}x here" if self.speedup else "", self.reason, own]
        return f"  replaced  {name} ({self.kind}): {self.recipe}: " + "; ".join(part for part in parts if part)


@dataclass
class AccelerationReport:
    """What :func:`accelerate` did.

    Attributes:
        modules: one entry for each module that a recipe looked at.
        model_error: relative error of the whole model's results for the example inputs; None without them.
    """

    modules: list[ModuleReport] = field(default_factory=list)
    model_error: float | None = None
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)
    _swaps: list[Swap] = field(default_factory=list, repr=False)

    @property
    def replaced(self) -> list[ModuleReport]:
        """The modules whose forward is a replacement."""
        return [entry for entry in self.modules if entry.replaced]

    @property
    def kept(self) -> list[ModuleReport]:
        """The modules that are as they were, though a recipe looked at them."""
        return [entry for entry in self.modules if not entry.replaced]

    @property
    def fallbacks(self) -> dict[str, dict[str, int]]:
        """How many calls the original forward has run since, by module and reason."""
        return {swap.name: dict(swap.fallbacks) for swap in self._swaps if swap.fallbacks}

    def undo(self) -> None:
        """Give every module its class and its memory layout back. Twice is as good as once."""
        while self._undo:
            self._undo.pop()()
        for entry in self.modules:
            entry.replaced = False
            entry.reason = entry.reason or "undone"

    def __str__(self) -> str:
        kept = self.kept
        lines = [f"{len(self.replaced)} replaced, {len(kept)} kept", *map(str, self.modules)]
        if self.model_error is not None:
            lines.append(f"  the whole model's results for the example inputs are off by {self.model_error:.1e}")
        for name, reasons in self.fallbacks.items():
            lines += [f"  {name}: the original forward ran {n} times: {reason}" for reason, n in reasons.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module, example_inputs: Any = None, strict: bool = False) -> AccelerationReport:
    """Let this library's kernels run inside a model, wherever they compute what its own modules compute.

    Modules are recognised by their structure, never by their name, and proven by numbers: on a copy, in float64 where
    the module can, with several masks, scales, sizes and layouts, in training and evaluation, results, gradients and
    everything that a call changes are compared with the module's own. What disagrees stays as it is. Calls that were
    not proven (another device or dtype, autocast, an odd size, hooks inside, a changed setting) run the module's own
    forward, are counted in the report and warn once.

    Only the modules of this model change, and of them only the class: parameters, names, hooks, optimisers and
    checkpoints stay valid, ``isinstance`` holds, copies are fast too, and ``torch.save`` writes the original model.

    Args:
        model: any model, also in ``DataParallel``, ``DistributedDataParallel`` or ``torch.compile``. It is changed.
        example_inputs: the arguments of a usual call: a tensor, a tuple, or a dict of arguments by name. With them the
            whole model is checked, convolutions of which nothing is fused are replaced where that is faster at these
            sizes, and channels_last is used where it is faster. The model's copy runs a few times on them.
        strict: raise if nothing was replaced.

    Returns:
        :class:`AccelerationReport`: print it to see each module, what it was taken for, and why; ``undo()`` takes all
        back, to the bit.

    Raises:
        TypeError: ``model`` is no module.
        RuntimeError: with ``strict``, nothing could be replaced; the message is the report. Whatever the model raises
            for the example inputs.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=2, dilation=2), torch.nn.ELU())
        >>> report = accelerate(model)
        >>> [entry.recipe for entry in report.replaced]
        ['dilated_conv2d']
        >>> report.undo()
        >>> type(model).__name__
        'Sequential'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    report = AccelerationReport()
    inner = _unwrapped(model)
    example = None if example_inputs is None else _as_call(example_inputs)
    recorded: dict[str, Call] = {}
    expected: Any = None
    if example is not None:
        try:
            copied = detached_copy(inner)
        except Exception as error:  # whatever a foreign module raises
            example = None
            why = f"example_inputs are not used: it cannot be copied: {type(error).__name__}: {error}"
            report.modules.append(ModuleReport("", type(inner).__name__, False, reason=why))
        else:
            recorded, expected = _record(copied, example)
    try:
        _Acceleration(report, recorded).visit(inner, "")
        if example is not None:
            _check_model(report, inner, example, expected)
    except BaseException:
        report.undo()
        raise
    if strict and not report.replaced:
        raise RuntimeError(f"model: nothing could be replaced: {report}")
    return report


@contextmanager
def accelerated(model: nn.Module, example_inputs: Any = None, strict: bool = False) -> Iterator[AccelerationReport]:
    """:func:`accelerate` for the length of a ``with`` block."""
    report = accelerate(model, example_inputs, strict)
    try:
        yield report
    finally:
        report.undo()


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, _WRAPPERS):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _as_call(example_inputs: Any) -> Call:
    if isinstance(example_inputs, Mapping):
        return Call((), dict(example_inputs))
    return Call(tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,))


def _refusal(module: nn.Module) -> str:
    """Why nothing in a module can be replaced; empty if something may."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript: its forward is compiled, no class of Python's runs"
    if type(module).__module__.startswith(("torch.ao.", "torch.nn.quantized", "torch.nn.intrinsic")):
        return "quantised"
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters(recurse=False)):
        return "its parameters have no values yet"
    if any(p.is_meta for p in module.parameters(recurse=False)):
        return "its parameters are on the meta device"
    if type(module).__name__ == "FullyShardedDataParallel":
        return "its parameters are flattened and sharded"
    return "an instance's own forward hides its class's" if "forward" in module.__dict__ else ""


class _Found(NamedTuple):
    """A replacement, with what its probing said."""

    replacement: Replacement
    agreement: Agreement
    dtypes: frozenset[torch.dtype]


class _Acceleration:
    """One walk through a model."""

    def __init__(self, report: AccelerationReport, recorded: Mapping[str, Call]) -> None:
        self._report = report
        self._recorded = recorded
        self._seen: set[int] = set()
        self._known: dict[Any, _Found | str] = {}
        self._outcomes: dict[Any, _Original] = {}
        self._times: dict[Any, float] = {}

    def visit(self, module: nn.Module, name: str) -> None:
        """Replace the module, or what can be in it."""
        if id(module) in self._seen:  # shared: its other place has it
            return
        self._seen.add(id(module))
        if is_swapped(module):
            self._keep(module, name, "its forward is a replacement already")
            return
        inside = "module" if isinstance(module, _WRAPPERS) else "_orig_mod"  # of torch.compile
        if inside in module._modules:
            self.visit(module.get_submodule(inside), f"{name}.{inside}".lstrip("."))
            return
        refusal = _refusal(module)
        if refusal:
            self._keep(module, name, refusal)
            return
        if type(module) is nn.Sequential:
            self._visit_sequential(module, name)
            return
        reason = self._try(RECIPES, module, name)
        if reason is None:
            return
        for child_name, child in module.named_children():
            self.visit(child, f"{name}.{child_name}".lstrip("."))
        if not self._holds_attention(module):
            around = self._try(AROUND_CHILDREN, module, name)
            if around is None:
                return
            reason = reason or around
        if reason:
            self._keep(module, name, reason)

    def _holds_attention(self, module: nn.Module) -> bool:
        """Whether attention inside of the module is replaced already."""
        swaps = [part.__dict__.get(_class_swap.SLOT) for part in module.modules()]
        return any(isinstance(s, Swap) and s.replacement.recipe in _ATTENTION for s in swaps)

    def _try(self, recipes: Sequence[Recipe], module: nn.Module, name: str) -> str | None:
        """Replace the module by the first recipe that can: None; or why none can, empty if none looked at it."""
        reason = ""
        for recipe in recipes:
            if recipe.mismatch(module):
                continue
            found = self._find(recipe, module, name)
            if isinstance(found, str):
                reason = reason if found == _NO_CALL else reason or found
                continue
            return self._replace(module, name, found) or None
        return reason

    def _visit_sequential(self, module: nn.Sequential, name: str) -> None:
        segments, founds = [], []
        for names in runs_of(module):
            block: _Found | None = None
            if len(names) > 1 and not any(_refusal(module.get_submodule(child)) for child in names):
                run = nn.Sequential()
                for child in names:
                    run.add_module(child, module.get_submodule(child))
                run.training = module.training  # run.train() would change the children, which are the model's
                found = self._find(Convolution(), run, name)
                block = found if isinstance(found, _Found) else None
            segments.append(Segment(names, None if block is None else block.replacement))  # type: ignore[arg-type]
            if block is not None:
                founds.append(block)
        if founds:
            agreement = Agreement(
                {"map"},
                {},
                max(found.agreement.output_error for found in founds),
                max(found.agreement.gradient_error for found in founds),
            )
            fused = FusedSequential(tuple(segments))
            dtypes = frozenset.intersection(*(found.dtypes for found in founds))
            self._replace(module, name, _Found(fused, agreement, dtypes))
        for segment in segments:
            if segment.block is None or not founds:
                for child in segment.names:
                    self.visit(module.get_submodule(child), f"{name}.{child}".lstrip("."))

    # One module -------------------------------------------------------------------------------------------------------

    def _find(self, recipe: Recipe, module: nn.Module, name: str) -> _Found | str:
        example = self._recorded.get(name)
        key = (type(recipe), _configuration(module), str(example) if recipe.uses_example else "")
        if key not in self._known:
            self._known[key] = _Search(recipe, module, example, self._outcomes).run()
        return self._known[key]

    def _replace(self, module: nn.Module, name: str, found: _Found) -> str:
        """Swap the module's class; or say why that is not worth it."""
        unlike = self._unlike_recorded(module, name, found)
        if unlike:
            return (
                f"{found.replacement.recipe}, but the model calls it in a way that its own forward must run: {unlike}"
            )
        speedup = self._speedup(module, name, found.replacement)
        fuses_nothing = isinstance(found.replacement, ConvolutionBlock) and is_plain_convolution(module)
        if fuses_nothing and (speedup is None or speedup < _GAIN):
            return _not_worth(speedup)
        swap = Swap(
            name or type(module).__name__, module, found.replacement, frozenset(found.agreement.allowed), found.dtypes
        )
        swap_class(module, swap)
        self._report._swaps.append(swap)
        self._report._undo.append(lambda: restore_class(module))
        self._report.modules.append(
            ModuleReport(
                name,
                original_class(module).__name__,
                True,
                found.replacement.recipe,
                found.replacement.semantics(),
                found.agreement.output_error,
                found.agreement.gradient_error,
                "numbers where the original gives NaN" if found.agreement.nan else "",
                speedup,
                dict(found.agreement.refused),
            )
        )
        return ""

    def _unlike_recorded(self, module: nn.Module, name: str, found: _Found) -> str:
        """Why the replacement would not run the recorded call; empty if it would."""
        recorded = self._recorded.get(name)
        if recorded is None or found.replacement.warms_up:
            return ""
        call = recorded.filled()
        kinds = found.replacement.kinds(module, *call.args, **call.kwargs)
        return kinds if isinstance(kinds, str) else ", ".join(sorted(kinds - found.agreement.allowed))

    def _keep(self, module: nn.Module, name: str, reason: str) -> None:
        self._report.modules.append(ModuleReport(name, original_class(module).__name__, False, reason=reason))

    def _speedup(self, module: nn.Module, name: str, replacement: Replacement) -> float | None:
        """How many times faster it is for a call like the recorded one."""
        call = self._recorded.get(name)
        if call is None or not isinstance(replacement, ConvolutionBlock):
            return None
        key = (_configuration(module), call.args)
        if key not in self._times:
            self._times[key] = _race(module, replacement, call.filled())
        return self._times[key]


def _not_worth(speedup: float | None) -> str:
    if speedup is None:
        return "a convolution alone: replaced only where example_inputs show that it is faster"
    return f"a convolution alone, {speedup:.2f}x as fast by the library's kernel at the size of the example inputs"


_CANNOT_RUN = "its own forward raises"
_NO_CALL = "no call of it is known"


class _Original(NamedTuple):
    """What a module's own forward does in a family's calls: by mode, training or not; or why that says nothing."""

    calls: Sequence[Call]
    outcomes: dict[bool, list[Outcome]]
    problem: str = ""


class _Search:
    """The search for a replacement of one module by one recipe."""

    def __init__(self, recipe: Recipe, module: nn.Module, example: Call | None, outcomes: dict[Any, _Original]) -> None:
        self._recipe = recipe
        self._module = module
        self._example = example
        self._outcomes = outcomes  # of all modules so far: two recipes may make the same calls
        self._own_dtype = _dtype_of(module, example)

    def run(self) -> _Found | str:
        """What was found, or why nothing was."""
        reason = ""
        for dtype in dict.fromkeys((torch.float64, self._own_dtype)):
            found = self._find_in(dtype)
            if isinstance(found, _Found):
                return found if dtype == self._own_dtype else self._checked(found)
            reason = found
            if not reason.startswith(_CANNOT_RUN):
                break
        return reason

    def _find_in(self, dtype: torch.dtype) -> _Found | str:
        """The first candidate that agrees in all kinds of calls that the module can run, or the one with the most."""
        try:
            pristine = _class_swap.restored(detached_copy(self._module)).to(dtype)
        except Exception as error:  # whatever a foreign module raises
            return f"it cannot be copied: {type(error).__name__}: {error}"
        example = str(self._example) if self._recipe.uses_example else ""
        key = (self._recipe.family, dtype, _configuration(self._module), example)
        if key not in self._outcomes:
            self._outcomes[key] = self._observe(pristine, dtype)
        original = self._outcomes[key]
        if original.problem:
            return original.problem
        best: _Found | None = None
        closest = ""
        ordinary = original.outcomes[self._module.training][0].output
        for candidate in self._recipe.candidates(detached_copy(pristine), original.calls[0], ordinary):
            agreement = self._compare(candidate, pristine, original, dtype)
            if not agreement.allowed:
                closest = closest or next(iter(agreement.refused.values()), "")
                continue
            if best is None or len(agreement.allowed) > len(best.agreement.allowed):
                best = _Found(candidate, agreement, frozenset({dtype}))
            if all(why.startswith(_probe.ORIGINAL_RAISES) for why in agreement.refused.values()):
                break
        if best is not None:
            return best
        return f"it is no known {self._recipe.name}" + (f"; the first that was tried: {closest}" if closest else "")

    def _observe(self, pristine: nn.Module, dtype: torch.dtype) -> _Original:
        calls = self._recipe.calls(detached_copy(pristine), dtype, self._example)
        if not calls:
            return _Original(calls, {}, _NO_CALL)
        outcomes: dict[bool, list[Outcome]] = {}
        first = self._module.training
        for mode in (first, not first):
            copies = [copy_in_mode(pristine, mode) for _ in (0, 1)]
            # The second mode is the exception; where the two differ, they differ in the results of ordinary calls.
            chosen = calls if mode == first else calls[:2]
            outcomes[mode] = list(run_calls(copies[0], chosen, original_forward, gradient=mode == first))
            if outcomes[mode][0].error:
                return _Original(calls, outcomes, f"{_CANNOT_RUN} {outcomes[mode][0].error}")
            again = next(run_calls(copies[1], chosen, original_forward, gradient=False))
            difference = disagreement(again, outcomes[mode][0], dtype)
            if difference:
                return _Original(calls, outcomes, f"two calls of it differ: {difference}")
        return _Original(calls, outcomes)

    def _compare(
        self, candidate: Replacement, pristine: nn.Module, original: _Original, dtype: torch.dtype
    ) -> Agreement:
        first = self._module.training
        total = _probe.compare(
            candidate, copy_in_mode(pristine, first), original.calls, original.outcomes[first], dtype
        )
        if not total.allowed:
            return total
        outcomes = original.outcomes[not first]
        copy = copy_in_mode(pristine, not first)
        other = _probe.compare(candidate, copy, original.calls[: len(outcomes)], outcomes, dtype, gradient=False)
        for kind, why in other.refused.items():
            total.allowed.discard(kind)
            total.refused.setdefault(kind, f"{why} in {'evaluation' if first else 'training'}")
        total.output_error = max(total.output_error, other.output_error)
        return total

    def _checked(self, found: _Found) -> _Found | str:
        """What was found in float64, if an ordinary call in the module's own dtype agrees as far as that dtype can."""
        dtype = self._own_dtype
        calls = self._recipe.calls(detached_copy(self._module), dtype, self._example)
        calls = calls[: 2 if found.replacement.warms_up else 1]
        if not calls:
            return _NO_CALL
        expected = list(run_calls(detached_copy(self._module), calls, original_forward))
        if expected[-1].error:
            return f"{_CANNOT_RUN} {expected[-1].error} in {dtype}"
        agreement = _probe.compare(
            found.replacement, detached_copy(self._module), calls, expected, dtype, gradient_slack=_KINK_SLACK
        )
        if agreement.refused:
            return f"in {dtype}: {next(iter(agreement.refused.values()))}"
        has_weights = next(self._module.parameters(), None) is not None
        return found._replace(dtypes=frozenset({dtype}) if has_weights else frozenset({dtype, *found.dtypes}))


def _dtype_of(module: nn.Module, example: Call | None) -> torch.dtype:
    """The dtype that the module works in."""
    held = itertools.chain(module.parameters(), module.buffers())
    candidates = [tensor.dtype for tensor in held if tensor.is_floating_point()]
    if example is not None:
        candidates += [x.dtype for x in example.args if isinstance(x, Form) and x.dtype.is_floating_point]
    return candidates[0] if candidates else torch.float32


def _configuration(module: nn.Module) -> Any:
    """What two modules that the same replacement fits have in common."""
    shapes = tuple((name, p.shape, p.dtype, p.requires_grad, p.device.type) for name, p in module.named_parameters())
    settings = tuple(
        (name, key, value)
        for name, part in module.named_modules()
        for key, value in _class_swap.settings_of(part, frozenset()).items()
    )
    kinds = tuple((name, type(part), part.training) for name, part in module.named_modules())
    others = tuple((name, _other_attributes(part)) for name, part in module.named_modules())
    return (kinds, shapes, settings, others)


def _other_attributes(module: nn.Module) -> Any:
    """Attributes that are no settings, and buffers of modules other than torch's: by value, or by identity."""
    if original_class(module).__module__.startswith("torch.nn."):
        return ()
    values = {**module._buffers, **{k: v for k, v in vars(module).items() if k not in vars(_PLAIN)}}
    return tuple((name, _trait(value)) for name, value in values.items() if not _class_swap.is_setting(value))


_PLAIN = nn.Module()


def _trait(value: Any) -> Any:
    if isinstance(value, Tensor):
        few = value.numel() <= _FEW and not value.is_meta and not value.is_sparse and not value.is_quantized
        return (value.shape, value.dtype, repr(value.tolist()) if few else id(value))
    if isinstance(value, (tuple, list)):
        return (type(value), *map(_trait, value))
    if isinstance(value, dict):
        return (dict, *((_trait(k), _trait(v)) for k, v in value.items()))
    return value if _class_swap.is_setting(value) else id(value)


_FEW = 4096
"""Elements of a tensor that are looked at one by one."""


# Example inputs -------------------------------------------------------------------------------------------------------


def _record(copy: nn.Module, example: Call) -> tuple[dict[str, Call], Any]:
    """The first call of every module while a copy of a model runs, without values, and the model's results."""
    recorded: dict[str, Call] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorded.setdefault(name, Call(tuple(map(form_of, args)), {k: form_of(v) for k, v in kwargs.items()}))

        return record

    if not isinstance(copy, torch.jit.ScriptModule):
        for name, module in copy.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                module.register_forward_pre_hook(recorder(name), with_kwargs=True)
    return recorded, _run(copy, example)


def _run(model: nn.Module, example: Call) -> Any:
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reach GPUs
        return model(*example.args, **example.kwargs)


def _race(module: nn.Module, replacement: Replacement, call: Call, rounds: int = 3) -> float:
    """Time of the module's own forward in times of the replacement's, the best of some interleaved rounds."""
    copy = detached_copy(module)
    times: dict[Any, list[float]] = {original_forward: [], replacement.run: []}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for forward, taken in times.items():
                taken.append(_timed(functools.partial(forward, copy, *call.args, **call.kwargs), call)[0])
    own, ours = (min(taken[1:]) for taken in times.values())
    return own / ours


def _timed(run: Callable[[], Any], call: Call) -> tuple[float, Any]:
    """Seconds of a run on the device of the call's tensors, and its result."""
    cuda = any(isinstance(x, Tensor) and x.is_cuda for x in (*call.args, *call.kwargs.values()))
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def _check_model(report: AccelerationReport, model: nn.Module, example: Call, expected: Any) -> None:
    """Compare the whole model's results, and choose its layout."""
    copy = detached_copy(model)
    plain, report.model_error = _timed_error(copy, example, expected)
    for swap in report._swaps:  # the copy counts there too
        swap.fallbacks.clear()
    if not report.replaced or is_swapped(model) or _refusal(model):
        return
    copy = detached_copy(model)
    _use_channels_last(copy)
    try:
        last, error = _timed_error(copy, example, expected)
    except RuntimeError:  # code that views a map's memory cannot have it in another order
        return
    if last * _GAIN < plain and error <= max(2 * report.model_error, 1e-4):
        report.model_error = error
        report._swaps.append(_use_channels_last(model))
        report._undo.append(lambda: restore_class(model))
        entry = ModuleReport("", original_class(model).__name__, True, _LAYOUT, _LAYOUT_WORDS, speedup=plain / last)
        report.modules.append(entry)


def _timed_error(model: nn.Module, example: Call, expected: Any) -> tuple[float, float]:
    """Seconds of a run, the better of two, and how far the first one's results are off: some modules iterate on."""
    first, result = _timed(functools.partial(_run, model, example), example)
    second, _ = _timed(functools.partial(_run, model, example), example)
    return min(first, second), _model_error(result, expected)


def _model_error(actual: Any, expected: Any) -> float:
    pairs = zip(_probe._tensors(actual), _probe._tensors(expected), strict=True)
    return max((_probe.relative_error(a, b) for a, b in pairs if b.is_floating_point()), default=0.0)


# The layout -----------------------------------------------------------------------------------------------------------

_LAYOUT = "channels_last"
_LAYOUT_WORDS = "maps are channels_last inside, without a gradient"


@dataclass(frozen=True)
class ChannelsLast(Replacement):
    """A model's own forward on maps in channels_last; what it returns is in NCHW, as before.

    Without a gradient only: torch computes that of a weight 1.3 to 4 times as fast in NCHW.
    """

    recipe: ClassVar[str] = _LAYOUT

    def semantics(self) -> str:
        """What changes."""
        return _LAYOUT_WORDS

    def kinds(self, module: nn.Module, *args: Any, **kwargs: Any) -> frozenset[str] | str:
        """Any call."""
        return frozenset({"any"})

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        forward = original_class(module).forward
        if torch.is_grad_enabled():
            return forward(module, *args, **kwargs)
        args = tuple(_in_layout(x, torch.channels_last) for x in args)
        kwargs = {name: _in_layout(x, torch.channels_last) for name, x in kwargs.items()}
        return _in_layout(forward(module, *args, **kwargs), torch.contiguous_format)


def _in_layout(value: Any, layout: torch.memory_format) -> Any:
    if isinstance(value, Tensor):
        return value.contiguous(memory_format=layout) if value.dim() == 4 else value
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_in_layout(part, layout) for part in value)
    return {name: _in_layout(part, layout) for name, part in value.items()} if isinstance(value, dict) else value


def _use_channels_last(model: nn.Module) -> Swap:
    """Switch a model; :func:`restore_class` switches it back."""
    dtypes = frozenset(p.dtype for p in model.parameters()) | {torch.float32}
    swap = Swap(type(model).__name__, model, ChannelsLast(), frozenset({"any"}), dtypes)
    swap_class(model, swap)
    return swap
