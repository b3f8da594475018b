"""Fused, exact kernels for image inpainting."""

import importlib
from typing import TYPE_CHECKING, Any

from inpaint_kernels import _native

_native.load()

from inpaint_kernels._backends import explain, use_backend  # noqa: E402
from inpaint_kernels.flow_color import flow_to_color  # noqa: E402
from inpaint_kernels.ops._contextual_attention_presets import PRESETS, ContextualAttentionPreset  # noqa: E402
from inpaint_kernels.ops.coherent_semantic_attention import (  # noqa: E402
    CoherentSemanticAttentionResult,
    coherent_semantic_attention,
)
from inpaint_kernels.ops.contextual_attention import ContextualAttentionResult, contextual_attention  # noqa: E402
from inpaint_kernels.ops.dilated_conv2d import dilated_conv2d  # noqa: E402
from inpaint_kernels.ops.gated_conv2d import gated_conv2d  # noqa: E402
from inpaint_kernels.ops.hog import HogResult, hog  # noqa: E402
from inpaint_kernels.ops.match_patches import PatchMatches, match_patches  # noqa: E402
from inpaint_kernels.ops.partial_conv2d import PartialConv2dResult, partial_conv2d  # noqa: E402
from inpaint_kernels.ops.patch_vote import patch_vote  # noqa: E402
from inpaint_kernels.ops.patchmatch import patchmatch  # noqa: E402

if TYPE_CHECKING:
    from inpaint_kernels.acceleration import AccelerationReport, ModuleReport, accelerate, accelerated
    from inpaint_kernels.memory_plan import estimate_memory
    from inpaint_kernels.pipeline import inpaint
    from inpaint_kernels.pretrained import CheckpointError, LicenceNotice, convert_checkpoint, load_pretrained

__all__ = [
    "PRESETS",
    "AccelerationReport",
    "CheckpointError",
    "CoherentSemanticAttentionResult",
    "ContextualAttentionPreset",
    "ContextualAttentionResult",
    "HogResult",
    "LicenceNotice",
    "ModuleReport",
    "PartialConv2dResult",
    "PatchMatches",
    "accelerate",
    "accelerated",
    "coherent_semantic_attention",
    "contextual_attention",
    "convert_checkpoint",
    "dilated_conv2d",
    "estimate_memory",
    "explain",
    "flow_to_color",
    "gated_conv2d",
    "hog",
    "inpaint",
    "load_pretrained",
    "match_patches",
    "partial_conv2d",
    "patch_vote",
    "patchmatch",
    "use_backend",
]


# Imported when they are asked for: the recipes take a quarter of the time of an import, the models import this package.
_LAZY = {
    **dict.fromkeys(("AccelerationReport", "ModuleReport", "accelerate", "accelerated"), "acceleration"),
    "estimate_memory": "memory_plan",
    "inpaint": "pipeline",
    **dict.fromkeys(("CheckpointError", "LicenceNotice", "convert_checkpoint", "load_pretrained"), "pretrained"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
