"""Models and methods built on the public ops."""

from inpaint_kernels.models._boxes import Box
from inpaint_kernels.models._interface import InpaintingModel, InpaintResult
from inpaint_kernels.models.csa import CSA
from inpaint_kernels.models.deepfill_v1 import DeepFillV1
from inpaint_kernels.models.deepfill_v2 import DeepFillV2
from inpaint_kernels.models.edge_connect import EdgeConnect
from inpaint_kernels.models.glcic import GLCIC
from inpaint_kernels.models.guided_face import GuidedFace
from inpaint_kernels.models.partial_conv_unet import PartialConvUNet

__all__ = [
    "CSA",
    "GLCIC",
    "Box",
    "DeepFillV1",
    "DeepFillV2",
    "EdgeConnect",
    "GuidedFace",
    "InpaintResult",
    "InpaintingModel",
    "PartialConvUNet",
]
