"""A page in the browser that answers for single pictures: ``tfimm-lora demo``."""
