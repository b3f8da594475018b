"""Giving one module another forward: its class becomes a subclass of its own, and everything else stays as it was.

Nothing but that module changes: its parameters, buffers, names, hooks and attributes are the same objects,
``isinstance`` holds, and no class, function or other instance of the same class is touched. A copy of the module is
swapped too. What ``torch.save`` or ``pickle`` writes is the original module, which loads without this package.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import types
import warnings
from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from inpaint_kernels.recipes._replacement import WARM_UP, Replacement

SLOT = "_inpaint_kernels_swap"
"""Attribute that holds a module's :class:`Swap`."""

# Attributes of these types decide what a forward does; a change of one that was probed ends the swap's validity.
_SETTINGS = (bool, int, float, str, type(None), type, types.FunctionType, types.BuiltinFunctionType)

_OWN = frozenset({*vars(nn.Module()), SLOT})
"""Attributes that every module has."""


class Swap:
    """What a swapped module carries: what runs instead of its forward, and which calls do.

    Args:
        name: of the module, for warnings.
        module: as it is before the swap.
        replacement: what runs instead.
        allowed: the kinds of calls that were probed and agreed, see :meth:`Replacement.kinds`.
        dtypes: of the tensors that were probed.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        replacement: Replacement,
        allowed: frozenset[str],
        dtypes: frozenset[torch.dtype],
    ) -> None:
        self.name = name
        self.replacement = replacement
        self.allowed = allowed
        self.dtypes = dtypes
        self.device = replacement.device(module)
        self.fallbacks: Counter[str] = Counter()
        self._settings = tuple(settings_of(module, replacement.state).items())
        paths = [name for name, _ in module.named_modules()] if replacement.covers_all else replacement.covered()
        covered = [(path, module.get_submodule(path)) for path in paths if path]
        self._covered = tuple(
            (path, type(part), tuple(settings_of(part, frozenset()).items())) for path, part in covered
        )

    def refusal(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Why the original forward must run this call; empty if the replacement may."""
        if not torch.compiler.is_compiling():
            changes = self._changes(module)
            if changes:
                return changes
        kinds = self.replacement.kinds(module, *args, **kwargs)
        if isinstance(kinds, str):
            return kinds
        if not kinds <= self.allowed:
            return f"not the same when probed: {', '.join(sorted(kinds - self.allowed))}"
        return self._tensors_refusal(args, kwargs)

    def _tensors_refusal(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        for x in (*args, *kwargs.values()):
            if not isinstance(x, Tensor):
                continue
            if x.device.type != self.device:
                return f"a tensor on {x.device.type}; probed on {self.device}"
            if x.is_floating_point() and x.dtype not in self.dtypes:
                return f"{x.dtype}; probed with {', '.join(sorted(map(str, self.dtypes)))}"
        if torch.is_autocast_enabled(self.device):
            return "inside torch.autocast; probed outside"
        return ""

    def _changes(self, module: nn.Module) -> str:
        changed = _changed_setting(module, self._settings)
        if changed:
            return changed
        for path, kind, settings in self._covered:
            child = child_at(module, path)
            if type(child) is not kind:
                return f"{path} is no longer a {kind.__name__}"
            if has_foreign_hooks(child):
                return f"{path} has hooks, which only its own call runs"
            if "forward" in child.__dict__:
                return f"{path} has a forward of its own"
            changed = _changed_setting(child, settings)
            if changed:
                return f"{path}.{changed}"
        return "a hook for all modules is set, which only their own calls run" if _has_any_global_hook() else ""

    def fell_back(self, reason: str) -> None:
        """Count a call of the original forward, and warn of the first with this reason."""
        if reason == WARM_UP:
            return
        self.fallbacks[reason] += 1
        if self.fallbacks[reason] == 1:
            warnings.warn(f"{self.name}: the original forward runs: {reason}", RuntimeWarning, stacklevel=4)


def swap_class(module: nn.Module, swap: Swap) -> None:
    """Let the swap's replacement run instead of the module's forward."""
    object.__setattr__(module, SLOT, swap)
    kind: Any = type(module)
    module.__class__ = _swapped(kind)


def restore_class(module: nn.Module) -> None:
    """Undo :func:`swap_class`."""
    if _Swapped in type(module).__bases__:  # else a parametrisation has made a class of it since, which is to stay
        module.__class__ = original_class(module)
    module.__dict__.pop(SLOT, None)


def restored(module: nn.Module) -> nn.Module:
    """The module, with the classes that it and all inside of it were made of."""
    for part in module.modules():
        if is_swapped(part):
            restore_class(part)
    return module


def is_swapped(module: nn.Module) -> bool:
    """Whether the module's forward is a replacement."""
    return SLOT in module.__dict__


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module was made of."""
    for kind in type(module).__mro__:
        if _Swapped in kind.__bases__:
            return cast("type[nn.Module]", kind.__bases__[1])
    return type(module)


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of the module's forward; none if it takes any number."""
    try:
        parameters = list(inspect.signature(original_class(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return ()
    usual = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return tuple(p.name for p in parameters) if all(p.kind in usual for p in parameters) else ()


class _Swapped(nn.Module):
    """First base of every swapped class; the original class is the second."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        swap: Swap | None = self.__dict__.get(SLOT)
        if swap is None:  # made by the class's own copying
            return super().forward(*args, **kwargs)
        reason = swap.refusal(self, args, kwargs)
        if not reason:
            return swap.replacement.run(self, *args, **kwargs)
        if not torch.compiler.is_compiling():
            swap.fell_back(reason)
        return super().forward(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        own = getattr(super(), "__deepcopy__", None)
        if own is not None:
            return own(memo)
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        attributes = dict(self.__dict__)
        swap = attributes.pop(SLOT, None)
        clone.__setstate__({name: copy.deepcopy(value, memo) for name, value in attributes.items()})
        if swap is not None:
            object.__setattr__(clone, SLOT, swap)
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        swapped, original = type(self), original_class(self)
        made = super().__reduce_ex__(protocol)
        if not isinstance(made, tuple):
            return made
        make, arguments, *rest = made
        if arguments == (swapped,):  # copyreg.__newobj__, which pickle allows for an object's own class only
            make, arguments = copyreg._reconstructor, (original, object, None)  # type: ignore[attr-defined]
        arguments = tuple(original if argument is swapped else argument for argument in arguments)
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != SLOT}
        return (make, arguments, *rest)


@functools.cache
def _swapped(kind: Any) -> Any:
    """The subclass whose forward is a replacement."""
    return type(f"Fast{kind.__name__}", (_Swapped, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def settings_of(module: nn.Module, state: frozenset[str]) -> dict[str, Any]:
    """The plain attributes that decide what the module's forward does, without those that it changes itself."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if name not in state and name not in _OWN and is_setting(value)
    }


def is_setting(value: Any) -> bool:
    """Whether an attribute is plain: its equality says all about it, and it can be hashed."""
    return isinstance(value, _SETTINGS) or (isinstance(value, tuple) and all(map(is_setting, value)))


def _changed_setting(module: nn.Module, settings: tuple[tuple[str, Any], ...]) -> str:
    attributes = module.__dict__
    for name, value in settings:
        now = attributes.get(name, attributes)
        if now is not value and (type(now) is not type(value) or now != value):
            return f"{name} is no longer {value!r}"
    return ""


def child_at(module: nn.Module, path: str) -> Any:
    """``module.get_submodule(path)``, quicker; None where there is no such child any more."""
    child: nn.Module | None = module
    for name in path.split(".") if path else ():
        child = None if child is None else child._modules.get(name)
    return child


def has_foreign_hooks(module: nn.Module) -> bool:
    """Whether hooks wait for the module's own call, other than those that compute a normalised weight."""
    if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return any(not type(hook).__module__.startswith("torch.nn.utils.") for hook in module._forward_pre_hooks.values())
