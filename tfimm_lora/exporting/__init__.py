"""Export of a model for production: Keras, SavedModel, TFLite and ONNX files."""
