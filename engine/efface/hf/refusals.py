"""Models whose loss or state does not survive packing; each refusal says why."""

from typing import Any

ATTENTION_ONLY = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
"""Layers that see nothing but the tokens of their own sequence, in the configurations' words."""

BLIND = {"falcon", "bloom", "mpt", "openai-gpt"}
"""Models of transformers whose attention can neither be replaced nor told where sequences begin."""

RECURRENT = {"linear_attention", "mamba", "mamba2", "recurrent", "conv", "hybrid", "hybrid_sliding"}
"""Layers whose state runs on from token to token, over the border between two packed sequences."""


def check_packable(model: Any) -> None:
    """Raise ValueError for a model whose sequences would see one another: by recurrent layers, or by attention.

    Layers are known by the configuration's list of them; a model without one, by transformers' mark of a state.
    """
    config = model.config.get_text_config()
    if getattr(config, "model_type", None) in BLIND:
        raise ValueError(
            f"{type(model).__name__}: its attention looks at no position ids, so that packed sequences would see one "
            "another; packed batches cannot serve this model"
        )
    lists = (getattr(config, name, None) for name in ("layer_types", "layers_block_type", "block_types"))
    kinds = {kind for kinds in lists if isinstance(kinds, (list, tuple)) for kind in kinds}
    found = sorted(kinds & RECURRENT)
    stateful = getattr(model, "_is_stateful", False) and not (kinds and kinds <= ATTENTION_ONLY)
    if found or stateful:
        raise ValueError(
            f"{type(model).__name__}: expected attention layers, got recurrent ones "
            f"({', '.join(found) or 'the model keeps a state'}), whose state would flow from one packed sequence into "
            "the next; packed batches cannot serve this model"
        )


def check_adapters(model: Any, base: Any) -> None:
    """Raise ValueError for adapters that need a batch axis; the arguments are those of ``check_servable``."""
    if model is not base:
        for name, config in model.peft_config.items():
            _check_adapter(name, config)


def check_servable(model: Any, base: Any) -> None:
    """Raise ValueError for adapters that need a batch axis, and for a loss with a term that the head does not know.

    Args:
        model: the model as it is called, a ``peft.PeftModel`` perhaps.
        base: the transformers model within.
    """
    check_adapters(model, base)
    config = base.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if getattr(config, "output_router_logits", False) and coefficient != 0:
        raise ValueError(
            f"{type(base).__name__}: its loss includes a router's auxiliary loss (output_router_logits=True, "
            f"router_aux_loss_coef={coefficient}), which an unlearning objective has not; set "
            "model.config.output_router_logits = False"
        )


def _check_adapter(name: str, config: Any) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(
            f"adapter {name!r}: expected weights of layers (LoRA and its kin), got {kind}, whose virtual tokens belong "
            "to no sequence of a packed batch; use LoRA"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"adapter {name!r}: an activated LoRA looks for its invocation tokens in input_ids, one row a sequence, "
            "which a packed batch has not; use plain LoRA"
        )
