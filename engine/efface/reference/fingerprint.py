"""The fingerprint of a model: a hash of its weights and settings, equal for models that compute the same numbers.

Copying 13 GB of weights to the host and hashing them with a cryptographic hash would take tens of seconds. So each
tensor is reduced on its own device, with integer arithmetic. Its bytes are read as 64-bit words w_i, and each block of
words is reduced to

    sum_i mix(w_i, a_i)  mod 2^64
    mix(w, a) = fold_32(a * fold_29(a * fold_32(w + a)))        fold_k(x) = x ^ (x >>> k)

with odd, pseudo-random constants a_i. Every step of ``mix`` is a bijection, so a change of a single bit always changes
the sum. Two rounds spread each bit over all others, so that several changes almost never cancel. One round is too few:
two changed signs, in the top bits of two words, would cancel in half of all cases. Integer sums have no rounding, so
every device and every order of addition gives the same bits. The block sums of all tensors are then hashed together
with the tensors' names, dtypes and shapes.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

FORMAT = 1  # part of every fingerprint; increase it when a change of the code makes the same model score differently
FINGERPRINT_BYTES = 16
_BLOCK_WORDS = 1 << 18  # 2 MiB: a block and its constants stay in a CPU's cache


def model_fingerprint(weights: Mapping[str, Any], settings: Mapping[str, Any]) -> bytes:
    """Return the fingerprint, 16 bytes, of named weights and settings.

    The fingerprint depends on each tensor's name, shape, dtype and every bit of its content. It does not depend on the
    order of the names, or on a tensor's device, strides or memory shared with another tensor.

    Args:
        weights: a state dict; values that are not tensors enter by their ``repr``.
        settings: other settings that change the computed numbers: JSON values; other types enter by their ``str``.

    Raises:
        ValueError: if a tensor is on the meta device, where it has no content.
    """
    state = hashlib.blake2b(digest_size=FINGERPRINT_BYTES)
    state.update(json.dumps([FORMAT, settings], sort_keys=True, default=str).encode())
    known: dict[tuple[Any, ...], bytes] = {}  # tied weights are read once
    for name in sorted(weights):
        value = weights[name]
        if not isinstance(value, Tensor):
            state.update(json.dumps([name, repr(value)]).encode())
            continue
        if value.is_meta:
            raise ValueError(
                f"weight {name!r}: expected a tensor with content, got one on the meta device; load the whole model, "
                'or use no cache file (reference_cache="none")'
            )
        memory = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if memory not in known:
            known[memory] = _content(value)
        state.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        state.update(known[memory])
    return state.digest()


@torch.no_grad()
def _content(tensor: Tensor) -> bytes:
    if not tensor.numel():
        return b""
    return torch.stack(list(_block_sums(tensor))).cpu().numpy().astype("<i8").tobytes()


def _block_sums(tensor: Tensor) -> Iterator[Tensor]:
    content = tensor.detach().contiguous().view(-1).view(torch.uint8)
    odd = _odd_numbers(tensor.device)
    for block in content.split(8 * _BLOCK_WORDS):
        count = -(-block.numel() // 8)
        words = torch.zeros(count, dtype=torch.int64, device=tensor.device)  # a copy, aligned and padded to whole words
        words.view(torch.uint8)[: block.numel()].copy_(block)
        factors = odd[:count]
        _fold(words.add_(factors), 32).mul_(factors)
        _fold(words, 29).mul_(factors)
        yield _fold(words, 32).sum()


def _fold(words: Tensor, shift: int) -> Tensor:
    """XOR words with (words >>> shift) in place; the mask clears the sign bits that int64's >> shifts in."""
    return words.bitwise_xor_((words >> shift).bitwise_and_((1 << (64 - shift)) - 1))


@lru_cache(maxsize=1)
def _odd_numbers(device: torch.device) -> Tensor:
    """Return (_BLOCK_WORDS,) int64: the finaliser of SplitMix64 over the positions, made odd."""
    x = torch.arange(1, _BLOCK_WORDS + 1, dtype=torch.int64) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift)) * _signed(factor)
    return ((x ^ (x >> 31)) | 1).to(device)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
