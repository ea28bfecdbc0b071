"""Computation of sequence log-probabilities for a whole token store, in packed batches and without gradients."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from efface.batching import TokenStore, added_tokens, pack_store
from efface.hf.model.adapted_head import base_of
from efface.hf.model.head import head_of, packed_hidden, use_packed_attention
from efface.hf.model.packing import shares_tokens
from efface_kernels import accumulation_dtype, linear_logprob, segment_sums


def budgeted(
    store: TokenStore, index: NDArray[np.int64], token_budget: int, *, share: bool = False
) -> Iterator[NDArray[np.int64]]:
    """Split ``index`` into consecutive groups of at most ``token_budget`` tokens; a longer sequence is its own one.

    With ``share``, the beginning that most sequences of the store have in common counts once per group.
    """
    added = added_tokens((TokenStore.empty(), store), share=share, last_tokens=not share)
    run: list[int] = []
    tokens = 0
    for sequence, length in zip(index.tolist(), added.retain[index].tolist(), strict=True):
        if run and added.shared + tokens + length > token_budget:
            yield np.array(run)
            run, tokens = [], 0
        run.append(sequence)
        tokens += length
    if run:
        yield np.array(run)


@contextmanager
def scoring(model: PreTrainedModel) -> Iterator[None]:
    """Put ``model`` into evaluation mode and switch it to packed attention; restore both when the block ends."""
    modes = [(module, module.training) for module in model.modules()]
    attention = model.config._attn_implementation  # noqa: SLF001
    model.eval()
    try:
        use_packed_attention(model)
        yield
    finally:
        for module, training in modes:
            module.training = training
        model.set_attn_implementation(attention)


@torch.no_grad()
def packed_logprobs(
    model: PreTrainedModel,
    store: TokenStore,
    index: NDArray[np.int64] | None = None,
    *,
    token_budget: int = 8192,
    share: bool = True,
    name: str = "store",
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
    """Yield (sequence indices, their L_s on the CPU) after each forward pass.

    The model stays in evaluation mode until the generator is exhausted or closed. With several ranks, each rank runs
    every ``world_size``-th pass. Every rank yields the sequences of ``world_size`` passes at a time, with 0 for the
    values of other ranks, so that the sum over ranks equals the values of a single process.

    Args:
        model: a transformers model.
        store: the token store.
        index: indices of the sequences to score; None scores the whole store.
        token_budget: maximum number of tokens per forward pass; a longer sequence gets its own pass.
        share: run tokens that sequences of a pass share only once, if the model supports it.
        name: name of the store in error messages.
        rank: rank of this process.
        world_size: number of processes.

    Raises:
        ValueError: on the first iteration, for the reasons listed for ``store_logprobs``.
    """
    head = head_of(model)
    check_store(model, store, name)
    index = np.arange(len(store)) if index is None else index
    with scoring(model):
        share = share and shares_tokens(base_of(model), int(store.lengths.max(initial=0)))
        packs = budgeted(store, index, token_budget, share=share)
        while turn := list(itertools.islice(packs, world_size)):
            sums = [torch.zeros(len(pack), dtype=accumulation_dtype(head.weight.dtype)) for pack in turn]
            if rank < len(turn):
                pinned = model.device.type == "cuda"
                batch = pack_store(store, turn[rank], share=share, last_tokens=not share, pin_memory=pinned)
                batch = batch.to(model.device, non_blocking=True)
                logprobs = linear_logprob(
                    packed_hidden(model, batch), head.weight, batch.targets, bias=head.bias, softcap=head.softcap
                )
                sums[rank] = segment_sums(logprobs, batch.label_offsets.device).cpu()
            yield np.concatenate(turn), torch.cat(sums)


def store_logprobs(
    model: PreTrainedModel,
    store: TokenStore,
    *,
    token_budget: int = 8192,
    share: bool = True,
    name: str = "store",
) -> torch.Tensor:
    """Return L_s of every sequence, (len(store),) on the CPU, in nats; float32 (float64 for float64 models).

    The model is in evaluation mode during the computation; its modes are restored afterwards.

    Args:
        model: a transformers model.
        store: the token store.
        token_budget: maximum number of tokens per packed batch. It changes the results only by rounding.
        share: see ``packed_logprobs``. It changes the results only by rounding.
        name: name of the store in error messages.

    Raises:
        ValueError: if a token id is outside the model's vocabulary, or a sequence is longer than the model's positions.
    """
    sums = torch.zeros(len(store), dtype=accumulation_dtype(head_of(model).weight.dtype))
    for sequences, part in packed_logprobs(model, store, token_budget=token_budget, share=share, name=name):
        sums[torch.from_numpy(sequences)] = part
    return sums


def check_store(model: PreTrainedModel, store: TokenStore, name: str) -> None:
    """Raise ValueError if a token id is outside the model's vocabulary or a sequence exceeds its positions."""
    embeddings: Any = model.get_input_embeddings()
    store.check_vocabulary(embeddings.weight.shape[0], name)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = int(store.lengths.max(initial=0))
    if limit is not None and longest > limit > 0:  # XLNet's config has -1, which means no limit
        raise ValueError(
            f"`{name}`: expected sequences of at most {limit} tokens (the model's positions), got {longest}; "
            "set a maximum length to cut them (--max-length)"
        )
