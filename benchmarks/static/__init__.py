"""Ahead-of-time proof: every launchable kernel compiled without a GPU, its machine code read and counted."""
