"""Models as they are found: loading, LoRA, the head that computes the loss, attention over packs."""
