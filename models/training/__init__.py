"""One training step of every system, with the published losses, weights and optimisers.

::

    system = DeepFillV1Training(DeepFillV1().cuda(), seed=0)
    for image in images:                                       # [B, 3, 256, 256] in [0, 1]
        boxes = random_boxes(1, 256, 128, generator=generator)
        mask = box_masks(shrink_boxes(boxes, 16, generator=generator), 256, device="cuda")
        losses = system.step(Batch(image, mask, boxes))
    torch.save(system.state_dict(), path)

A system takes the networks as they are: weights, device and dtype. Masks are made by :mod:`..random_masks`, frozen
features by :mod:`..perceptual`. What a system trains one after another are its ``phases``.
"""

from inpaint_kernels.models.training._system import AdamSettings, Batch, Settings, TrainingSystem
from inpaint_kernels.models.training.csa import CSASettings, CSATraining
from inpaint_kernels.models.training.deepfill_v1 import DeepFillV1Settings, DeepFillV1Training
from inpaint_kernels.models.training.deepfill_v2 import DeepFillV2Settings, DeepFillV2Training
from inpaint_kernels.models.training.edge_connect import EdgeConnectSettings, EdgeConnectTraining
from inpaint_kernels.models.training.glcic import GLCICSettings, GLCICTraining
from inpaint_kernels.models.training.guided_face import GuidedFaceSettings, GuidedFaceTraining
from inpaint_kernels.models.training.partial_conv_unet import PartialConvSettings, PartialConvTraining

__all__ = [
    "AdamSettings",
    "Batch",
    "CSASettings",
    "CSATraining",
    "DeepFillV1Settings",
    "DeepFillV1Training",
    "DeepFillV2Settings",
    "DeepFillV2Training",
    "EdgeConnectSettings",
    "EdgeConnectTraining",
    "GLCICSettings",
    "GLCICTraining",
    "GuidedFaceSettings",
    "GuidedFaceTraining",
    "PartialConvSettings",
    "PartialConvTraining",
    "Settings",
    "TrainingSystem",
]
