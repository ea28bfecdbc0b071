"""Hugging Face models: loading, LoRA, the fused head that computes the loss, and attention over packed batches."""
