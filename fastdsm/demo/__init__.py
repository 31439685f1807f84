"""The package's main job on real input: the attention of a pretrained transformer, projected, measured and timed."""
