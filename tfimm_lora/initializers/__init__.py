"""Initial values of the factors A and B, and the linear algebra for them. NumPy only."""
