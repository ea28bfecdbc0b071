"""Inputs of the step suite: models with random weights, and the pairs of its steps, packed and padded."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.harness.report import processor
from benchmarks.harness.shared import LLAMA, LLAMA_MID, LLAMA_SMOKE
from benchmarks.step.data import Stores, chat_stores, stores
from efface import DPO, NPO, Objective
from efface.batching import Assembler, EpochPlanner, PackedBatch, Role, StepTotals, TokenStore
from efface.hf.model.lora import add_lora
from efface.hf.reference.score import packed_logprobs

OBJECTIVE = NPO(beta=0.1, alpha=1.0)


@dataclass(frozen=True)
class StepShape:
    """A model, an objective, and the pairs of a step. Rounds cycle through ``steps`` different steps."""

    dtype: torch.dtype
    config: Mapping[str, Any]
    pairs: int = 8
    steps: int = 8
    checkpointing: bool = False  # gradient checkpointing of every layer
    chat: bool = False  # rows in Llama-3's chat template
    objective: Objective = OBJECTIVE

    def llama(self) -> LlamaConfig:
        settings: dict[str, Any] = {**LLAMA, **self.config}
        return LlamaConfig(**settings)

    def stores(self) -> Stores:
        """Return the rows as tokens of the model's vocabulary."""
        vocabulary = self.llama().vocab_size
        if self.chat:
            return chat_stores(vocabulary, alternates=self.objective.forget_data == "both")
        return Stores(*stores(vocabulary))


_GPU, _CHAT, _DPO = "GPU: ", "Llama-3's template: ", "DPO with Llama-3's template: "
_MID = "Llama 8 layers, d 512, V 32000"
CHECKED_ON_GPU = "GPU: check"
SHAPES = {
    "smoke": StepShape(torch.float32, LLAMA_SMOKE, pairs=2, steps=2),
    "smoke, chat": StepShape(torch.float32, LLAMA_SMOKE, pairs=2, steps=2, chat=True),
    "smoke, DPO": StepShape(
        torch.float32, LLAMA_SMOKE, pairs=2, steps=2, chat=True, objective=DPO(beta=0.1, alpha=1.0)
    ),
    **{
        f"{name}{_MID}, {said}": StepShape(dtype, LLAMA_MID, chat=bool(name), objective=objective)
        for name, objective in (("", OBJECTIVE), (_CHAT, OBJECTIVE), (_DPO, DPO(beta=0.1, alpha=1.0)))
        for said, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    },
    # Used for the check only: the larger models leave no memory for a copy in fp32.
    CHECKED_ON_GPU: StepShape(torch.bfloat16, {**LLAMA_MID, "num_hidden_layers": 4}, steps=2, checkpointing=True),
    "GPU: Llama-3.2-1B, bf16": StepShape(
        torch.bfloat16,
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
        checkpointing=True,
    ),
    "GPU: Llama-2-7B, bf16": StepShape(
        torch.bfloat16,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        checkpointing=True,
    ),
}


def timed_on(device: str) -> list[str]:
    """Return the default shapes: on a CPU without bf16 instructions, which emulates them, those in fp32."""
    own = [name for name in SHAPES if name.startswith(_GPU) == (device == "cuda")]
    own = [name for name in own if not name.startswith("smoke") and name != CHECKED_ON_GPU]
    dtype = torch.bfloat16 if device == "cuda" or multiplies_bf16() else torch.float32
    return [name for name in own if SHAPES[name].dtype == dtype]


def multiplies_bf16() -> bool:
    """Return whether the CPU has instructions for bf16 matrix products; an unknown CPU counts as one that has."""
    known = processor()
    flags = set(f"{known.get('flags', '')} {known.get('Features', '')}".split())
    return not flags or bool(flags & {"avx512_bf16", "amx_bf16", "bf16", "i8mm"})


def make_model(shape: StepShape, device: str, seed: int, *, lora: bool = False) -> Any:
    """Return a Llama with random weights, created on the device in its own dtype, so that a 7B takes seconds.

    With ``lora``, the model is a ``peft.PeftModel`` with nonzero adapters, so that the policy differs from its base, as
    it does after a step.
    """
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(device):
            model: Any = LlamaForCausalLM(shape.llama())
    finally:
        torch.set_default_dtype(before)
    model.set_attn_implementation("sdpa")
    if lora:
        model = add_lora(model, r=8)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.02)
    if shape.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def reference_seed(*, lora: bool) -> int:
    """Return the seed of the reference model; the policy's seed is 0.

    LoRA's reference is its base. In full training it is another model, so that the log-ratio of policy and reference is
    not zero and the check covers it.
    """
    return 0 if lora else 1


def wider(model: Any, dtype: torch.dtype) -> Any:
    """Return a copy in another dtype."""
    return nn.Module.to(copy.deepcopy(model), dtype)


@dataclass(frozen=True)
class PaddedBatch:
    """Sequences of one role, padded on the right to the longest of them: (B, T) each."""

    input_ids: Tensor
    labels: Tensor  # -100 on prompts and padding
    attention_mask: Tensor
    reference_sums: Tensor  # (B,) the reference's log-probabilities; 0 for retain sequences

    def to(self, device: torch.device) -> "PaddedBatch":
        return PaddedBatch(*(getattr(self, each.name).to(device) for each in fields(self)))


@dataclass(frozen=True)
class Step:
    """The pairs of one step, packed and padded. They are assembled before the timing."""

    objective: Objective
    totals: StepTotals
    batch: PackedBatch  # every sequence whole
    shared: PackedBatch  # beginnings that sequences share once
    reference_sums: Tensor  # (S,) as ``CachedReference.sums`` returns them to the trainer; 0 for retain sequences
    forget: PaddedBatch
    retain: PaddedBatch
    alternate: PaddedBatch | None = None

    @property
    def padded_tokens(self) -> int:
        """Tokens that the padded forward passes of the policy read. The packed one reads ``batch.tokens``."""
        parts = (self.forget, self.retain, self.alternate)
        return sum(part.input_ids.numel() for part in parts if part is not None)


def padded(store: TokenStore, index: list[int], sums: Tensor | None = None) -> PaddedBatch:
    """Collate sequences as open-unlearning does; ``sums`` has a value for every sequence of the store."""
    ids = [torch.from_numpy(store[i].astype(np.int64)) for i in index]
    labels = [row.clone() for row in ids]
    for row, start in zip(labels, store.label_starts[index].tolist(), strict=True):
        row[:start] = -100
    return PaddedBatch(
        pad_sequence(ids, batch_first=True, padding_value=0),
        pad_sequence(labels, batch_first=True, padding_value=-100),
        pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_value=0),
        torch.zeros(len(index)) if sums is None else sums[index],
    )


def assembled(data: Stores, *, pairs: int, share: bool) -> Assembler:
    """Return the trainer's steps with seed 0, each in one micro-batch, whose assembler also has their plan."""
    planner = EpochPlanner(data.all, share=share, last_tokens=False, pairs_per_step=pairs, token_budget=8192, seed=0)
    return Assembler(planner.plan(0), data.all, ahead=0, **planner.packing)


def make_steps(
    data: Stores, reference: PreTrainedModel, *, pairs: int, count: int, objective: Objective = OBJECTIVE
) -> list[Step]:
    """Return the trainer's first ``count`` steps with seed 0, on the reference's device."""
    device = reference.device
    whole, once = (assembled(data, pairs=pairs, share=share) for share in (False, True))
    used = np.unique(np.concatenate([whole.plan.pairs(number)[0] for number in range(count)]))
    sums = {Role.FORGET: _sums(reference, data.forget, used)}
    if data.alternate is not None:
        sums[Role.ALTERNATE] = _sums(reference, data.alternate, used)
    steps = []
    for number in range(count):
        (batch,), (shared,) = whole[number].batches, once[number].batches
        assert torch.equal(batch.sequences, shared.sequences)
        forget, retain = (index.tolist() for index in whole.plan.pairs(number))
        alternate = None
        if data.alternate is not None:
            alternate = padded(data.alternate, forget, sums[Role.ALTERNATE]).to(device)
        steps.append(
            Step(
                objective,
                whole.totals(number),
                batch.to(device),
                shared.to(device),
                _reference_sums(sums, batch).to(device),
                padded(data.forget, forget, sums[Role.FORGET]).to(device),
                padded(data.retain, retain).to(device),
                alternate,
            )
        )
    return steps


def _sums(reference: PreTrainedModel, store: TokenStore, used: NDArray[np.int64]) -> Tensor:
    """Return (len(store),) log-probabilities of the sequences ``used``, and NaN for the others."""
    sums = torch.full((len(store),), torch.nan)
    for sequences, part in packed_logprobs(reference, store, used):
        sums[torch.from_numpy(sequences)] = part.to(sums.dtype)
    return sums


def _reference_sums(sums: Mapping[Role, Tensor], batch: PackedBatch) -> Tensor:
    """Return (S,): the sum of each sequence of the batch, 0 for those of a role without a reference."""
    own = sums[Role.FORGET].new_zeros(len(batch.lengths))
    for role, values in sums.items():
        chosen = batch.roles == role
        own[chosen] = values[batch.sequences[chosen]]
    return own
