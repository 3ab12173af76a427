"""Antidistillation Sampling: what two stages must agree on, and the decoding engine."""

import os

# Of CUDA's allocator, which reads it before its first allocation (torch's own settings: ads/models.py).
# Prompts and rows of many lengths leave holes that segments of a fixed size cannot fill. Users' own stay.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
