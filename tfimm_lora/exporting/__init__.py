"""Export of a model for production: Keras, SavedModel, TFLite, ONNX."""
