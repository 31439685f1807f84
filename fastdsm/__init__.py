"""fastdsm: doubly-stochastic matrices, projected, measured and differentiated."""
