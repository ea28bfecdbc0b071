"""Packed attention in whole models: each family against its own separate forward passes."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from efface.hf.model.attention import NAME, packed_arguments
from efface.hf.model.head import fuse, use_packed_attention
from support.helpers import VOCABULARY, separate, tiny_model, unlabelled

# Large weights: with the default of 0.02 attention is all but uniform, and a wrong mask goes unseen.
WEIGHTS = 0.3
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {}),
    "Phi, partial rotary": ("PhiConfig", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "Qwen2, biased": ("Qwen2Config", {}),
    "Qwen3, normed heads": ("Qwen3Config", {"head_dim": 8}),
    "Mistral, sliding window": ("MistralConfig", {"sliding_window": 5}),
    "GPT-NeoX": ("GPTNeoXConfig", {"num_key_value_heads": 4, "hidden_act": "gelu"}),
    "OLMo-2": ("Olmo2Config", {}),
    "Granite, scaled": ("GraniteConfig", {"attention_multiplier": 0.3, "logits_scaling": 8.0}),
    "Gemma-2": (
        "Gemma2Config",
        {"head_dim": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "sliding_window": 6},
    ),
}
PACKS: dict[str, list[int]] = {
    "one sequence": [13],
    "one-token sequences": [1, 7, 1, 1],
    "equal lengths": [6, 6, 6],
    "longer than the window, and as long": [17, 5, 6],
}


def build(family: str, **changes: Any) -> Any:
    name, settings = FAMILIES[family]
    return tiny_model(name, **{"initializer_range": WEIGHTS, **settings, **changes})


def results(model: Any, direction: Tensor, forward: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The logits (T, V) of ``forward`` and each parameter's gradient, in fp64."""
    model.zero_grad(set_to_none=True)
    logits = forward()
    (logits.double() * direction).sum().backward()
    gradients = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    return {"logits": logits.detach().double(), **gradients}


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def check_as_exact(got: dict[str, Tensor], plain: dict[str, Tensor], gold: dict[str, Tensor], eps: float) -> None:
    """rms(got − gold) ≤ 2 · rms(plain − gold) + 4 · eps · rms(gold), by name."""
    assert got.keys() == gold.keys()
    typical = rms(torch.cat([gradient.flatten() for name, gradient in gold.items() if name != "logits"]))
    for name, truth in gold.items():
        # A key bias moves all scores of a row alike: its gradient is zero but for rounding, which has others' scale.
        scale = rms(truth) if name == "logits" else max(rms(truth), typical)
        assert rms(got[name] - truth) <= 2 * rms(plain[name] - truth) + 4 * eps * scale, name


def check_family(family: str, lengths: list[int], dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    model, batch = build(family, **changes).to(dtype), unlabelled(lengths)
    direction = torch.randn(batch.tokens, VOCABULARY, generator=torch.Generator().manual_seed(1)).double()
    truth = copy.deepcopy(model).double()
    gold = results(truth, direction, lambda: separate(truth, batch))
    plain = results(model, direction, lambda: separate(model, batch))
    use_packed_attention(model)
    assert model.config._attn_implementation == NAME
    got = results(model, direction, lambda: model(**packed_arguments(model, batch)).logits[0])
    check_as_exact(got, plain, gold, torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_of_a_pack_equal_separate_forwards(family: str, dtype: torch.dtype) -> None:
    check_family(family, [9, 3, 14, 1, 8], dtype)


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("family", ["Mistral, sliding window", "Gemma-2"])
def test_odd_packs(family: str, lengths: list[int]) -> None:
    check_family(family, lengths)


def test_150_sequences() -> None:
    check_family("Mistral, sliding window", np.random.default_rng(0).integers(1, 12, 150).tolist(), num_hidden_layers=1)


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operator makes, and those of all."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.total += tensor.numel()
        return out


@pytest.mark.parametrize("family", ["Llama", "Mistral, sliding window", "Gemma-2"])
def test_memory_and_work_are_linear_in_the_number_of_sequences(family: str) -> None:
    model = build(family)
    use_packed_attention(model)

    def count(sequences: int) -> tuple[int, int]:
        batch = unlabelled([16] * sequences)
        with Largest() as counter:
            model(**packed_arguments(model, batch)).logits.sum().backward()
        return counter.largest, counter.total

    (largest, total), (largest_twice, total_twice) = count(20), count(40)
    assert largest_twice <= 2 * largest < (20 * 16) ** 2
    assert total_twice <= 2 * total


@pytest.mark.parametrize("attention", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_other_implementations_stay_selectable(attention: str) -> None:
    model, batch = build("Mistral, sliding window", hidden_size=64), unlabelled([9, 3, 14, 1, 8])  # flex: d ≥ 16
    with torch.no_grad():  # flex_attention has no backward pass on CPUs
        truth = fuse(model)(**packed_arguments(model, batch)).logits
        fuse(model, attention=attention)
        assert model.config._attn_implementation == attention
        got = model(**packed_arguments(model, batch)).logits
    torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-4)


def test_ordinary_batches_of_a_soft_capped_model_are_its_eager_ones() -> None:
    model = build("Gemma-2")
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        truth = [model(ids).logits, model(ids, attention_mask=mask).logits[mask.bool()]]
        generated = model.generate(ids[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
        use_packed_attention(model)
        got = [model(ids).logits, model(ids, attention_mask=mask).logits[mask.bool()]]
    torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=6, do_sample=False, pad_token_id=0), generated)


def test_gradient_checkpointing_changes_nothing() -> None:
    model, batch = build("Gemma-2").train(), unlabelled([9, 3, 8])
    use_packed_attention(model)
    direction = torch.randn(batch.tokens, VOCABULARY).double()

    def run() -> dict[str, Tensor]:
        return results(model, direction, lambda: model(**packed_arguments(model, batch)).logits[0])

    plain = run()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = run()
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="their masks know no packs there")
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("PhimoeConfig", {"num_local_experts": 2}),
        ("Qwen2MoeConfig", {"use_sliding_window": True, "max_window_layers": 2, "num_experts": 4}),
    ],
)
def test_a_window_that_only_the_mask_has_is_kept(name: str, settings: dict[str, Any]) -> None:
    model = tiny_model(name, initializer_range=WEIGHTS, sliding_window=3, **settings).eval()
    batch = unlabelled([9, 3, 14])
    use_packed_attention(model)
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        got, truth = model(**packed_arguments(model, batch)).logits[0], separate(model, batch)
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-4)
        model.set_attn_implementation(NAME)
        blind = model(**packed_arguments(model, batch)).logits[0]
        assert not torch.allclose(blind, truth, rtol=1e-2, atol=1e-2)  # the tokens do lie beyond the window
