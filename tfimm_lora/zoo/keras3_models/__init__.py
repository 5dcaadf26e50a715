"""Models of timm by name on Keras 3, built by keras_hub or ``keras.applications``."""
