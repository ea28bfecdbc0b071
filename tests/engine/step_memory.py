"""One training step in a process of its own: prints by how many MiB its resident memory rose above the model's."""

import copy
import resource
import sys
import tempfile

import torch
from helpers import arguments, padded, random_store
from padded_loop import eager_loss
from transformers import LlamaConfig, LlamaForCausalLM

from efface import NPO, UnlearnTrainer

PAIRS, VOCABULARY = 16, 128_256
OBJECTIVE = NPO(beta=0.1)


def resident() -> float:
    """The largest resident size so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def main(kind: str) -> None:
    # as long as TOFU's: 57 tokens on average, 139 the longest; 58 % of them answers
    stores = [random_store(64, seed=seed, low=30, high=90, vocabulary=VOCABULARY) for seed in (1, 2)]
    policy = model()
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
    main(sys.argv[1])
