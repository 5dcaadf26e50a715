"""Settings that are searched for: the learning rate and the rank."""
