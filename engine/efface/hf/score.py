"""Sequence log-probabilities of a whole token store, packed and without gradients."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from efface.batching import Role, TokenStore, pack_items
from efface.hf.attention import use_packed_attention
from efface.hf.head import head_of, packed_hidden
from efface_kernels import linear_logprob
from efface_kernels.linear_loss.sequences import segment_sums
from efface_kernels.logits import accumulation_dtype


def _budgeted(store: TokenStore, token_budget: int) -> Iterator[NDArray[np.int64]]:
    """Yield runs of sequence indices whose tokens fit the budget; a longer sequence comes alone."""
    run: list[int] = []
    tokens = 0
    for index, length in enumerate(store.lengths.tolist()):
        if run and tokens + length > token_budget:
            yield np.array(run)
            run, tokens = [], 0
        run.append(index)
        tokens += length
    if run:
        yield np.array(run)


@torch.no_grad()
def store_logprobs(
    model: PreTrainedModel,
    store: TokenStore,
    *,
    token_budget: int = 8192,
    name: str = "store",
    rank: int = 0,
    world_size: int = 1,
) -> torch.Tensor:
    """Return L_s of every sequence, (len(store),) on the CPU, in nats; float32 (float64 for float64 models).

    Sequences are packed up to ``token_budget`` tokens; the budget does not change a result beyond rounding. The
    model is put into evaluation mode and back. Errors call the store ``name``. Of ``world_size`` ranks each scores
    every ``world_size``-th pack and leaves 0 for the others': the sum over the ranks is what one alone would return.

    Raises:
        ValueError: a token id outside the model's vocabulary, or a sequence longer than the model's positions.
    """
    head = head_of(model)
    check_store(model, store, name)
    training, attention = model.training, model.config._attn_implementation  # noqa: SLF001
    model.eval()
    use_packed_attention(model)
    try:
        sums = torch.zeros(len(store), dtype=accumulation_dtype(head.weight.dtype))
        for index in itertools.islice(_budgeted(store, token_budget), rank, None, world_size):
            roles = np.full(len(index), Role.RETAIN, np.int8)
            batch = pack_items((TokenStore.empty(), store), roles, index).to(model.device)
            logprobs = linear_logprob(
                packed_hidden(model, batch), head.weight, batch.targets, bias=head.bias, softcap=head.softcap
            )
            offsets = torch.tensor(batch.row_offsets, device=logprobs.device)
            sums[torch.from_numpy(index)] = segment_sums(logprobs, offsets).cpu()
        return sums
    finally:
        model.train(training)
        model.set_attn_implementation(attention)


def check_store(model: PreTrainedModel, store: TokenStore, name: str) -> None:
    """Raise ValueError if the store holds a token or a sequence that the model cannot read."""
    embeddings: Any = model.get_input_embeddings()
    store.check_vocabulary(embeddings.weight.shape[0], name)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = int(store.lengths.max(initial=0))
    if limit is not None and longest > limit:
        raise ValueError(
            f"`{name}`: expected sequences of at most {limit} tokens (the model's positions), got {longest}; "
            "set --max_length to cut them on purpose"
        )
