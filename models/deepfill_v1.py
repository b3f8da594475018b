"""DeepFill v1: painting from coarse to fine, with contextual attention.

Yu, Lin, Yang, Shen, Lu, Huang, Generative Image Inpainting with Contextual Attention, CVPR 2018. The layers are those
of the table in :mod:`._deepfill`: plain convolutions with ELU, no norm; 3,601,542 parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from inpaint_kernels.models._deepfill import DeepFill, Dialect
from inpaint_kernels.models._interface import named
from inpaint_kernels.models._layers import Convolution
from torch import Tensor, nn

DIALECTS: Final[Mapping[str, Dialect]] = {
    "official": Dialect(border="same_tf", attention="official", width=32, squash="clip"),
    "daa233": Dialect(border="zeros", attention="daa233", width=32, squash="clip"),
    "nbei": Dialect(border="same_tf", attention="nipponjo", width=32, squash="clip"),
    "mmagic": Dialect(border="reflect", attention="mmagic", width=32, squash="clip", matched_activation="elu"),
}
"""JiahuiYu/generative_inpainting v1.0.0 (TensorFlow), daa233/generative-inpainting-pytorch, nbei
(Deep-Flow-Guided-Video-Inpainting, also in FGVC), open-mmlab/mmagic.

Deviation from nbei: its attention samples every second pixel at coordinates half-way between two, so that rounding in
float32 decides which one is taken; ours takes what it does for sizes that are powers of two.
"""


class DeepFillV1(DeepFill):
    """The generator, under the names of daa233's checkpoints: ``coarse_generator.*``, ``fine_generator.*``.

    Args:
        dialect: a name in :data:`DIALECTS`, or an own one.

    Deviation from the sources: in a batch the attention uses each sample's own mask; all but mmagic use the first.

    Example:
        >>> model = DeepFillV1().eval()
        >>> mask = torch.zeros(1, 1, 64, 64)
        >>> mask[..., 16:40, 24:48] = 1
        >>> model(torch.rand(1, 3, 64, 64), mask).completed.shape
        torch.Size([1, 3, 64, 64])
    """

    gated: ClassVar[bool] = False

    def __init__(self, dialect: str | Dialect = "daa233") -> None:
        super().__init__(named(dialect, DIALECTS))

    def add_layer(self, name: str, layer: Convolution) -> None:
        """Register a layer of the table under daa233's name."""
        stage, own = _published_name(name)
        if stage not in self._modules:
            self.add_module(stage, nn.Module())
        self.get_submodule(stage).add_module(own, layer)

    def layer(self, name: str) -> Any:
        """The layer of the table of that name."""
        return self.get_submodule(".".join(_published_name(name)))


def _published_name(name: str) -> tuple[str, str]:
    """The stage and the name in it: fine_generator, conv13 for xconv13_upsample."""
    stage = "coarse_generator" if name.startswith("conv") else "fine_generator"
    return stage, name.removeprefix("x").removesuffix("_upsample")


class Discriminator(nn.Module):
    """One of the two critics of the Wasserstein loss, under daa233's names; section 3.2 and 4.2.

    Args:
        size: side of the square images it judges: 256 for the global, 128 for the local one.
        last_width: channels of the fourth convolution; the official local critic has 512.
        border: of the convolutions, see :class:`._layers.Convolution`.

    Shapes: [B, 3, size, size] in [-1, 1] -> [B, 1].
    """

    def __init__(self, size: int = 256, last_width: int = 256, border: str = "zeros") -> None:
        super().__init__()
        widths = (3, 64, 128, 256, last_width)
        self.dis_conv_module = nn.Sequential()
        for number in range(1, len(widths)):
            layer = Convolution(
                widths[number - 1], widths[number], kernel=5, stride=2, activation="leaky_relu", border=border
            )
            self.dis_conv_module.add_module(f"conv{number}", layer)
        self.linear = nn.Linear(last_width * (size // 16) ** 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        """The critic's value of each image."""
        value: Tensor = self.linear(self.dis_conv_module(image).flatten(1))
        return value
