"""Attention's sweeps, their adjoint and sigma2, written once on passes that each backend provides."""
