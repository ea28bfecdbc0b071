"""Attention over packed batches: each sequence attends to itself alone, so the cost is Σ n² and never T².

``interface.py`` registers it with transformers as ``efface_varlen``; ``choice.py`` picks one of three kernels for a
call: flash-attn (``flash_attn.py``), torch's own (``torch_varlen.py``), or SDPA by segment (``segments.py``).
"""

from efface.hf.model.attention.interface import (
    NAME,
    hands_packs_on,
    hands_windows_on,
    packed_arguments,
    varlen_attention,
)

__all__ = ["NAME", "hands_packs_on", "hands_windows_on", "packed_arguments", "varlen_attention"]
