"""What the published inpainting networks are trained with: losses of pixels and of what a discriminator says.

Every loss is a scalar that is differentiable in what a generator gives, averaged over the batch, with the weight 1; the
weights of a system's terms are its trainer's. Images have whatever range that system is trained in. A mask is 1 (or
True) where pixels count, [B or 1, 1, H, W]: the hole, or its complement. Losses of VGG's features are in
:mod:`.perceptual`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from inpaint_kernels._checks import check_choice, check_floating, check_range, check_same_device, check_shape

GRADIENTS = ("exact", "published")

# Pixels ---------------------------------------------------------------------------------------------------------------


def masked_l1_loss(output: Tensor, target: Tensor, mask: Tensor, *, normalise: bool = False) -> Tensor:
    """Mean of ``mask * |output - target|`` over all pixels and channels.

    Args:
        output: [B, C, H, W].
        target: the same.
        mask: see this module's docstring; it may hold weights.
        normalise: divide by the mean of the mask, so that the loss does not grow with the hole; 0 for an empty mask.

    References:
        Liu et al., Image Inpainting for Irregular Holes Using Partial Convolutions, ECCV 2018, L_hole and L_valid;
        naoto0804/pytorch-inpainting-with-partial-conv, ``InpaintingLoss``. The "ae" loss of DeepFill v1:
        daa233/generative-inpainting-pytorch, ``Trainer.forward``; its original, JiahuiYu/generative_inpainting v1.0.0,
        with ``normalise``.
    """
    weights = _check_masked(output, target, mask)
    return _mean(weights * (output - target).abs(), weights, normalise)


def masked_mse_loss(output: Tensor, target: Tensor, mask: Tensor, *, normalise: bool = False) -> Tensor:
    """Mean of ``(mask * (output - target))^2`` over all pixels and channels; arguments as of :func:`masked_l1_loss`.

    References:
        Iizuka et al., Globally and Locally Consistent Image Completion, SIGGRAPH 2017, equation 2, without its sum.
        otenim/GLCIC-PyTorch, ``completion_network_loss``.
    """
    weights = _check_masked(output, target, mask)
    return _mean((weights * (output - target)).square(), weights, normalise)


def hole_relative_l1_loss(output: Tensor, target: Tensor, hole: Tensor) -> Tensor:
    """Mean of ``|output - target|`` over all pixels, known ones too, divided by the hole's share of them.

    Args:
        output: [B, C, H, W].
        target: the same.
        hole: a mask that is not empty; the share is that of the batch.

    References:
        knazeri/edge-connect, ``InpaintingModel.process``.
    """
    weights = _check_masked(output, target, hole, "hole")
    return (output - target).abs().mean() / weights.mean()


def spatial_discount(
    height: int,
    width: int,
    gamma: float = 0.9,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[1, 1, height, width]: ``gamma^d``, d the distance of a hole's pixel to the nearest known one.

    The hole is the whole map. As published, d is 0 in the first row and column and 1 in the last ones.

    References:
        Yu et al., Generative Image Inpainting with Contextual Attention, CVPR 2018, section 4.3.
        daa233/generative-inpainting-pytorch, ``spatial_discounting_mask``.
    """
    check_range("gamma", gamma, minimum=0, maximum=1)
    rows, columns = (_distance_to_border(name, n, device) for name, n in (("height", height), ("width", width)))
    distance = torch.minimum(rows[:, None], columns[None, :])
    return torch.pow(gamma, distance.to(dtype))[None, None]


def _distance_to_border(name: str, size: int, device: torch.device | str | None) -> Tensor:
    check_range(name, size, minimum=1, integer=True)
    place = torch.arange(size, device=device)
    return torch.minimum(place, size - place)


def discounted_l1_loss(output: Tensor, target: Tensor, gamma: float = 0.9) -> Tensor:
    """Mean of ``|output - target|``, discounted by the distance to what is known, see :func:`spatial_discount`.

    Args:
        output: [B, C, h, w], the hole's box alone.
        target: the same.
        gamma: factor per pixel of distance, 0 to 1.

    References:
        As of :func:`spatial_discount`; daa233's ``Trainer.forward``, loss "l1".
    """
    _check_images(output, target)
    discount = spatial_discount(output.shape[2], output.shape[3], gamma, device=output.device, dtype=output.dtype)
    return (discount * (output - target).abs()).mean()


def total_variation_loss(image: Tensor, hole: Tensor | None = None) -> Tensor:
    """Mean absolute difference of neighbours in a row plus that of neighbours in a column.

    Args:
        image: [B, C, H, W], H and W from 2 on: in training the completed image.
        hole: a mask; differences count only where both pixels are in it or one pixel (of 8) from it, as in the paper.
            The mean is over all pairs still. None: all count, as in the published code.

    References:
        Liu et al., ECCV 2018, L_tv. naoto0804/pytorch-inpainting-with-partial-conv, ``total_variation_loss``.
    """
    check_shape("image", image, "B C H W")
    check_floating("image", image)
    if min(image.shape[2:]) < 2:
        raise ValueError(f"image: expected a height and width of at least 2, got {list(image.shape)}")
    rows = (image[:, :, 1:] - image[:, :, :-1]).abs()
    columns = (image[:, :, :, 1:] - image[:, :, :, :-1]).abs()
    if hole is None:
        return rows.mean() + columns.mean()
    near = F.max_pool2d(_check_mask(hole, image, "hole"), 3, stride=1, padding=1)
    rows = rows * near[:, :, 1:] * near[:, :, :-1]
    return rows.mean() + (columns * near[:, :, :, 1:] * near[:, :, :, :-1]).mean()


# What a discriminator says --------------------------------------------------------------------------------------------


def wasserstein_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``mean(fake) - mean(real)`` of a critic's values, of any shape; :func:`gradient_penalty` belongs to it.

    References:
        Gulrajani et al., Improved Training of Wasserstein GANs, NeurIPS 2017. daa233/generative-inpainting-pytorch,
        ``Trainer.forward``, loss "wgan_d".
    """
    _check_scores(real=real, fake=fake)
    return fake.mean() - real.mean()


def wasserstein_generator_loss(fake: Tensor) -> Tensor:
    """``-mean(fake)``; see :func:`wasserstein_discriminator_loss`."""
    _check_scores(fake=fake)
    return -fake.mean()


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    mask: Tensor | None = None,
    *,
    position: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean over the batch of ``(||gradient|| - 1)^2``, the critic's gradient at random points between real and fake.

    It is differentiable in the critic's parameters, not in ``real`` and ``fake``.

    Args:
        critic: [B, C, H, W] -> values, each of one image alone: no batch norm.
        real: [B, C, H, W].
        fake: the same.
        mask: of 0 and 1: the gradient counts only where it is 1, so that the critic is free in what is known anyway.
            None: everywhere.
        position: [B, 1, 1, 1] in [0, 1], each sample's share of ``real``; None: uniformly random.
        generator: of the random positions, on the images' device; None: torch's own.

    References:
        Gulrajani et al., NeurIPS 2017, equation 3; masked by Yu et al., CVPR 2018, section 4.2. Published code:
        daa233/generative-inpainting-pytorch, ``Trainer.calc_gradient_penalty``, without mask; JiahuiYu/neuralgym,
        ``gradients_penalty``, with it.

    Deviation from mmagic, which normalises the gradient of every pixel and divides by the mask's mean.
    """
    _check_images(fake, real, "fake", "real")
    weights = None if mask is None else _check_mask(mask, real)
    if position is None:
        position = torch.rand(real.shape[0], 1, 1, 1, dtype=real.dtype, device=real.device, generator=generator)
    check_shape("position", position, "B 1 1 1", B=real.shape[0])
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        between = (position * real + (1 - position) * fake).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=differentiable)
    if weights is not None:
        gradient = gradient * weights
    return (torch.linalg.vector_norm(gradient.flatten(1), dim=1) - 1).square().mean()


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``(mean(relu(1 - real)) + mean(relu(1 + fake))) / 2`` of scores of any shape and range.

    References:
        Yu et al., Free-Form Image Inpainting with Gated Convolution, ICCV 2019, section 3.3 (SN-PatchGAN).
        nipponjo/deepfillv2-pytorch, ``hinge_loss_d``; knazeri/edge-connect, ``AdversarialLoss("hinge")``.
    """
    _check_scores(real=real, fake=fake)
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """``-mean(fake)``; see :func:`hinge_discriminator_loss`."""
    _check_scores(fake=fake)
    return -fake.mean()


def bce_discriminator_loss(real: Tensor, fake: Tensor, *, from_logits: bool = False) -> Tensor:
    """Half the binary cross entropies of real scores to 1 and of fake ones to 0, added: "nsgan".

    Args:
        real: probabilities in [0, 1], of any shape.
        fake: the same.
        from_logits: whether both are logits instead, safe in half precision. Probabilities have the logarithm of 0
            taken as -100.

    References:
        Goodfellow et al., Generative Adversarial Nets, NeurIPS 2014, with the generator's non-saturating form.
        knazeri/edge-connect, ``AdversarialLoss("nsgan")``; otenim/GLCIC-PyTorch, train.py, before its factor alpha.
    """
    _check_scores(real=real, fake=fake)
    return (_bce(real, 1.0, from_logits) + _bce(fake, 0.0, from_logits)) / 2


def bce_generator_loss(fake: Tensor, *, from_logits: bool = False) -> Tensor:
    """Binary cross entropy of fake scores to 1; see :func:`bce_discriminator_loss`."""
    _check_scores(fake=fake)
    return _bce(fake, 1.0, from_logits)


def _bce(scores: Tensor, label: float, from_logits: bool) -> Tensor:
    if from_logits:
        return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, label))
    with torch.autocast(scores.device.type, enabled=False):  # which refuses it on CUDA: logarithms of short numbers
        wide = torch.promote_types(scores.dtype, torch.float32)
        return F.binary_cross_entropy(scores.to(wide), torch.full_like(scores, label, dtype=wide))


def least_squares_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``(mean((real - 1)^2) + mean(fake^2)) / 2`` of scores of any shape.

    References:
        Mao et al., Least Squares Generative Adversarial Networks, ICCV 2017. nipponjo/deepfillv2-pytorch,
        ``ls_loss_d``; knazeri/edge-connect, ``AdversarialLoss("lsgan")``.
    """
    _check_scores(real=real, fake=fake)
    return ((real - 1).square().mean() + fake.square().mean()) / 2


def least_squares_generator_loss(fake: Tensor) -> Tensor:
    """``mean((fake - 1)^2)``; see :func:`least_squares_discriminator_loss`."""
    _check_scores(fake=fake)
    return (fake - 1).square().mean()


def relativistic_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Relativistic average least squares: how much realer a score is than the other side's mean, 1 or -1 wanted.

    ``(mean((real - mean(fake) - 1)^2) + mean((fake - mean(real) + 1)^2)) / 2``, scores of any shape.

    References:
        Jolicoeur-Martineau, The Relativistic Discriminator, ICLR 2019. Liu et al., Coherent Semantic Attention for
        Image Inpainting, ICCV 2019, section 3.3. KumapowerLIU/CSA-inpainting, ``GANLoss``; the paper has no halves.
    """
    return _relativistic(real, fake, 1.0)


def relativistic_generator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """:func:`relativistic_discriminator_loss` with both sides' roles exchanged; its gradient runs through both."""
    return _relativistic(real, fake, -1.0)


def _relativistic(real: Tensor, fake: Tensor, wanted: float) -> Tensor:
    _check_scores(real=real, fake=fake)
    of_real = (real - fake.mean() - wanted).square().mean()
    return (of_real + (fake - real.mean() + wanted).square().mean()) / 2


# Features -------------------------------------------------------------------------------------------------------------


def feature_matching_loss(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Sum over a discriminator's layers of the mean absolute difference of what they give for fake and real images.

    Args:
        fake: a map per layer.
        real: maps of the same shapes; no gradient runs through them.

    References:
        Nazeri et al., EdgeConnect, 2019, equation 4. knazeri/edge-connect, ``EdgeModel.process``.
    """
    if not fake or len(fake) != len(real):
        raise ValueError(f"fake, real: expected maps of the same layers, got {len(fake)} and {len(real)}")
    for i, (of_fake, of_real) in enumerate(zip(fake, real, strict=True)):
        _check_same_shape(of_fake, of_real, f"fake[{i}]", f"real[{i}]")
    return torch.stack([F.l1_loss(f, r.detach()) for f, r in zip(fake, real, strict=True)]).sum()


def consistency_loss(features: Tensor, target: Tensor, flags: Tensor, *, gradient: str = "exact") -> Tensor:
    """Mean of ``(flags * features - target)^2``: CSA's features in the hole are to be VGG's of the whole image.

    The published loss is this of both of :class:`.csa.RefinedFeatures`, added.

    Args:
        features: [B, C, h, w], ``attention`` or ``decoder`` of :class:`.csa.RefinedFeatures`.
        target: the same shape: relu4_3 of VGG-16 of the true image in [-1, 1]; no gradient runs through it.
        flags: bool [B or 1, h, w], masked positions, as :meth:`inpaint_kernels.nn.CSA.set_mask` makes them.
        gradient: "exact", or "published": none.

    Deviation from the published code: that one cuts the gradient of this loss, so that it trains nothing; ours is the
    gradient of its formula, and ``gradient="published"`` reproduces the cut. As there, and not in the paper, the target
    counts outside of the hole too, which adds a constant to the value.

    References:
        Liu et al., ICCV 2019, equation 7. KumapowerLIU/CSA-inpainting, ``InnerCos`` and ``CSA.backward_G``.
    """
    check_choice("gradient", gradient, GRADIENTS)
    sizes = check_shape("features", features, "B C h w")
    _check_same_shape(features, target, "features", "target")
    check_shape("flags", flags, "B|1 h w", B=sizes["B"], h=sizes["h"], w=sizes["w"])
    weights = flags.to(features.device, features.dtype)[:, None]
    loss = F.mse_loss(weights * features, target.detach())
    return loss if gradient == "exact" else loss.detach()


# Checks and means -----------------------------------------------------------------------------------------------------


def _mean(x: Tensor, weights: Tensor, normalise: bool) -> Tensor:
    if not normalise:
        return x.mean()
    return x.mean() / weights.mean().clamp_min(torch.finfo(weights.dtype).tiny)


def _check_masked(output: Tensor, target: Tensor, mask: Tensor, name: str = "mask") -> Tensor:
    """The mask in the dtype of the output."""
    _check_images(output, target)
    return _check_mask(mask, output, name)


def _check_mask(mask: Tensor, image: Tensor, name: str = "mask") -> Tensor:
    batch, _, height, width = image.shape
    check_shape(name, mask, "B|1 1 H W", B=batch, H=height, W=width)
    check_same_device(**{"image": image, name: mask})
    return mask.to(image.dtype)


def _check_images(output: Tensor, target: Tensor, name: str = "output", other: str = "target") -> None:
    check_shape(name, output, "B C H W")
    _check_same_shape(output, target, name, other)


def _check_same_shape(x: Tensor, y: Tensor, name: str, other: str) -> None:
    check_floating(name, x)
    check_floating(other, y)
    if x.shape != y.shape:
        raise ValueError(f"{other}: expected the shape of {name}, {list(x.shape)}, got {list(y.shape)}")
    check_same_device(**{name: x, other: y})


def _check_scores(**scores: Tensor) -> None:
    for name, x in scores.items():
        check_floating(name, x)
    check_same_device(**scores)
