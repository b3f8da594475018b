"""Attention layers of public repositories, run beside ours from checkouts that the user made.

None of their code is part of this project. ``git clone`` what you want to compare with into one folder, each checkout
named ``owner+name`` or ``name``, and pass the folder as ``--peers DIR`` or ``INPAINT_PEERS``; ports that are not there
are left out.

An adapter does only what running the unmodified layer here requires: import the one file that holds it, put empty
stand-ins in place of packages that the layer itself never uses (torchvision, detectron2, ...), turn learned layers
around the attention into the identity, keep hard-coded ``.cuda()`` on the inputs' device, and let float32 constants
such as ``torch.eye`` follow the inputs' dtype.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

Attention = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(f, b, mask) -> y; ``f`` looks for partners in ``b``, which also supplies the pasted pixels."""


@dataclass(frozen=True)
class Port:
    """One public implementation.

    Attributes:
        name: short name; also the preset of ``inpaint_kernels.contextual_attention`` that reproduces it, unless
            ``preset`` is set.
        repository: ``owner/name`` on GitHub.
        build: (checkout, fuse) -> the layer.
        mask_scale: resolution of the mask it takes, in mask pixels per pixel of b; 0: it takes none.
        preset: see ``name``.
        value_scale: sides of b in sides of f, where they differ by design.
        has_fuse, has_fuse_switch: whether it has the fuse at all, and whether ``fuse=False`` can be built.
        square_fuse_only: its fuse is wrong on maps that are not square.
        same_size_only, same_size_with_fuse_only: f and b must have the same size (always / with the fuse on).
        even_only: sides must be even.
        unreliable_sizes: feature maps that it samples by rounding noise.
    """

    name: str
    repository: str
    build: Callable[[Path, bool], Attention]
    mask_scale: int = 1
    preset: str = ""
    value_scale: int = 1
    has_fuse: bool = True
    has_fuse_switch: bool = True
    square_fuse_only: bool = False
    same_size_only: bool = False
    same_size_with_fuse_only: bool = False
    even_only: bool = True
    unreliable_sizes: tuple[tuple[int, int], ...] = ()

    def checkout(self, folder: Path) -> Path | None:
        """Where its checkout lies in ``folder``, or None."""
        return find_checkout(self.repository, folder)


def folder_in_environment() -> Path | None:
    """What ``INPAINT_PEERS`` names."""
    folder = os.environ.get("INPAINT_PEERS")
    return Path(folder) if folder else None


def find_checkout(repository: str, folder: Path | None) -> Path | None:
    """Where the checkout of ``repository`` (``owner/name``) lies in ``folder``, or None; none without a folder."""
    if folder is None:
        return None
    owner, name = repository.split("/")
    return next((path for path in (folder / f"{owner}+{name}", folder / name) if path.is_dir()), None)


# Importing one file of a foreign repository --------------------------------------------------------------------------


class _StandIn(types.ModuleType):
    """A package that is imported and never used: every attribute is ``nn.Module``, so that it can be subclassed."""

    def __getattr__(self, name: str) -> type[nn.Module]:
        if name.startswith("__"):
            raise AttributeError(name)
        return nn.Module


class _StandInFinder(MetaPathFinder, Loader):
    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = packages

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] in self._packages else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _is_plain_folder(path: Path) -> bool:
    """Whether Python would prefer a package of the same name, ours for example, wherever it is on the path."""
    return path.is_dir() and path.name.isidentifier() and not (path / "__init__.py").exists()


def _package(folder: Path) -> types.ModuleType:
    package = types.ModuleType(folder.name)
    package.__path__ = [str(folder)]
    return package


@contextmanager
def _foreign_imports(
    paths: Sequence[Path], stand_ins: Sequence[str], provided: Mapping[str, types.ModuleType] | None = None
) -> Iterator[None]:
    """Let a checkout's own top-level names (``utils``, ``models``, ...) win, and forget them afterwards."""
    provided = provided or {}
    foreign = {entry.stem for path in paths for entry in path.iterdir()} | set(stand_ins)
    foreign |= {name.split(".")[0] for name in provided}

    def take_foreign() -> dict[str, types.ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in foreign}

    ours = take_foreign()
    for path in reversed(paths):
        sys.modules.update({entry.name: _package(entry) for entry in path.iterdir() if _is_plain_folder(entry)})
    sys.modules.update(provided)
    finder = _StandInFinder(stand_ins)
    sys.meta_path.insert(0, finder)
    sys.path[:0] = [str(path) for path in paths]
    try:
        yield
    finally:
        del sys.path[: len(paths)]
        sys.meta_path.remove(finder)
        take_foreign()
        sys.modules.update(ours)


def import_file(
    checkout: Path, file: str, *, stand_ins: Sequence[str] = (), import_roots: Sequence[str] = (".",)
) -> types.ModuleType:
    """Execute ``checkout/file`` as a module of its own, with ``import_roots`` (relative to it) on the path."""
    spec = importlib.util.spec_from_file_location(f"_peer_{checkout.name}_{Path(file).stem}", checkout / file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {checkout / file}")
    module = importlib.util.module_from_spec(spec)
    with _foreign_imports([checkout / root for root in import_roots], stand_ins):
        spec.loader.exec_module(module)
    return module


def import_module(
    checkout: Path,
    name: str,
    *,
    stand_ins: Sequence[str] = (),
    provided: Mapping[str, types.ModuleType] | None = None,
    import_root: str = ".",
    also: Sequence[str] = (),
) -> types.ModuleType:
    """Import the module ``name`` of a checkout, for files with relative imports.

    ``provided``: modules that it will find; ``also``: further modules to import with it.
    """
    with _foreign_imports([checkout / import_root], stand_ins, provided):
        module = importlib.import_module(name)
        for other in also:
            importlib.import_module(other)
        return module


@contextmanager
def as_written_for(x: Tensor) -> Iterator[None]:
    """Constants that the port creates get the dtype and the device of ``x``."""

    def to_device_of_x(constant: Tensor, *_: object) -> Tensor:
        return constant.to(x.device)

    before = torch.get_default_dtype()
    torch.set_default_dtype(x.dtype)
    try:
        on_device = torch.device(x.device) if x.is_cuda else nullcontext()
        with on_device, mock.patch.object(Tensor, "cuda", to_device_of_x), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # their deprecated calls are not ours to fix
            yield
    finally:
        torch.set_default_dtype(before)


def make_constants_on(device: str, network: nn.Module) -> None:
    """Tells daa233's modules where to make their constants, as its configuration does."""
    for module in network.modules():
        if "use_cuda" in vars(module):
            vars(module)["use_cuda"] = device != "cpu"


def _adapt(layer: nn.Module, call: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Attention:
    def attention(f: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
        layer.to(device=f.device, dtype=f.dtype)
        with as_written_for(f):
            return call(f, b, None if mask is None else mask.to(f.dtype))

    return attention


def _no_hole(b: Tensor) -> Tensor:
    return b.new_zeros(b.shape[0], 1, *b.shape[2:])


# The ports -----------------------------------------------------------------------------------------------------------


def _daa233(checkout: Path, fuse: bool) -> Attention:
    module = import_file(checkout, "model/networks.py", stand_ins=("torchvision", "yaml"))
    layer = module.ContextualAttention(ksize=3, stride=1, rate=2, fuse_k=3, softmax_scale=10, fuse=fuse, use_cuda=False)

    def call(f: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
        layer.use_cuda = f.is_cuda
        return layer(f, b, mask)[0]

    return _adapt(layer, call)


def _csqiangwen(checkout: Path, fuse: bool) -> Attention:
    module = import_file(checkout, "network_module.py", stand_ins=("torchvision", "cv2", "network"))
    layer = module.ContextualAttention(ksize=3, stride=1, rate=2, fuse_k=3, softmax_scale=10, fuse=fuse, use_cuda=False)

    def call(f: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
        layer.use_cuda = f.is_cuda
        return layer(f, b, _no_hole(b) if mask is None else mask)

    return _adapt(layer, call)


def _nipponjo(checkout: Path, fuse: bool) -> Attention:
    layer = import_file(checkout, "model/networks.py").ContextualAttention(rate=2, fuse=fuse)
    return _adapt(layer, lambda f, b, mask: layer(f, b, mask)[0])


def _nipponjo_tf(checkout: Path, fuse: bool) -> Attention:
    layer = import_file(checkout, "model/networks_tf.py").ContextualAttention(rate=2, fuse=fuse)
    return _adapt(layer, lambda f, b, mask: layer(f, b, mask)[0])


def _mmagic(checkout: Path, fuse: bool) -> Attention:
    module = import_file(
        checkout, "mmagic/models/editors/deepfillv1/contextual_attention.py", stand_ins=("mmengine",), import_roots=()
    )
    layer = module.ContextualAttentionModule(fuse_kernel_size=3 if fuse else 1, return_attention_score=False)
    return _adapt(layer, layer)


def _selflein(checkout: Path, fuse: bool) -> Attention:
    module = import_file(checkout, "iminpaint/model_parts/encoder_decoder.py")
    layer = module.ContextualAttention(use_attention_propagation=fuse)
    return _adapt(layer, lambda f, b, mask: layer(f, b, _no_hole(b) if mask is None else mask))


def _yangyu12(checkout: Path, fuse: bool) -> Attention:
    if not fuse:
        raise ValueError("fuse: yangyu12 has no switch for it")
    module = import_file(checkout, "deepfill/layers.py", stand_ins=("detectron2",))
    vars(module)["cat"] = torch.cat  # detectron2's own differs for lists of one tensor only
    layer = module.ContextAttention(kernel_size=3, stride=2, fuse_size=3)
    return _adapt(layer, lambda f, b, mask: layer(f, b, _no_hole(b) if mask is None else mask)[0])


def _fgvc(checkout: Path, fuse: bool) -> Attention:
    layer = import_file(checkout, "models/DeepFill_Models/ops.py").Contextual_Attention_Module(1, 1)
    layer.out = nn.Identity()
    return _adapt(layer, lambda f, b, mask: layer(f, b, _no_hole(b) if mask is None else mask, fuse=fuse)[0])


def _pennet(checkout: Path, fuse: bool) -> Attention:
    """f: the deep map (queries and keys), b: the map twice as large (values), mask: any size."""
    layer = import_file(checkout, "model/pennet.py", stand_ins=("torchvision",)).AtnConv(rate=2, fuse=False)
    return _adapt(layer, lambda f, b, mask: layer(b, f, _no_hole(f) if mask is None else mask))


def _ctsdg(checkout: Path, fuse: bool) -> Attention:
    """f: the foreground (queries and keys), b: the background (values), both at full size; no mask."""
    layer = import_file(checkout, "models/generator/cfa.py").RAL()
    return _adapt(layer, lambda f, b, mask: layer(b, f))


def _csnln(checkout: Path, fuse: bool) -> Attention:
    """f: queries and values; keys are f at half the size (bilinear); no mask. The embeddings become the identity."""
    roots = ("src", "src/model")
    module = import_file(checkout, "src/model/attention.py", stand_ins=("torchvision",), import_roots=roots)
    layer = module.CrossScaleAttention(channel=2, scale=2)
    layer.conv_match_1 = layer.conv_match_2 = layer.conv_assembly = nn.Identity()
    return _adapt(layer, lambda f, b, mask: layer(f))


PORTS = (
    Port("daa233", "daa233/generative-inpainting-pytorch", _daa233, mask_scale=4),
    Port("csqiangwen", "csqiangwen/DeepFillv2_Pytorch", _csqiangwen),
    Port("nipponjo", "nipponjo/deepfillv2-pytorch", _nipponjo, mask_scale=4),
    Port("nipponjo_tf", "nipponjo/deepfillv2-pytorch", _nipponjo_tf, mask_scale=4),
    Port("mmagic", "open-mmlab/mmagic", _mmagic, even_only=False, same_size_with_fuse_only=True),
    Port("selflein", "selflein/DeepFill-v2", _selflein, square_fuse_only=True),
    Port(
        "yangyu12",
        "yangyu12/deepfill_v2.pytorch",
        _yangyu12,
        has_fuse_switch=False,
        same_size_only=True,
        even_only=False,
    ),
    Port(
        "fgvc",
        "vt-vl-lab/FGVC",
        _fgvc,
        preset="nipponjo",
        same_size_only=True,
        unreliable_sizes=((24, 40), (20, 12)),
    ),
    Port(
        "pennet",
        "researchmm/PEN-Net-for-Inpainting",
        _pennet,
        mask_scale=4,
        value_scale=2,
        has_fuse=False,
        same_size_only=True,
        even_only=False,
    ),
    Port("ctsdg", "xiefan-guo/ctsdg", _ctsdg, mask_scale=0, has_fuse=False, same_size_only=True),
    Port(
        "csnln",
        "SHI-Labs/Cross-Scale-Non-Local-Attention",
        _csnln,
        mask_scale=0,
        has_fuse=False,
        same_size_only=True,
    ),
)


def available_ports(folder: Path | None) -> dict[str, Port]:
    """The ports whose checkout lies in ``folder``; none without a folder."""
    if folder is None:
        return {}
    if not folder.is_dir():
        raise ValueError(f"peers: expected a folder with checkouts, {folder} is not a folder")
    return {port.name: port for port in PORTS if port.checkout(folder) is not None}


def load_port(port: Port, folder: Path, *, fuse: bool = True) -> Attention:
    """Build ``port`` from its checkout in ``folder``."""
    checkout = port.checkout(folder)
    if checkout is None:
        raise FileNotFoundError(f"{port.repository}: no checkout in {folder}")
    return port.build(checkout, fuse)


# The published layer of coherent semantic attention ------------------------------------------------------------------

CSA_REPOSITORY = "KumapowerLIU/CSA-inpainting"


class _NoCuda:
    """In place of ``torch.cuda.is_available``, which the layer tests without calling it."""

    def __bool__(self) -> bool:
        return False

    def __call__(self) -> bool:
        return False


@contextmanager
def csa_as_written_for(x: Tensor) -> Iterator[None]:
    """:func:`as_written_for` and the tensor types that the code of :data:`CSA_REPOSITORY` takes on a CPU."""
    kind = torch.DoubleTensor if x.dtype == torch.float64 else torch.FloatTensor
    with (
        as_written_for(x),
        mock.patch.object(torch, "FloatTensor", kind),
        mock.patch.object(torch.cuda, "is_available", _NoCuda()),
        torch.random.fork_rng(devices=()),  # the layer initialises a convolution per position
    ):
        yield


class PublishedCSA:
    """The layer ``CSA_model`` on the CPU, for one mask; its flags are given, or made by its own ``set_mask``.

    Its gradient reads the attention rows of maps that are not square in the wrong order; it is right on square ones.
    """

    def __init__(self, folder: Path) -> None:
        checkout = csa_checkout(folder)
        if checkout is None:
            raise FileNotFoundError(f"{CSA_REPOSITORY}: no checkout in {folder}")
        module = import_module(checkout, "models.CSA_model")
        self._layer = module.CSA_model(threshold=5 / 16, fixed_mask=1)

    def set_mask(self, mask: Tensor, layers: int, threshold: float) -> Tensor:
        """Flags [h, w] of an image's mask [1, 1, H, W]."""
        flags: Tensor = self._layer.set_mask(mask, layers, threshold)
        return flags

    def set_flags(self, flags: Tensor) -> None:
        """What the next calls take for masked, bool [h, w]."""
        self._layer.mask, self._layer.cal_fixed_flag = flags.byte(), True
        self._layer.sp_x = self._layer.sp_y = None

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        with torch.no_grad(), csa_as_written_for(x):
            output: Tensor = self._layer(x)
        return output

    def forward_backward(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Its output, and its gradient of x where ``grad`` is that of the output."""
        leaf = x.detach().requires_grad_()
        with csa_as_written_for(x):
            output = self._layer(leaf)
            (gradient,) = torch.autograd.grad(output, leaf, grad)
        return output.detach(), gradient


def csa_checkout(folder: Path | None) -> Path | None:
    """Where the checkout of :data:`CSA_REPOSITORY` lies in ``folder``, or None."""
    return find_checkout(CSA_REPOSITORY, folder)
