"""One training step in a separate process. It prints by how many MiB the peak resident memory exceeds the model's."""

import copy
import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from efface import NPO, UnlearnTrainer
from support.helpers import arguments, kibibytes, padded, random_store
from support.padded_loop import eager_loss

PAIRS = 16
OBJECTIVE = NPO(beta=0.1)


def resident() -> float:
    """Return the peak resident size in MiB. Unlike getrusage's, VmHWM counts only this program."""
    return kibibytes("/proc/self/status", "VmHWM") / 1024


def model(width: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=1376 * width // 512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def main(kind: str, width: int, vocabulary: int) -> None:
    # the lengths of TOFU's rows: 57 tokens on average, 139 at most, 58 % of them answer tokens
    stores = [random_store(64, seed=seed, low=30, high=90, vocabulary=vocabulary) for seed in (1, 2)]
    policy = model(width, vocabulary)
    before = resident()
    if kind == "eager":
        frozen = copy.deepcopy(policy).eval()
        forget, retain = (padded(store, list(range(PAIRS))) for store in stores)
        eager_loss(OBJECTIVE, policy, frozen, forget, retain).backward()
    else:
        with tempfile.TemporaryDirectory() as folder:
            settings = {"per_device_train_batch_size": PAIRS, "max_steps": 1, "optim": "sgd", "logging_steps": 100}
            UnlearnTrainer(
                policy,
                arguments(folder, **settings),
                forget=stores[0],
                retain=stores[1],
                objective=OBJECTIVE,
                reference=kind,
            ).train()
    print(resident() - before)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
