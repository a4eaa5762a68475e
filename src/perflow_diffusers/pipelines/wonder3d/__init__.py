"""Wonder3D on today's diffusers: one picture of an object -> six normal maps and six colour views."""

from .conditioning import camera_embeddings
from .pictures import centre_object, contact_sheet, remove_background, turntable
from .pipeline import Wonder3DPipeline, Wonder3DPipelineOutput
from .tiny import tiny_wonder3d
from .unet import UNetMV2DConditionModel

__all__ = [
    "UNetMV2DConditionModel",
    "Wonder3DPipeline",
    "Wonder3DPipelineOutput",
    "camera_embeddings",
    "centre_object",
    "contact_sheet",
    "remove_background",
    "tiny_wonder3d",
    "turntable",
]
