"""Predict with the exported model as a user without tfimm_lora would.

Usage: _fresh.py MODEL PICTURES.npy LOGITS.npy
"""

import sys

import numpy as np
import tensorflow as tf
import tfimm  # noqa: F401  (so that Keras knows the classes of the model)

model_path, pictures_path, logits_path = sys.argv[1:]
model = tf.keras.models.load_model(model_path, compile=False)
np.save(logits_path, model(np.load(pictures_path), training=False).numpy())

if "tfimm_lora" in sys.modules:
    sys.exit("This process was meant to run without tfimm_lora, but it was imported.")
print(type(model).__module__ + "." + type(model).__name__)
