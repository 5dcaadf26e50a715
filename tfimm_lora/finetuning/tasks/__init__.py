"""What a model is fine-tuned for; see ``base.py``. Each task is one module, in ``named.py``."""
