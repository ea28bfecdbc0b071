"""Tests of packed attention in whole models: each family against its own separate forward passes."""

import copy
import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from efface.hf.model.attention import NAME, flash_attn, interface, packed_arguments, torch_varlen
from efface.hf.model.attention.choice import AttentionCall, Installed, choose_kernel
from efface.hf.model.attention.paths import Paths
from efface.hf.model.attention.segments import segment_attention
from efface.hf.model.head import fuse, use_packed_attention
from support.helpers import VOCABULARY, separate, tiny_llama, tiny_model, unlabelled

# Large weights: with the default of 0.02 attention is almost uniform, and a wrong mask has no visible effect.
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
    """Return the logits (T, V) of ``forward`` and each parameter's gradient, in fp64."""
    model.zero_grad(set_to_none=True)
    logits = forward()
    (logits.double() * direction).sum().backward()
    gradients = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    return {"logits": logits.detach().double(), **gradients}


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def check_as_exact(got: dict[str, Tensor], plain: dict[str, Tensor], gold: dict[str, Tensor], eps: float) -> None:
    """Assert rms(got − gold) ≤ 2 · rms(plain − gold) + 4 · eps · rms(gold) for each name."""
    assert got.keys() == gold.keys()
    typical = rms(torch.cat([gradient.flatten() for name, gradient in gold.items() if name != "logits"]))
    for name, truth in gold.items():
        # A key bias shifts all scores of a row equally. Its gradient is zero except for rounding on the scale of other
        # gradients.
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
    """Counts the elements of the largest tensor that any operator returns, and those of all tensors."""

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
    model, batch = build("Mistral, sliding window", hidden_size=64), unlabelled([9, 3, 14, 1, 8])  # flex needs d ≥ 16
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


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="the masks of this version do not support packs")
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
        assert not torch.allclose(blind, truth, rtol=1e-2, atol=1e-2)  # the sequence is longer than the window


# ---- the kernels of packed attention: each against a plain loop, and their selection


def attention_inputs(
    lengths: tuple[int, ...], *, heads: int = 4, key_heads: int = 2, dim: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value in a model's layout: (1, H, T, d), views of (1, T, H, d)."""
    generator = torch.Generator().manual_seed(0)
    states = (torch.randn(1, sum(lengths), h, dim, generator=generator) for h in (heads, key_heads, key_heads))
    query, key, value = (x.to(dtype).transpose(1, 2).requires_grad_() for x in states)
    return query, key, value


def looped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: list[int],
    cu_keys: list[int] | None = None,
    *,
    left: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Compute attention (T, H, d) from its definition, token by token; ``left`` is FlashAttention's left window.

    The last token of a sequence sees the last key, the token before it the key before that, and so on.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(group, dim=1) for states in (key, value))
    rows = []
    borders = zip(itertools.pairwise(cu_seqlens), itertools.pairwise(cu_keys or cu_seqlens), strict=True)
    for (start, end), (start_keys, end_keys) in borders:
        for token in range(start, end):
            last = end_keys - (end - token)
            first = start_keys if left < 0 else max(start_keys, last - left)
            scores = torch.einsum("hd,nhd->hn", query[token], key[first : last + 1])
            scores = scores * (query.shape[2] ** -0.5 if scale is None else scale)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            rows.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), value[first : last + 1]))
    return torch.stack(rows)


LENGTHS = (5, 1, 9, 3)
CU_SEQLENS = [0, 5, 6, 15, 18]
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scaling": 0.7},
    "window": {"sliding_window": 4},
    "window of one token": {"sliding_window": 1},
    "window wider than all": {"sliding_window": 9},
    "soft-capped": {"softcap": 1.5},
    "soft-capped window": {"softcap": 1.5, "sliding_window": 4, "scaling": 0.7},
}


def expected(query: Tensor, key: Tensor, value: Tensor, call: dict[str, Any]) -> Tensor:
    return looped(
        *(states[0].transpose(0, 1) for states in (query, key, value)),
        CU_SEQLENS,
        left=call.get("sliding_window", 0) - 1,
        scale=call.get("scaling"),
        softcap=call.get("softcap", 0.0),
    )[None]


def attend(states: tuple[Tensor, ...], **call: Any) -> Tensor:
    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=torch.int32)
    out, weights = interface.varlen_attention(
        torch.nn.Identity(),
        *states,
        None,
        packed_lengths=interface.PackedLengths(LENGTHS),
        cu_seq_lens_q=cu_seqlens,
        **call,
    )
    assert weights is None
    assert out.is_contiguous()
    return out


def check_call(call: dict[str, Any], **shape: int) -> None:
    """Assert that the output and gradients of ``call`` equal those of the loop."""
    states = attention_inputs(LENGTHS, **shape)
    truth = expected(*states, call)
    got = attend(states, **call)
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(truth.shape, generator=torch.Generator().manual_seed(2))
    for ours, theirs in zip(
        torch.autograd.grad(got, states, upstream), torch.autograd.grad(truth, states, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_segments_equal_the_loop(call: dict[str, Any], heads: tuple[int, int]) -> None:
    check_call(call, heads=heads[0], key_heads=heads[1])


class FakeFlash:
    """``flash_attn_varlen_func`` of flash-attn 2.6 and later, in plain torch."""

    def __init__(self) -> None:
        self.windows: list[tuple[int, int]] = []

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Tensor | None = None,
    ) -> Tensor:
        check_flash_layout(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        assert causal
        assert deterministic
        assert dropout_p == 0.0
        self.windows.append(window_size)
        return looped(q, k, v, cu_seqlens_q.tolist(), left=window_size[0], scale=softmax_scale, softcap=softcap)


def check_flash_layout(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *longest: int) -> None:
    assert q.dim() == k.dim() == v.dim() == 3
    assert q.shape[0] == k.shape[0] == v.shape[0] == sum(LENGTHS)
    assert all(states.stride(-1) == 1 for states in (q, k, v))
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q.tolist() == cu_k.tolist() == CU_SEQLENS
    assert longest == (max(LENGTHS),) * 2


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_flash_attn_is_called_with_its_layout(call: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeFlash()
    monkeypatch.setattr(flash_attn, "load", lambda: fake)
    monkeypatch.setattr(interface, "choose_kernel", lambda *_: "flash_attn")
    check_call(call)
    window = call.get("sliding_window", 9)
    assert fake.windows == [(-1, -1) if window >= 9 else (window - 1, 0)]


PARAMETERS = {
    "2.10": {"is_causal", "return_aux"},
    "2.11": {"return_aux", "scale", "window_size"},
    "2.12": {"return_aux", "scale", "window_size", "enable_gqa"},
}


class FakeVarlen:
    """``varlen_attn`` of a version of torch, with the aten operator of its backward pass, in plain torch."""

    def __init__(self, version: str) -> None:
        self.parameters = PARAMETERS[version]
        self.backwards = 0

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, *longest: int, **options: Any
    ) -> tuple[Tensor, Tensor]:
        assert options.keys() <= self.parameters
        check_flash_layout(query, key, value, cu_q, cu_k, *longest)
        grouped = query.shape[1] != key.shape[1]
        assert options.get("enable_gqa", False) == grouped
        left, right = (-1, 0) if options.get("is_causal") else options["window_size"]
        assert right == 0
        assert options["return_aux"] == "lse"
        out = looped(query, key, value, cu_q.tolist(), left=left, scale=options.get("scale"))
        return out, query.new_zeros(query.shape[1], query.shape[0])

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        longest_q: int,
        longest_k: int,
        dropout: float,
        is_causal: bool,
        rng_state: Tensor,
        unused: Tensor,
        *,
        scale: float | None,
        window_size_left: int,
        window_size_right: int,
    ) -> tuple[Tensor, ...]:
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        check_flash_layout(query, key, value, cu_q, cu_k, longest_q, longest_k)
        assert dropout == 0.0
        assert rng_state.dtype == torch.uint64
        assert is_causal == (window_size_left == -1)
        assert window_size_right == 0
        self.backwards += 1
        with torch.enable_grad():
            states = [states.detach().requires_grad_() for states in (query, key, value)]
            again = looped(*states, cu_q.tolist(), left=window_size_left, scale=scale)
        assert torch.equal(again, out)
        return torch.autograd.grad(again, states, grad_out)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = torch_varlen.Varlen(self.forward, frozenset(self.parameters), "lse")
        monkeypatch.setattr(torch_varlen, "load", lambda: found)
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", self.backward)
        monkeypatch.setattr(interface, "choose_kernel", lambda *_: "torch_varlen")


@pytest.mark.parametrize("version", PARAMETERS)
@pytest.mark.parametrize("name", ["plain", "scaled", "window", "window of one token", "window wider than all"])
def test_torch_varlen_is_called_with_the_arguments_of_each_version(
    name: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version == "2.10" and name in {"scaled", "window", "window of one token"}:
        return  # rejected, see the rows of CHOICES
    fake = FakeVarlen(version)
    fake.install(monkeypatch)
    check_call(CALLS[name])
    assert fake.backwards == 1
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_deterministic_switch_is_put_back_when_the_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVarlen("2.12")
    fake.install(monkeypatch)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", fail)
    out = attend(attention_inputs(LENGTHS))
    with pytest.raises(MemoryError):
        out.sum().backward()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(torch_varlen.load() is None, reason="this torch has no varlen_attn")
@pytest.mark.parametrize("window", [None, 3])
def test_the_installed_torch_takes_the_call(window: int | None) -> None:
    """The meta device computes nothing, but checks names, types and shapes of the installed version."""
    query, key, value = (
        torch.empty(18, h, 8, dtype=torch.bfloat16, device="meta", requires_grad=True) for h in (4, 2, 2)
    )
    cu_seqlens = torch.empty(5, dtype=torch.int32, device="meta")
    out = torch_varlen.torch_varlen_attention(query, key, value, cu_seqlens, 9, scale=8**-0.5, window=window)
    assert out.shape == (18, 4, 8)
    gradients = torch.autograd.grad(out, (query, key, value), torch.empty_like(out))
    assert [gradient.shape for gradient in gradients] == [query.shape, key.shape, value.shape]


@pytest.mark.parametrize("kernel", ["flash_attn", "torch_varlen", "segments"])
def test_every_kernel_serves_a_whole_model(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "choose_kernel", lambda *_: kernel)
    monkeypatch.setattr(flash_attn, "load", lambda: _flash_by_segments)
    found = torch_varlen.Varlen(_varlen_by_segments, frozenset(PARAMETERS["2.12"]), "lse")
    monkeypatch.setattr(torch_varlen, "load", lambda: found)
    model = tiny_llama().eval()
    batch = unlabelled([5, 1, 9])
    with torch.no_grad():
        truth = separate(model, batch)
        use_packed_attention(model)
        got = model(**packed_arguments(model, batch)).logits[0]
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)


def _flash_by_segments(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *_: Any, **__: Any) -> Tensor:
    return looped(query, key, value, cu_seqlens.tolist())


def _varlen_by_segments(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return _flash_by_segments(*args), args[0].new_zeros(1)


# Three segments with eight tokens: the second continues after the third token of the first, and the third after the
# first token of the second.
SEGMENTS, PATHS = (4, 3, 1), ((0, 1, 2, 3), (0, 1, 2, 4, 5, 6), (0, 1, 2, 4, 7))


def paths() -> Paths:
    cu_paths = torch.tensor([0, *itertools.accumulate(map(len, PATHS))], dtype=torch.int32)
    indices = torch.tensor([token for path in PATHS for token in path], dtype=torch.int32)
    return Paths(indices, cu_paths, tuple(map(len, PATHS)), sum(SEGMENTS))


def _flash_of_paths(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *longest: int, **options: Any
) -> Tensor:
    assert longest == (4, 6)
    assert options["causal"]
    cap, left = options["softcap"], options["window_size"][0]
    return looped(q, k, v, cu_q.tolist(), cu_k.tolist(), left=left, scale=options["softmax_scale"], softcap=cap)


def _varlen_of_paths(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *longest: int, **options: Any
) -> tuple[Tensor, Tensor]:
    assert longest == (4, 6)
    left, right = options["window_size"]
    assert right == 0
    return looped(q, k, v, cu_q.tolist(), cu_k.tolist(), left=left, scale=options["scale"]), q.new_zeros(1)


def _varlen_backward_of_paths(grad_out: Tensor, *args: Any, scale: float | None, **windows: int) -> tuple[Tensor, ...]:
    *states, out, _, cu_q, cu_k, longest, longest_keys = args[:9]
    assert (longest, longest_keys) == (4, 6)
    with torch.enable_grad():
        states = [x.detach().requires_grad_() for x in states]
        again = looped(*states, cu_q.tolist(), cu_k.tolist(), left=windows["window_size_left"], scale=scale)
    assert torch.equal(again, out)
    return torch.autograd.grad(again, states, grad_out)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("kernel", ["flash_attn", "torch_varlen", "segments"])
@pytest.mark.parametrize("name", CALLS)
def test_tokens_see_their_path(name: str, kernel: str, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    call = CALLS[name]
    if kernel == "torch_varlen" and "softcap" in call:
        return  # rejected, see the rows of CHOICES
    monkeypatch.setattr(interface, "choose_kernel", lambda *_: kernel)
    monkeypatch.setattr(flash_attn, "load", lambda: _flash_of_paths)
    found = torch_varlen.Varlen(_varlen_of_paths, frozenset(PARAMETERS["2.12"]), "lse")
    monkeypatch.setattr(torch_varlen, "load", lambda: found)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", _varlen_backward_of_paths)
    states = attention_inputs((8,), heads=heads[0], key_heads=heads[1])
    lengths = interface.PackedLengths(SEGMENTS, paths())
    cu_seqlens = torch.tensor([0, *itertools.accumulate(SEGMENTS)], dtype=torch.int32)
    got, _ = interface.varlen_attention(
        torch.nn.Identity(), *states, None, packed_lengths=lengths, cu_seq_lens_q=cu_seqlens, **call
    )
    rows: dict[int, Tensor] = {}  # each path alone
    for path in PATHS:
        q, k, v = (x[0].transpose(0, 1)[list(path)] for x in states)
        left, cap = call.get("sliding_window", 0) - 1, call.get("softcap", 0.0)
        alone = looped(q, k, v, [0, len(path)], left=left, scale=call.get("scaling"), softcap=cap)
        rows.update(zip(path, alone, strict=True))
    truth = torch.stack([rows[token] for token in range(8)])
    torch.testing.assert_close(got[0], truth, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(truth.shape, generator=torch.Generator().manual_seed(2))
    for ours, theirs in zip(
        torch.autograd.grad(got[0], states, upstream), torch.autograd.grad(truth, states, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


H100 = AttentionCall(device="cuda", capability=(9, 0), dtype=torch.bfloat16, head_dim=64, value_dim=64)
OF = {version: frozenset(names) for version, names in PARAMETERS.items()}
BOTH = Installed(flash_attn=True, torch_varlen=OF["2.12"])
CHOICES: dict[str, tuple[AttentionCall, Installed, str]] = {
    "both installed": (H100, BOTH, "flash_attn"),
    "torch alone": (H100, Installed(torch_varlen=OF["2.12"]), "torch_varlen"),
    "flash-attn alone": (H100, Installed(flash_attn=True), "flash_attn"),
    "neither": (H100, Installed(), "segments"),
    "CPU": (replace(H100, device="cpu", capability=(0, 0)), BOTH, "segments"),
    "fp16 on Ampere": (replace(H100, capability=(8, 0), dtype=torch.float16), BOTH, "flash_attn"),
    "Turing": (replace(H100, capability=(7, 5), dtype=torch.float16), BOTH, "segments"),
    "fp32": (replace(H100, dtype=torch.float32), BOTH, "segments"),
    "largest head": (replace(H100, head_dim=256, value_dim=256), BOTH, "flash_attn"),
    "larger head": (replace(H100, head_dim=288, value_dim=288), BOTH, "segments"),
    "narrower values": (replace(H100, value_dim=32), BOTH, "segments"),
    "odd head": (replace(H100, head_dim=20, value_dim=20), BOTH, "flash_attn"),
    "odd head, torch": (replace(H100, head_dim=20, value_dim=20), Installed(torch_varlen=OF["2.12"]), "segments"),
    "soft cap": (replace(H100, softcap=50.0), BOTH, "flash_attn"),
    "soft cap, torch": (replace(H100, softcap=50.0), Installed(torch_varlen=OF["2.12"]), "segments"),
    "dropout": (replace(H100, dropout=0.1), BOTH, "flash_attn"),
    "dropout, torch": (replace(H100, dropout=0.1), Installed(torch_varlen=OF["2.12"]), "segments"),
    "soft cap and dropout": (replace(H100, softcap=50.0, dropout=0.1), BOTH, "segments"),
    "window": (replace(H100, window=128), Installed(torch_varlen=OF["2.11"]), "torch_varlen"),
    "window, torch 2.10": (replace(H100, window=128), Installed(torch_varlen=OF["2.10"]), "segments"),
    "scale": (replace(H100, scale=0.3), Installed(torch_varlen=OF["2.11"]), "torch_varlen"),
    "scale, torch 2.10": (replace(H100, scale=0.3), Installed(torch_varlen=OF["2.10"]), "segments"),
    "default scale, torch 2.10": (replace(H100, scale=0.125), Installed(torch_varlen=OF["2.10"]), "torch_varlen"),
}


@pytest.mark.parametrize(("call", "installed", "kernel"), CHOICES.values(), ids=CHOICES)
def test_choice_of_the_kernel(call: AttentionCall, installed: Installed, kernel: str) -> None:
    assert choose_kernel(call, installed) == kernel


def test_a_flash_attn_that_does_not_load_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol: _ZN3c10")

    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(flash_attn.importlib, "import_module", broken)
    with pytest.warns(UserWarning, match=r"fails to load \(undefined symbol"):
        assert flash_attn.load.__wrapped__() is None
    monkeypatch.setattr(flash_attn.importlib, "import_module", absent)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flash_attn.load.__wrapped__() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "window", "soft-capped"])
def test_a_sequence_does_not_know_its_neighbours_and_repeats_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    call = CALLS[name]
    options = {"window": call.get("sliding_window"), "softcap": call.get("softcap")}
    query, key, value = attention_inputs((40, 70, 33), dtype=dtype)

    def run(rows: slice, lengths: tuple[int, ...]) -> list[Tensor]:
        states = [x.detach()[:, :, rows].requires_grad_() for x in (query, key, value)]
        out = segment_attention(*states, lengths, **options)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), states)]

    whole, again, alone = run(slice(None), (40, 70, 33)), run(slice(None), (40, 70, 33)), run(slice(40, 110), (70,))
    assert all(torch.equal(x, y) for x, y in zip(whole, again, strict=True))
    assert torch.equal(whole[0][:, 40:110], alone[0])
    assert all(torch.equal(x[:, :, 40:110], y) for x, y in zip(whole[1:], alone[1:], strict=True))


def test_autocast_is_honoured_and_leaves_the_sum_in_single_precision() -> None:
    states = attention_inputs(LENGTHS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attend(states)
    assert got.dtype == torch.bfloat16
    rounded = tuple(x.bfloat16().float() for x in states)
    assert torch.equal(got, attend(rounded).bfloat16())


def test_dropout_falls_on_the_weights() -> None:
    states = attention_inputs(LENGTHS)
    for call in ({}, {"softcap": 1.5}):
        torch.manual_seed(0)
        dropped = attend(states, dropout=0.5, **call)
        assert not torch.allclose(dropped, attend(states, **call))
        assert attend(states, dropout=1.0, **call).abs().max() == 0


def test_errors_name_what_was_expected() -> None:
    states = attention_inputs(LENGTHS)
    with pytest.raises(ValueError, match="expected no s_aux, got one from Identity; use the model's own"):
        attend(states, s_aux=torch.zeros(4))
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expected one row of 5 tokens, .* got query of shape \(1, 4, 18, 8\)"):
        interface.varlen_attention(
            torch.nn.Identity(), *states, None, packed_lengths=interface.PackedLengths((5,)), cu_seq_lens_q=cu_seqlens
        )
    with pytest.raises(ValueError, match=r"cu_seq_lens_q of shape None; call with packed_arguments"):
        interface.varlen_attention(torch.nn.Identity(), *states, None, packed_lengths=interface.PackedLengths(LENGTHS))


def test_kernels_that_are_not_there_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [torch.zeros(2, 1, 8)] * 3
    cu_seqlens = torch.tensor([0, 2], dtype=torch.int32)
    monkeypatch.setattr(flash_attn, "load", lambda: None)
    monkeypatch.setattr(torch_varlen, "load", lambda: None)
    with pytest.raises(RuntimeError, match="expected the flash-attn package"):
        flash_attn.flash_attention(*states, cu_seqlens, 2)
    with pytest.raises(RuntimeError, match=r"expected torch 2.10 or later, got"):
        torch_varlen.torch_varlen_attention(*states, cu_seqlens, 2)
