"""The part of mmcv and mmengine that the inpainting networks of open-mmlab/mmagic use.

mmcv needs a compiler and exact versions of torch, so it is not installed. What follows behaves as mmcv 2 documents it:
names of attributes, order of layers, bias, padding, initial values. SyncBN, which needs a GPU, is BatchNorm2d.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.utils import _pair

_ACTIVATIONS = {
    layer.__name__: layer for layer in (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.Sigmoid, nn.Tanh, nn.GELU)
}
_NOT_IN_PLACE = ("Tanh", "PReLU", "Sigmoid", "GELU")
_NORMS = {"BN": ("bn", nn.BatchNorm2d), "SyncBN": ("bn", nn.BatchNorm2d), "IN": ("in", nn.InstanceNorm2d)}
_PADDINGS = {"zero": nn.ZeroPad2d, "reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d}


class Registry:
    """Classes by name, as ``mmengine.Registry``."""

    def __init__(self) -> None:
        self._classes: dict[str, type] = {}

    def register_module(self, name: str | None = None, module: type | None = None) -> Any:
        """Remember a class under ``name``, its own by default; a decorator unless ``module`` is given."""

        def register(registered: type) -> type:
            self._classes[name or registered.__name__] = registered
            return registered

        return register if module is None else register(module)

    def get(self, name: str) -> type | None:
        """The class registered under ``name``, or None."""
        return self._classes.get(name)

    def build(self, config: dict[str, Any]) -> Any:
        """An object of the class ``config["type"]``; the other entries are its arguments."""
        arguments = dict(config)
        return self._classes[arguments.pop("type")](**arguments)


class BaseModule(nn.Module):
    """``mmengine.model.BaseModule``, whose parameters are initialised by their layers."""

    def __init__(self, init_cfg: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.init_cfg = init_cfg

    def init_weights(self) -> None:
        """Let the children initialise theirs."""
        child: Any
        for child in self.children():
            if hasattr(child, "init_weights"):
                child.init_weights()


def _init_with(initialise: Callable[..., object], **fixed: Any) -> Callable[..., None]:
    def init(module: nn.Module, *values: float, bias: float = 0, **options: Any) -> None:
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            initialise(module.weight, *values, **{**fixed, **options})
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            nn.init.constant_(module.bias, bias)  # type: ignore[arg-type]

    return init


kaiming_init = _init_with(nn.init.kaiming_normal_, a=0, mode="fan_out", nonlinearity="relu")
constant_init = _init_with(nn.init.constant_)
normal_init = _init_with(nn.init.normal_)


def build_activation_layer(config: dict[str, Any]) -> nn.Module:
    """The activation ``config["type"]``; the other entries are its arguments."""
    arguments = dict(config)
    return _ACTIVATIONS[arguments.pop("type")](**arguments)


def build_norm_layer(config: dict[str, Any], channels: int) -> tuple[str, nn.Module]:
    """The norm ``config["type"]`` and the name under which a module keeps it."""
    arguments = dict(config)
    name, layer = _NORMS[arguments.pop("type")]
    trained = arguments.pop("requires_grad", True)
    arguments.setdefault("eps", 1e-5)
    norm = layer(channels, **arguments)
    for parameter in norm.parameters():
        parameter.requires_grad = trained
    return name, norm


def conv_module(registry: Registry) -> type[nn.Module]:
    """``mmcv.cnn.ConvModule``, which finds kinds of convolutions in ``registry``."""

    def build_conv_layer(config: dict[str, Any] | None, *sizes: Any, **options: Any) -> nn.Module:
        arguments = dict(config or {"type": "Conv2d"})
        kind = arguments.pop("type")
        layer: Any = nn.Conv2d if kind in ("Conv2d", "Conv") else registry.get(kind)
        return layer(*sizes, **options, **arguments)

    class ConvModule(nn.Module):
        """Convolution, norm and activation, each but the first optional."""

        def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: int | tuple[int, int],
            stride: int | tuple[int, int] = 1,
            padding: int | tuple[int, int] = 0,
            dilation: int | tuple[int, int] = 1,
            groups: int = 1,
            bias: bool | str = "auto",
            conv_cfg: dict[str, Any] | None = None,
            norm_cfg: dict[str, Any] | None = None,
            act_cfg: dict[str, Any] | None = {"type": "ReLU"},  # noqa: B006
            inplace: bool = True,
            with_spectral_norm: bool = False,
            padding_mode: str = "zeros",
            order: Sequence[str] = ("conv", "norm", "act"),
        ) -> None:
            super().__init__()
            self.conv_cfg, self.norm_cfg, self.act_cfg = conv_cfg, norm_cfg, act_cfg
            self.inplace, self.with_spectral_norm, self.order = inplace, with_spectral_norm, order
            self.with_explicit_padding = padding_mode not in ("zeros", "circular")
            self.with_norm, self.with_activation = norm_cfg is not None, act_cfg is not None
            self.with_bias = not self.with_norm if bias == "auto" else bool(bias)
            if self.with_explicit_padding:
                self.padding_layer = _PADDINGS[padding_mode](padding)  # type: ignore[arg-type]
            self.conv: Any = build_conv_layer(
                conv_cfg,
                in_channels,
                out_channels,
                kernel_size,
                stride=stride,
                padding=0 if self.with_explicit_padding else padding,
                dilation=dilation,
                groups=groups,
                bias=self.with_bias,
            )
            self.in_channels, self.out_channels = self.conv.in_channels, self.conv.out_channels
            self.kernel_size, self.stride = self.conv.kernel_size, self.conv.stride
            self.padding, self.dilation = _pair(padding), self.conv.dilation
            self.transposed, self.output_padding = self.conv.transposed, self.conv.output_padding
            self.groups = self.conv.groups
            if with_spectral_norm:
                self.conv = nn.utils.spectral_norm(self.conv)
            self.norm_name: str | None = None
            if norm_cfg is not None:
                after = order.index("norm") > order.index("conv")
                self.norm_name, norm = build_norm_layer(norm_cfg, out_channels if after else in_channels)
                self.add_module(self.norm_name, norm)
            if act_cfg is not None:
                arguments = dict(act_cfg)
                if arguments["type"] not in _NOT_IN_PLACE:
                    arguments.setdefault("inplace", inplace)
                self.activate = build_activation_layer(arguments)
            self.init_weights()

        @property
        def norm(self) -> Any:
            return getattr(self, self.norm_name) if self.norm_name else None

        def init_weights(self) -> None:
            if not hasattr(self.conv, "init_weights"):
                leaky = self.act_cfg is not None and self.act_cfg["type"] == "LeakyReLU"
                slope = self.act_cfg.get("negative_slope", 0.01) if leaky and self.act_cfg else 0
                kaiming_init(self.conv, a=slope, nonlinearity="leaky_relu" if leaky else "relu")
            if self.with_norm:
                constant_init(self.norm, 1)

        def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
            for layer in self.order:
                if layer == "conv":
                    if self.with_explicit_padding:
                        x = self.padding_layer(x)
                    x = self.conv(x)
                elif layer == "norm" and norm and self.with_norm:
                    x = self.norm(x)
                elif layer == "act" and activate and self.with_activation:
                    x = self.activate(x)
            return x

    return ConvModule


class _Archs(types.ModuleType):
    """``mmagic.models.archs`` without the networks that it would import."""

    def __getattr__(self, name: str) -> Any:
        if name != "SimpleGatedConvModule":
            raise AttributeError(name)
        return vars(importlib.import_module(f"{self.__name__}.gated_conv_module"))[name]


def stand_ins(checkout: Path) -> tuple[Registry, dict[str, types.ModuleType]]:
    """Modules to import the networks of ``checkout`` with, and the registry that their classes will be in.

    The packages of mmagic itself are found in the checkout, but for their ``__init__.py``, which import all of it.
    """
    registry = Registry()
    registry.register_module("Deconv", module=nn.ConvTranspose2d)
    modules: dict[str, types.ModuleType] = {}

    def add(name: str, kind: type[types.ModuleType] = types.ModuleType, **contents: object) -> None:
        module = modules[name] = kind(name)
        vars(module).update(contents)
        parent, _, short = name.rpartition(".")
        if parent:
            setattr(modules[parent], short, module)

    def add_package(name: str, kind: type[types.ModuleType] = types.ModuleType) -> None:
        add(name, kind, __path__=[str(checkout.joinpath(*name.split(".")))])

    add("mmcv", __path__=[])
    add("mmcv.cnn", ConvModule=conv_module(registry), build_activation_layer=build_activation_layer)
    add("mmengine", __path__=[])
    add("mmengine.model", __path__=[], BaseModule=BaseModule)
    add("mmengine.model.weight_init", constant_init=constant_init, normal_init=normal_init)
    add("mmengine.utils", __path__=[])
    add("mmengine.utils.dl_utils", __path__=[])
    add("mmengine.utils.dl_utils.parrots_wrapper", _BatchNorm=_BatchNorm)
    add_package("mmagic")
    add("mmagic.registry", MODELS=registry)
    add_package("mmagic.models")
    add_package("mmagic.models.archs", _Archs)
    add_package("mmagic.models.editors")
    for editor in ("deepfillv1", "deepfillv2", "global_local", "pconv"):
        add_package(f"mmagic.models.editors.{editor}")
    return registry, modules
