"""The Hugging Face engine: the fused head, packed attention, references, templates and trainers."""
