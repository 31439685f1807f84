"""The homogeneity trap in numbers and figures: each experiment measures what a law predicts, with fixed seeds."""
