"""Take one training step of a tiny Llama: ``first_step.py efface`` or ``first_step.py transformers``.

Both are written as a user would: a ``Trainer`` on two pairs of token sequences. efface's uses NPO and its cached
reference.
"""

import sys
import tempfile
import warnings
from typing import Any

CONFIG: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
FORGET = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11]]
RETAIN = [[12, 13, 14, 15], [16, 17, 18, 19, 20]]
STEP: dict[str, Any] = {
    "max_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


def main(whose: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - the imports are part of the timing

    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    with tempfile.TemporaryDirectory() as folder:
        (ours if whose == "efface" else plain)(model, folder)


def ours(model: Any, folder: str) -> None:
    """Run NPO with ``efface.UnlearnTrainer``."""
    import efface  # noqa: PLC0415
    from efface.batching import TokenStore  # noqa: PLC0415

    forget, retain = (TokenStore.from_sequences(rows, [2] * len(rows)) for rows in (FORGET, RETAIN))
    args = efface.UnlearnArguments(output_dir=folder, reference_cache="none", pairs_per_step=2, **STEP)
    efface.UnlearnTrainer(model, args, forget=forget, retain=retain, objective=efface.NPO(beta=0.1)).train()


def plain(model: Any, folder: str) -> None:
    """Train with ``transformers.Trainer``."""
    from transformers import Trainer, TrainingArguments  # noqa: PLC0415

    rows = [{"input_ids": row[:4], "labels": row[:4]} for row in (*FORGET, *RETAIN)]
    args = TrainingArguments(output_dir=folder, per_device_train_batch_size=4, **STEP)
    Trainer(model, args, train_dataset=rows).train()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1])
