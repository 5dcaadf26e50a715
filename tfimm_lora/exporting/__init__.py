"""Export of a model for production: Keras, SavedModel, TFLite, ONNX."""

from tfimm_lora.exporting.exported import Exported, TensorInfo
from tfimm_lora.exporting.to_file import export

__all__ = ["Exported", "TensorInfo", "export"]
