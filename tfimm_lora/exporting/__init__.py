"""Export of a model for production: Keras, SavedModel, TFLite, ONNX."""

from tfimm_lora.exporting.export import export
from tfimm_lora.exporting.exported import Exported, TensorInfo

__all__ = ["Exported", "TensorInfo", "export"]
