"""EdgeConnect (Nazeri et al., 2019): one network draws the edges of the hole, a second one paints along them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from inpaint_kernels.models._boxes import Box
from inpaint_kernels.models._interface import InpaintingModel, InpaintResult, check_guidance, complete
from inpaint_kernels.models._networks import fastest_layout, init_normal
from inpaint_kernels.models._norms import instance_norm
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook

from inpaint_kernels._checks import check_range
from inpaint_kernels.nn import DilatedConv2d

_LUMINANCE = (0.2125, 0.7154, 0.0721)  # scikit-image's rgb2gray

# Networks ------------------------------------------------------------------------------------------------------------


class _Generator(nn.Module):
    """The generator of both stages; keys are the published ones.

    ================  =======  ======  ========  ==================
    layer             kernel   stride  dilation  channels
    ================  =======  ======  ========  ==================
    encoder.1         7        1       1         in -> 64
    encoder.4, .7     4        2       1         64 -> 128 -> 256
    middle.0 to .7    3, 3     1       2, 1      256, residual
    decoder.0, .3     4        1/2     1         256 -> 128 -> 64
    decoder.7         7        1       1         64 -> out
    ================  =======  ======  ========  ==================

    Each but the last is followed by an instance norm without weights and, except at the end of a residual block, a
    ReLU. Convolutions of stride 1 reflect their border. With a spectral norm, on all convolutions but the last, the
    residual blocks have no biases.
    """

    def __init__(self, in_channels: int, out_channels: int, residual_blocks: int, use_spectral_norm: bool) -> None:
        super().__init__()
        norm = _spectral_norm if use_spectral_norm else _unchanged
        self.encoder = nn.ModuleDict(
            {
                "1": norm(_reflecting(in_channels, 64, 7)),
                "4": norm(nn.Conv2d(64, 128, 4, stride=2, padding=1)),
                "7": norm(nn.Conv2d(128, 256, 4, stride=2, padding=1)),
            }
        )
        self.middle = nn.Sequential(*(_ResidualBlock(256, use_spectral_norm) for _ in range(residual_blocks)))
        self.decoder = nn.ModuleDict(
            {
                "0": norm(nn.ConvTranspose2d(256, 128, 4, stride=2, padding=1)),
                "3": norm(nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1)),
                "7": _reflecting(64, out_channels, 7),
            }
        )
        self.apply(init_normal)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W], H and W multiples of 4 from 12 on -> [B, out_channels, H, W] without activation."""
        x = fastest_layout(x)
        for conv in self.encoder.values():
            x = instance_norm(conv(x), activation="relu")
        x = self.middle(x)
        *upsampling, last = self.decoder.values()
        for conv in upsampling:
            x = instance_norm(conv(x), activation="relu")
        return last(x).contiguous()


class EdgeGenerator(_Generator):
    """The first stage's network: ``[gray, known edges, hole]`` -> edges. 10,761,089 parameters.

    Args:
        residual_blocks: 8 in all published weights.
        use_spectral_norm: whether weights are divided by their spectral norm (``weight_orig``, ``weight_u``,
            ``weight_v`` in the state dict, as of :func:`torch.nn.utils.spectral_norm`), and the blocks lack biases. See
            :func:`fold_spectral_norm`.
        in_channels: 3 in all published weights.

    References:
        Nazeri et al., EdgeConnect: Generative Image Inpainting with Adversarial Edge Learning, arXiv 1901.00212,
        2019, section 3.1. Published code: knazeri/edge-connect, ``EdgeGenerator``.
    """

    def __init__(self, residual_blocks: int = 8, use_spectral_norm: bool = True, *, in_channels: int = 3) -> None:
        super().__init__(in_channels, 1, residual_blocks, use_spectral_norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W], gray 1 and edges 0 in the hole -> [B, 1, H, W] in [0, 1]; H and W multiples of 4 from 12 on."""
        return super().forward(x).sigmoid()


class InpaintGenerator(_Generator):
    """The second stage's network: ``[rgb, edges]`` -> image. 10,774,595 parameters; it is not told the hole.

    Args:
        residual_blocks: 8 in all published weights.

    References:
        As of :class:`EdgeGenerator`, section 3.2. Published code: knazeri/edge-connect, ``InpaintGenerator``.
    """

    def __init__(self, residual_blocks: int = 8) -> None:
        super().__init__(4, 3, residual_blocks, use_spectral_norm=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4, H, W] in [0, 1], rgb 1 in the hole -> [B, 3, H, W] in [0, 1]; H and W multiples of 4 from 12 on."""
        return (super().forward(x).tanh() + 1) / 2


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, use_spectral_norm: bool) -> None:
        super().__init__()
        norm = _spectral_norm if use_spectral_norm else _unchanged
        self.conv_block = nn.ModuleDict(
            {
                "1": norm(_reflecting(channels, channels, 3, dilation=2, bias=not use_spectral_norm)),
                "5": norm(_reflecting(channels, channels, 3, bias=not use_spectral_norm)),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same; no ReLU after the sum."""
        y = instance_norm(self.conv_block["1"](x), activation="relu")
        return instance_norm(self.conv_block["5"](y), residual=x)


class Discriminator(nn.Module):
    """The patch discriminator of both stages; each score sees 70 x 70 pixels.

    Five convolutions of 4 x 4, stride 2, 2, 2, 1, 1, to 64, 128, 256, 512 and 1 channels, a leaky ReLU of slope 0.2
    between them. 2,762,752 parameters with 2 input channels, 2,763,776 with 3.

    Args:
        in_channels: 2 for ``[gray, edges]``, 3 for an image.
        use_sigmoid: whether scores are probabilities; False for the hinge loss.
        use_spectral_norm: as of :class:`EdgeGenerator`; the convolutions then have no bias.

    References:
        As of :class:`EdgeGenerator`. Published code: knazeri/edge-connect, ``Discriminator``.
    """

    def __init__(self, in_channels: int, use_sigmoid: bool = True, use_spectral_norm: bool = True) -> None:
        super().__init__()
        self.use_sigmoid = use_sigmoid
        norm = _spectral_norm if use_spectral_norm else _unchanged

        def layer(inputs: int, outputs: int, stride: int, activation: str = "leaky_relu") -> nn.Sequential:
            bias = not use_spectral_norm
            return nn.Sequential(norm(DilatedConv2d(inputs, outputs, 4, stride, 1, bias=bias, activation=activation)))

        self.conv1 = self.features = layer(in_channels, 64, 2)  # published under both names
        self.conv2 = layer(64, 128, 2)
        self.conv3 = layer(128, 256, 2)
        self.conv4 = layer(256, 512, 1)
        self.conv5 = layer(512, 1, 1, "none")
        self.apply(init_normal)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Scores [B, 1, H / 8 - 2, W / 8 - 2] of x [B, in_channels, H, W], and what each layer gave.

        The last of the five maps are the scores without sigmoid; the loss of feature matching takes all five.
        """
        maps = []
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5):
            x = layer(x)
            maps.append(x)
        return (x.sigmoid() if self.use_sigmoid else x), maps


def _reflecting(
    in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1, bias: bool = True
) -> DilatedConv2d:
    padding = dilation * (kernel_size // 2)
    return DilatedConv2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=padding,
        dilation=dilation,
        bias=bias,
        activation="none",
        padding_mode="reflect",
    )


# Spectral norm -------------------------------------------------------------------------------------------------------


def fold_spectral_norm(network: nn.Module) -> nn.Module:
    """Make the weights of a network with spectral norms plain ones, in place.

    Outputs in evaluation mode stay the same, bit for bit; the division of every weight in every call is saved. Such a
    network cannot be trained on as before.

    Args:
        network: a network, or a system of them; layers without spectral norm stay as they are.

    Returns:
        The network.
    """
    for layer in network.modules():
        if _has_spectral_norm(layer):
            nn.utils.remove_spectral_norm(layer)
            _drop_hook_of_loading(layer)
    return network


def _drop_hook_of_loading(layer: nn.Module) -> None:
    """Plain weights do not load through the hook that torch forgets, which it wraps and then does not recognise."""
    hooks = layer._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook):
            del hooks[key]


def _spectral_norm(layer: nn.Module) -> nn.Module:
    nn.utils.spectral_norm(layer)
    layer.register_forward_hook(_detach_weight)
    return layer


def _detach_weight(layer: Any, *_: object) -> None:
    """Drops the weight's graph, with which the layer could be neither copied nor pickled between two steps."""
    if _has_spectral_norm(layer):
        layer.weight = layer.weight.detach()


def _has_spectral_norm(layer: nn.Module) -> bool:
    return "weight_orig" in layer._parameters


def _unchanged(layer: nn.Module) -> nn.Module:
    return layer


# The system ----------------------------------------------------------------------------------------------------------


class EdgeConnect(InpaintingModel):
    """EdgeConnect: edges of the hole first, then the image. ``model(image, mask)``, see :meth:`paint`.

    The two generators load the published files ``EdgeModel_gen.pth`` and ``InpaintingModel_gen.pth`` (entry
    "generator") unchanged. Edges of what is known are Canny's, through scikit-image.

    Args:
        residual_blocks: 8 in all published weights.

    Attributes:
        edge_generator: :class:`EdgeGenerator`.
        inpaint_generator: :class:`InpaintGenerator`.

    References:
        Nazeri et al., EdgeConnect: Generative Image Inpainting with Adversarial Edge Learning, arXiv 1901.00212, 2019.
        Published code: knazeri/edge-connect, ``EdgeConnect.test``.

    Example:
        >>> model = EdgeConnect().eval()
        >>> image, mask = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
        >>> mask[..., 16:48, 16:48] = 1
        >>> with torch.no_grad():
        ...     result = model(image, mask, canny_edges=torch.zeros(1, 1, 64, 64))
        >>> result.completed.shape, result.edges.shape
        (torch.Size([1, 3, 64, 64]), torch.Size([1, 1, 64, 64]))
    """

    size_multiple: ClassVar[int] = 4
    least_size: int = 12

    def __init__(self, residual_blocks: int = 8) -> None:
        super().__init__()
        self.edge_generator = EdgeGenerator(residual_blocks)
        self.inpaint_generator = InpaintGenerator(residual_blocks)

    def paint(
        self,
        image: Tensor,
        hole: Tensor,
        *,
        boxes: Sequence[Box] | None = None,
        edges: Tensor | None = None,
        canny_edges: Tensor | None = None,
        sigma: float = 2.0,
        edge_composite: bool = False,
    ) -> InpaintResult:
        """Fill the holes of checked images, H and W from 12 on.

        Args:
            image: [B, 3, H, W] RGB in [0, 1], 0 in the hole.
            hole: bool [B, 1, H, W].
            boxes: must be None: the instance norms see the whole image.
            edges: [B or 1, 1, H, W], 1 on edges: a drawing to fill the hole along, for editing. In the hole it stands
                instead of the predicted edges, around it the known ones stay; the edge generator does not run.
            canny_edges: [B or 1, 1, H, W], 1 on edges: the known edges, where Canny's are at hand or others are
                wanted; then scikit-image is not needed. What it holds in the hole is not looked at.
            sigma: deviation in pixels of the Gaussian that Canny smooths with, that of the training; 0: none (in the
                published configuration 0 draws one at random).
            edge_composite: whether known pixels keep their known edges, as in training. False: the generator's soft
                edges everywhere, as in the published test.

        Returns:
            ``output``, ``completed``, and ``edges``: those that guided the second stage.

        Raises:
            ValueError, TypeError: an argument has the wrong shape, dtype or value; the message names it.
            ModuleNotFoundError: scikit-image is absent and there are no ``canny_edges``.
        """
        drawing = None if edges is None else check_guidance("edges", edges, image)
        if canny_edges is None:
            if torch.compiler.is_exporting():
                raise ValueError(
                    "canny_edges: expected the known edges in an export, as Canny runs outside of the graph"
                )
            known = canny(image, hole, sigma)
        else:
            known = check_guidance("canny_edges", canny_edges, image).masked_fill(hole, 0)
        if drawing is None:
            predicted = predict_guide(self.edge_generator, image, known, hole)
            guide = torch.where(hole, predicted, known) if edge_composite else predicted
        else:
            guide = torch.where(hole, drawing, known)
        output = paint_guided(self.inpaint_generator, image, guide, hole)
        return InpaintResult(output, complete(image, output, hole), edges=guide)


def predict_guide(generator: Callable[[Tensor], Tensor], image: Tensor, known: Tensor, hole: Tensor) -> Tensor:
    """The first stage: ``[gray, 1 in the hole | known, 0 in the hole | hole]`` -> the guiding map everywhere."""
    gray = white_hole(to_gray(image), hole)
    return generator(torch.cat([gray, known, hole.to(image.dtype)], 1))


def paint_guided(generator: Callable[[Tensor], Tensor], image: Tensor, guide: Tensor, hole: Tensor) -> Tensor:
    """The second stage: ``[rgb, 1 in the hole | guiding map]`` -> an image."""
    return generator(torch.cat([white_hole(image, hole), guide], 1))


def white_hole(image: Tensor, hole: Tensor) -> Tensor:
    """``image * (1 - hole) + hole``."""
    return image.masked_fill(hole, 1)


def to_gray(image: Tensor) -> Tensor:
    """[B, 3, H, W] RGB -> [B, 1, H, W], weighted as scikit-image's ``rgb2gray`` does."""
    return (image * image.new_tensor(_LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)


def canny(image: Tensor, hole: Tensor, sigma: float = 2.0) -> Tensor:
    """Canny's edges of the known pixels, those of scikit-image: where the hole begins there is none.

    Args:
        image: [B, 3, H, W] RGB in [0, 1].
        hole: bool [B, 1, H, W].
        sigma: deviation in pixels of the Gaussian.

    Returns:
        [B, 1, H, W], 0 or 1, in the dtype and on the device of the image.

    Raises:
        ModuleNotFoundError: scikit-image is absent.
    """
    check_range("sigma", sigma, minimum=0)
    if isinstance(image, FakeTensor):  # whose memory is planned; that of the networks is larger
        return to_gray(image)
    try:
        from skimage import feature
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "EdgeConnect finds Canny's edges with scikit-image, which is absent: pip install scikit-image, or pass "
            "canny_edges=, a map of the known edges"
        ) from error
    gray = to_gray(image.detach().cpu().double())[:, 0].numpy()
    known = ~hole.cpu()[:, 0].numpy()
    maps = [feature.canny(g, sigma=sigma, mask=k) for g, k in zip(gray, known, strict=True)]
    return torch.stack([torch.from_numpy(edges) for edges in maps])[:, None].to(image)


# As torch.compiler.disable, which takes two seconds to import torch._dynamo, would mark it.
canny._torchdynamo_disable = True  # type: ignore[attr-defined]
