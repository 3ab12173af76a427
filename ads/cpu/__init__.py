"""What this project adds to torch on CPUs. Other code imports this module alone, nothing else of the room.

- Decoding steps of models built like Llama in compiled code: `decodes` says of a weight whether there is any,
  `CompiledStep` is such a step and makes the cache that it reads (build.py, native.py, native.c, pages.py).
- Training of LoRA adapters by merged weights: `merged_adapters` (merged_lora.py).
- What becomes of memory that torch frees: `keep_freed_memory`, `give_back_freed_memory` (memory.py).

Nothing depends on a compiler: without one torch computes the same, to rounding.
"""

from ads.cpu.build import other_ways
from ads.cpu.memory import give_back_freed_memory, keep_freed_memory
from ads.cpu.merged_lora import merged_adapters
from ads.cpu.native import CompiledStep, decodes

__all__ = [
    "CompiledStep",
    "decodes",
    "give_back_freed_memory",
    "keep_freed_memory",
    "merged_adapters",
    "other_ways",
]
