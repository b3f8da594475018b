"""Nodes for ComfyUI: load published weights once, fill the holes of images with them.

Where this library is installed for ComfyUI, a file ``custom_nodes/inpaint_kernels_nodes.py`` with one line
makes two nodes of it::

    from inpaint_kernels.plugins.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

Weights are looked for in ``models/inpaint`` of ComfyUI's folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from inpaint_kernels.pipeline import BLENDS, DETAILS, FITS, inpaint
from inpaint_kernels.pretrained import load_pretrained

_FOLDER = "inpaint"
_MODEL = "INPAINT_KERNELS_MODEL"
_CATEGORY = "inpaint"


def _folder_paths() -> Any:
    """ComfyUI's table of folders; with "inpaint" in it."""
    import folder_paths

    if _FOLDER not in folder_paths.folder_names_and_paths:
        folder_paths.add_model_folder_path(_FOLDER, str(Path(folder_paths.models_dir) / _FOLDER))
    return folder_paths


class LoadModel:
    """A file of weights -> a model."""

    RETURN_TYPES: ClassVar = (_MODEL,)
    RETURN_NAMES: ClassVar = ("model",)
    FUNCTION: ClassVar = "load"
    CATEGORY: ClassVar = _CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """The files in ComfyUI's folder."""
        return {"required": {"weights": (_folder_paths().get_filename_list(_FOLDER),)}}

    def load(self, weights: str) -> tuple[Any]:
        """The model of one of these files."""
        return (load_pretrained(_folder_paths().get_full_path_or_raise(_FOLDER, weights)),)


class Inpaint:
    """Images and masks -> filled images."""

    RETURN_TYPES: ClassVar = ("IMAGE",)
    FUNCTION: ClassVar = "fill"
    CATEGORY: ClassVar = _CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """ComfyUI's kinds of values."""
        return {
            "required": {
                "model": (_MODEL,),
                "image": ("IMAGE",),
                "mask": ("MASK",),
                "fit": (list(FITS), {"default": "pad"}),
                "max_side": ("INT", {"default": 512, "min": 64, "max": 8192, "step": 8}),
                "detail": (list(DETAILS), {"default": "none"}),
                "blend": (list(BLENDS), {"default": "paste"}),
            }
        }

    def fill(
        self, model: Any, image: Tensor, mask: Tensor, fit: str, max_side: int, detail: str, blend: str
    ) -> tuple[Tensor]:
        """Fill.

        Args:
            model: of :class:`LoadModel`; it runs on ComfyUI's device if that is at hand.
            image: [B, H, W, 3 or 4] in [0, 1].
            mask: [B or 1, H, W] in [0, 1], 1 in the hole.
            fit: as of :func:`inpaint_kernels.inpaint`, as the next ones.
            max_side: the same, where ``fit`` takes it.
            detail: the same.
            blend: the same.

        Returns:
            [B, H, W, 3 or 4].
        """
        side = None if fit == "pad" else max_side
        model = model.to(_device(image))
        pixels = image.clamp(0, 1).permute(0, 3, 1, 2)
        holes = mask.reshape(-1, 1, *mask.shape[-2:])
        result = inpaint(model, pixels, holes, fit=fit, max_side=side, detail=detail, blend=blend)
        return (result.completed.permute(0, 2, 3, 1).contiguous(),)


def _device(image: Tensor) -> torch.device:
    try:
        from comfy.model_management import get_torch_device
    except ModuleNotFoundError:
        return image.device
    return torch.device(get_torch_device())


NODE_CLASS_MAPPINGS: dict[str, Any] = {"InpaintKernelsLoadModel": LoadModel, "InpaintKernelsInpaint": Inpaint}
NODE_DISPLAY_NAME_MAPPINGS = {
    "InpaintKernelsLoadModel": "Load inpainting model (inpaint-kernels)",
    "InpaintKernelsInpaint": "Inpaint (inpaint-kernels)",
}
