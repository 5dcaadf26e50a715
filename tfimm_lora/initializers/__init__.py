"""Initial values of the factors A and B, and the linear algebra behind them; NumPy only."""
