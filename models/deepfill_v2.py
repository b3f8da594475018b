"""DeepFill v2: gated convolutions, contextual attention, free-form masks; perhaps guided by a sketch.

Yu, Lin, Yang, Shen, Lu, Huang, Free-Form Image Inpainting with Gated Convolution, ICCV 2019. The layers are those of
the table in :mod:`._deepfill`, each with a gate, ELU on the features, no norm; 4,052,478 parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

import torch
from inpaint_kernels.models._deepfill import DeepFill, Dialect
from inpaint_kernels.models._interface import named
from inpaint_kernels.models._layers import Convolution
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

DIALECTS: Final[Mapping[str, Dialect]] = {
    "official": Dialect(border="same_tf", attention="official", width=24, squash="tanh", indicators=False),
    "nipponjo_tf": Dialect(
        border="same_tf", attention="nipponjo_tf", width=24, squash="tanh", indicators=False, fuse=0
    ),
    "nipponjo": Dialect(border="zeros", attention="nipponjo", width=24, squash="tanh", indicators=False),
    "mmagic": Dialect(
        border="reflect",
        attention="mmagic",
        width=24,
        squash="tanh",
        painter_width=32,
        gated_last=True,
        matched_activation="elu",
    ),
    "csqiangwen": Dialect(
        border="zeros",
        attention="csqiangwen",
        width=48,
        squash="tanh",
        ones=False,
        gated_last=True,
        signed=False,
    ),
}
"""JiahuiYu/generative_inpainting v2.0.0 (TensorFlow); nipponjo/deepfillv2-pytorch, networks_tf.py (converted weights,
published without fuse) and networks.py; open-mmlab/mmagic; csqiangwen/DeepFillv2_Pytorch."""


class DeepFillV2(DeepFill):
    """The generator, under the flat names of the TensorFlow graph that nipponjo's converted checkpoints have.

    Args:
        dialect: a name in :data:`DIALECTS`, or an own one.
        guided: whether a ``sketch`` guides it, as one more input channel of the first stage.

    Deviation from the sources: in a batch the attention uses each sample's own mask; all but mmagic use the first.

    Example:
        >>> model = DeepFillV2().eval()
        >>> mask = torch.zeros(1, 1, 64, 64)
        >>> mask[..., 16:40, 24:48] = 1
        >>> model(torch.rand(1, 3, 64, 64), mask, region="hole").completed.shape
        torch.Size([1, 3, 64, 64])
    """

    gated: ClassVar[bool] = True

    def __init__(self, dialect: str | Dialect = "nipponjo", guided: bool = False) -> None:
        super().__init__(named(dialect, DIALECTS), guided)

    def add_layer(self, name: str, layer: Convolution) -> None:
        """Register a layer of the table; an enlarging one stands one level deeper in the checkpoints."""
        if layer.upsample > 1:
            nest = nn.Module()
            nest.add_module("conv", layer)
            self.add_module(name, nest)
        else:
            self.add_module(name, layer)

    def layer(self, name: str) -> Any:
        """The layer of the table of that name."""
        return self.get_submodule(f"{name}.conv" if name.endswith("_upsample") else name)


class SNPatchGAN(nn.Sequential):
    """The discriminator of section 3.3: spectral norms, and one hinge term for every element of its last map.

    Args:
        guided: whether it also sees the sketch.
        border: of the convolutions, "zeros" or "same_tf".

    Shapes: image and mask (and sketch) [B, 4 or 5, H, W], the image in [-1, 1] -> [B, 256 * H / 64 * W / 64].

    Deviation from nipponjo's port: the norm divides a copy of the weight, not the weight itself.
    """

    def __init__(self, guided: bool = False, border: str = "zeros") -> None:
        super().__init__()
        self.guided, self.border = guided, border
        widths = (4 + guided, 64, 128, 256, 256, 256, 256)
        for number in range(1, len(widths)):
            layer = Convolution(
                widths[number - 1], widths[number], kernel=5, stride=2, activation="leaky_relu", border=border
            )
            spectral_norm(layer.conv)
            self.add_module(f"conv{number}", layer)

    def forward(self, x: Tensor) -> Tensor:
        """The score of every patch."""
        return super().forward(x).flatten(1)

    def __reduce__(self) -> tuple[Any, ...]:
        # torch pickles no parametrized layer: a copy is built anew and takes over the state.
        return _rebuilt, (self.guided, self.border, self.state_dict(), self.training)


def _rebuilt(guided: bool, border: str, state: dict[str, Tensor], training: bool) -> SNPatchGAN:
    with torch.device("meta"):
        network = SNPatchGAN(guided, border)
    network.load_state_dict(state, assign=True)
    return network.train(training)
