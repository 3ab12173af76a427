"""Antidistillation Sampling: what two stages must agree on, and the decoding engine."""
