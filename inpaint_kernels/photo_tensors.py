"""Photos and masks of every kind as tensors for a network, and what it paints in the caller's kind again.

A kind is a file, a Pillow picture, a NumPy array ``[H, W]`` or ``[H, W, C]``, or a tensor ``[C, H, W]`` or
``[B, C, H, W]``; C is 1 (gray), 2 (gray and alpha), 3 (RGB) or 4 (RGBA).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inpaint_kernels._checks import check_range

_LUMA = (0.299, 0.587, 0.114)

_PICTURE_MODES = ("L", "LA", "RGB", "RGBA", "I;16", "F")
_FULL_SCALE = {torch.uint8: 255, torch.uint16: 65535}
_CHANNELS = (1, 2, 3, 4)


@dataclass(frozen=True)
class PhotoTensor:
    """A photo, and how to give back pictures of its size in the caller's kind.

    Attributes:
        pixels: [B, C, H, W] as they came: uint8, uint16 or floating.
        kind: what makes the caller's kind of such a tensor.
    """

    pixels: Tensor
    kind: Callable[[Tensor], Any]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[2], self.pixels.shape[3]

    @property
    def _colours(self) -> Tensor:
        channels = self.pixels.shape[1]
        return self.pixels[:, : channels - 1] if channels in (2, 4) else self.pixels

    def rgb(self, hole: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[B, 3, H, W] in [0, 1], 0 in the hole.

        Args:
            hole: bool [B or 1, 1, H, W], on the photo's device.
            dtype: of the result.
            device: of the result.

        Raises:
            ValueError: known pixels of a floating photo are NaN or outside [0, 1].
        """
        colours = self._colours
        if colours.is_floating_point():
            outside = ~((colours >= 0) & (colours <= 1)).all(1, keepdim=True) & ~hole
            if outside.any():
                sample, _, row, column = outside.nonzero()[0].tolist()
                raise ValueError(
                    f"image: expected floating values in [0, 1] outside the hole, got {int(outside.sum())} pixels that "
                    f"are not, the first with {colours[sample, :, row, column].tolist()} in row {row}, column {column}"
                )
        scaled = colours.to(device).to(dtype) / _FULL_SCALE.get(colours.dtype, 1)
        return scaled.masked_fill(hole.to(device), 0).expand(-1, 3, -1, -1)

    def picture(self, painted: Tensor) -> Any:
        """What a network painted, [B, 3 or 1, H, W], in the caller's kind; a photo's alpha stays with colours.

        One channel of a map that is no colour (edges, HOG) becomes a gray picture.
        """
        if painted.shape[1] == 1:
            return self.kind(self._as_pixels(painted))
        return self.kind(self._with_alpha(self._as_pixels(self._as_colours(painted))))

    def completed(self, painted: Tensor, hole: Tensor) -> Any:
        """The photo in the caller's kind with the painted colours [B, 3, H, W] in its hole, else bit for bit itself."""
        pixels, colours = self._as_pixels(self._as_colours(painted)), self._colours
        dtype = torch.int32 if colours.dtype == torch.uint16 else colours.dtype  # for which torch has no where
        mixed = torch.where(hole.to(colours.device), pixels.to(dtype), colours.to(dtype))
        return self.kind(self._with_alpha(mixed.to(colours.dtype)))

    def _as_colours(self, rgb: Tensor) -> Tensor:
        if self._colours.shape[1] == 3:
            return rgb
        return luma(rgb)

    def _as_pixels(self, x: Tensor) -> Tensor:
        """Values in [0, 1] in the photo's dtype, on its device."""
        dtype = self.pixels.dtype
        if dtype in _FULL_SCALE:
            x = (x.float().clamp(0, 1) * _FULL_SCALE[dtype]).round()
        return x.to(self.pixels.device).to(dtype)

    def _with_alpha(self, colours: Tensor) -> Tensor:
        alpha = self.pixels[:, self._colours.shape[1] :]
        return torch.cat([colours, alpha], 1) if alpha.shape[1] else colours


def luma(rgb: Tensor) -> Tensor:
    """[..., 3, H, W] RGB -> [..., 1, H, W] gray, ITU-R BT.601 as Pillow's: of three equal colours it is that one."""
    return (rgb * rgb.new_tensor(_LUMA).view(3, 1, 1)).sum(-3, keepdim=True)


# Reading --------------------------------------------------------------------------------------------------------------


def read_image(image: Any) -> PhotoTensor:
    """A photo of any kind.

    Args:
        image: a path; a Pillow picture of mode L, LA, RGB, RGBA, I;16 or F; an array [H, W] or [H, W, C] of uint8,
            uint16 or floating values in [0, 1]; or a tensor [C, H, W] or [B, C, H, W], uint8 or floating.

    Returns:
        The photo; a file's pictures are Pillow's, upright as its EXIF orientation says.

    Raises:
        TypeError, ValueError: anything else; the message names it.
    """
    if isinstance(image, (str, os.PathLike)):
        return _picture_of_file(image)
    if isinstance(image, Tensor):
        return _of_tensor(image)
    if isinstance(image, np.ndarray):
        return PhotoTensor(_tensor_of_array("image", image), _array_like(image))
    if _is_picture(image):
        return _of_picture(image)
    raise TypeError(f"image: expected a path, a Pillow image, a NumPy array or a torch.Tensor, got {_name_of(image)}")


def read_mask(mask: Any, photo: PhotoTensor, threshold: float = 0.5) -> Tensor:
    """A mask of any kind as the holes of a photo.

    Args:
        mask: a path; a Pillow picture; an array [H, W] or [H, W, C]; or a tensor [H, W], [1, H, W] or
            [B or 1, 1, H, W]; bool, uint8, uint16 (arrays) or floating. Of several channels the brightest colour
            counts; where alpha is 0 there is no hole. uint8 of which none is larger than 1 are taken for 0 and 1.
        photo: whose holes they are.
        threshold: share of the full scale, at least 0 and below 1; the hole is where the mask is larger.

    Returns:
        bool [B or 1, 1, H, W] on the photo's device.

    Raises:
        TypeError, ValueError: anything else, another size than the photo's; the message names it.
    """
    check_range("threshold", threshold, minimum=0, maximum=1)
    if threshold == 1:
        raise ValueError("threshold: expected a number below 1, got 1: no mask is larger than its full scale")
    values = _mask_values(mask)
    batch, size = photo.pixels.shape[0], photo.size
    if tuple(values.shape[2:]) != size or values.shape[0] not in (1, batch):
        expected = f"the image's {size[0]} x {size[1]} pixels" + (f" and a batch of 1 or {batch}" if batch > 1 else "")
        got = f"{values.shape[2]} x {values.shape[3]}" + (
            f" in a batch of {values.shape[0]}" if len(values) > 1 else ""
        )
        raise ValueError(f"mask: expected {expected}, got {got}")
    return (_shares(values) > threshold).to(photo.pixels.device)


def _mask_values(mask: Any) -> Tensor:
    """[B or 1, C, H, W] as they came."""
    if isinstance(mask, (str, os.PathLike)):
        from inpaint_kernels import images

        return _tensor_of_array("mask", images.read_photo(mask).pixels)
    if isinstance(mask, np.ndarray):
        return _tensor_of_array("mask", mask)
    if isinstance(mask, Tensor):
        return _mask_of_tensor(mask)
    if _is_picture(mask):
        return _tensor_of_array("mask", np.asarray(mask.convert("RGBA") if mask.mode in ("P", "PA") else mask))
    raise TypeError(f"mask: expected a path, a Pillow image, a NumPy array or a torch.Tensor, got {_name_of(mask)}")


def _mask_of_tensor(mask: Tensor) -> Tensor:
    if not (mask.dtype in (torch.bool, torch.uint8) or mask.is_floating_point()):
        raise TypeError(f"mask: expected bool, uint8 or floating values, got {mask.dtype}")
    views = {2: mask[None, None], 3: mask[:, None], 4: mask} if mask.dim() in (2, 3, 4) else {}
    view = views.get(mask.dim())
    if view is None or view.shape[1] != 1 or (mask.dim() == 3 and mask.shape[0] != 1) or not view.numel():
        raise ValueError(f"mask: expected shape [H, W], [1, H, W] or [B, 1, H, W], got {list(mask.shape)}")
    return view.detach()


def _shares(values: Tensor) -> Tensor:
    """[B, C, H, W] as [B, 1, H, W], shares of the full scale; NaN, which is no hole, stays."""
    if values.dtype == torch.bool:
        shares = values.float()
    else:
        scale = _FULL_SCALE.get(values.dtype, 1)
        shares = values.float()
        shares = shares / (1 if values.dtype == torch.uint8 and shares.max() <= 1 else scale)
    if values.shape[1] in (2, 4):
        return shares[:, :-1].amax(1, keepdim=True) * shares[:, -1:]
    return shares.amax(1, keepdim=True)


def _picture_of_file(path: str | os.PathLike[str]) -> PhotoTensor:
    from inpaint_kernels import images

    pixels = images.read_photo(path).pixels
    if pixels.dtype == np.uint16 and pixels.ndim == 3:
        raise ValueError(
            f"image: {path} has 16 bits per colour, for which Pillow has no pictures; pass the array that "
            "inpaint_kernels.images.read_photo(path).pixels holds"
        )
    return PhotoTensor(_tensor_of_array("image", pixels), _as_picture)


def _of_picture(picture: Any) -> PhotoTensor:
    if picture.mode not in _PICTURE_MODES:
        raise ValueError(
            f"image: expected a Pillow image of mode {', '.join(_PICTURE_MODES)}, got {picture.mode}; convert it first"
        )
    return PhotoTensor(_tensor_of_array("image", np.asarray(picture)), _as_picture)


def _of_tensor(image: Tensor) -> PhotoTensor:
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"image: expected a tensor of uint8 or floating values, got {image.dtype}")
    if image.dim() not in (3, 4) or image.shape[-3] not in _CHANNELS or not image.numel():
        raise ValueError(
            f"image: expected a tensor of shape [C, H, W] or [B, C, H, W] with C from 1 to 4, got {list(image.shape)}"
        )
    image = image.detach()
    if image.dim() == 3:
        return PhotoTensor(image[None], lambda x: x[0])
    return PhotoTensor(image, lambda x: x)


def _tensor_of_array(name: str, array: Any) -> Tensor:
    """[1, C, H, W], sharing no memory with the array."""
    if array.dtype not in (np.bool_, np.uint8, np.uint16) and array.dtype.kind != "f":
        raise TypeError(f"{name}: expected an array of uint8, uint16 or floating values, got {array.dtype}")
    if array.dtype == np.bool_ and name == "image":
        raise TypeError(f"{name}: expected an array of uint8, uint16 or floating values, got {array.dtype}")
    planes = array[:, :, None] if array.ndim == 2 else array
    if planes.ndim != 3 or planes.shape[2] not in _CHANNELS or not planes.size:
        raise ValueError(f"{name}: expected an array of shape [H, W] or [H, W, 1 to 4], got {list(array.shape)}")
    if planes.dtype.kind == "f" and planes.dtype not in (np.float16, np.float32, np.float64):
        planes = planes.astype(np.float64)
    native = planes.astype(planes.dtype.newbyteorder("="))
    return torch.from_numpy(np.ascontiguousarray(native.transpose(2, 0, 1)))[None]


def _array_like(array: Any) -> Callable[[Tensor], Any]:
    """Arrays in the dtype of this one; one channel is [H, W] unless this one is [H, W, 1]."""

    def kind(x: Tensor) -> Any:
        made = np.ascontiguousarray(x[0].permute(1, 2, 0).cpu().numpy()).astype(array.dtype, copy=False)
        return made[:, :, 0] if made.shape[2] == 1 and array.shape[2:] != (1,) else made

    return kind


def _as_picture(x: Tensor) -> Any:
    from PIL import Image

    array = np.ascontiguousarray(x[0].permute(1, 2, 0).cpu().numpy())
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def _is_picture(x: Any) -> bool:
    """Whether it is Pillow's, which is not imported to find that out."""
    return any(base.__module__ == "PIL.Image" and base.__name__ == "Image" for base in type(x).__mro__)


def _name_of(x: Any) -> str:
    return type(x).__name__
