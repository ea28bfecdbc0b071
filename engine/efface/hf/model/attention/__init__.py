"""Attention over packed batches: each sequence attends only to itself, so the cost is Σ n², not T².

``interface.py`` registers the attention with transformers under the name ``efface_varlen``. ``choice.py`` selects one
of three kernels for each call: flash-attn (``flash_attn.py``), torch's own (``torch_varlen.py``), or SDPA for one
sequence at a time (``segments.py``).
"""

from efface.hf.model.attention.interface import (
    NAME,
    hands_packs_on,
    hands_windows_on,
    packed_arguments,
    varlen_attention,
)

__all__ = ["NAME", "hands_packs_on", "hands_windows_on", "packed_arguments", "varlen_attention"]
