"""Measurements of fastdsm: machine code, and time."""
