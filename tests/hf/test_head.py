"""Tests of the fused head with packed attention: a pack equals separate forward passes, for common model families."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from efface import DPO, NPO
from efface.batching import StepTotals, TokenStore, pack
from efface.hf.model import head_loss
from efface.hf.model.attention import packed_arguments
from efface.hf.model.head import fuse, head_of, unfuse
from efface.hf.model.head_loss import HeadLoss
from efface.hf.reference.score import store_logprobs
from efface_kernels import SequenceRule, triton_launch
from support.helpers import FAMILIES, VOCABULARY, random_store, sequence, tiny_decoder, tiny_llama, tiny_model


def build(family: str, **changes: Any) -> Any:
    name, settings = FAMILIES[family]
    return tiny_model(name, **{**settings, **changes})


def eager_nll(model: Any, store: TokenStore, indices: list[int]) -> torch.Tensor:
    """Return the summed NLL, one sequence at a time, from the model's own logits."""
    total = torch.zeros(())
    for index in indices:
        ids, labels = sequence(store, index)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        total = total + torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_parameter_gradient_equal_the_eager_model(family: str) -> None:
    model = build(family)
    twin = copy.deepcopy(model)
    store = random_store(5, low=3, high=16)
    expected = eager_nll(twin, store, [0, 1, 2, 3, 4])
    expected.backward()
    fuse(model)
    batch = pack(TokenStore.empty(), store, [], [0, 1, 2, 3, 4])
    # the mean over one label token is the sum
    out = model(batch=batch, loss=HeadLoss(None, StepTotals(retain_tokens=1), chunk_rows=7))
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-5)
    gradients = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.skipif(not (triton_launch.IMPORTABLE and triton_launch.INTERPRETED), reason="needs Triton's interpreter")
def test_every_backend_gets_the_objective_as_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch and Triton give the same loss and gradients. A batch without forget sequences works too."""
    seen, compute = [], head_loss.linear_sequence_loss
    monkeypatch.setattr(head_loss, "linear_sequence_loss", lambda *a, **k: seen.append(type(a[4])) or compute(*a, **k))
    model = fuse(tiny_llama())
    batch = pack(random_store(2, seed=1), random_store(2, seed=2), [0, 1], [0, 1])
    totals = StepTotals(2, 20, 2, 20)
    sums = torch.tensor([-30.0, -40.0, 0.0, 0.0])
    results = []
    for backend in ("torch", "triton"):
        out = model(batch=batch, loss=HeadLoss(NPO(), totals, reference_sums=sums, backend=backend))
        results.append([out.terms, *torch.autograd.grad(out.loss, list(model.parameters()))])
    assert seen == [SequenceRule, SequenceRule]
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    retain = pack(TokenStore.empty(), random_store(2), [], [0, 1])
    for objective in (NPO(), DPO()):
        assert model(batch=retain, loss=HeadLoss(objective, totals, backend="triton")).loss.isfinite()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_depend_on_the_token_budget(family: str) -> None:
    model, store = build(family), random_store(6, low=3, high=16)
    attention = model.config._attn_implementation
    whole, single = store_logprobs(model, store), store_logprobs(model, store, token_budget=1)
    torch.testing.assert_close(whole, single, rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation == attention  # unchanged


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_attention_implementations_are_exact_on_packs(attention: str) -> None:
    model, store = tiny_llama(), random_store(5)
    batch = pack(TokenStore.empty(), store, [], [0, 1, 2, 3, 4])
    expected = fuse(copy.deepcopy(model))(batch=batch)
    got = fuse(model, attention=attention)(batch=batch)
    assert model.config._attn_implementation == attention
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_no_mask_of_all_tokens_squared_is_made() -> None:
    store = random_store(30, low=10, high=20)
    batch = pack(TokenStore.empty(), store, [], list(range(30)))
    model = fuse(tiny_llama())
    arguments = packed_arguments(model, batch)
    assert arguments["attention_mask"].numel() == 0
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch(), torch.no_grad():
        model(batch=batch)
    assert largest < batch.tokens**2


def test_a_fused_model_called_normally_is_unchanged() -> None:
    model = tiny_llama().eval()
    ids = torch.randint(VOCABULARY, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = model(input_ids=ids, attention_mask=mask, labels=ids)
    names = list(model.state_dict())
    fuse(fuse(model))
    got = model(input_ids=ids, attention_mask=mask, labels=ids)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.loss, expected.loss)
    assert list(model.state_dict()) == names
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model).__name__ == "LlamaForCausalLM"
    generated = model.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    unfuse(model)
    assert type(model) is transformers.LlamaForCausalLM
    assert type(model.lm_head) is torch.nn.Linear
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0), generated)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "xglm", "llama"])
def test_fused_models_generate_behind_padding_as_they_did(kind: str) -> None:
    model = tiny_decoder(kind)
    ids = torch.arange(3, 15).reshape(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 95}
    expected = model.generate(ids, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuse(model)
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "mamba"])
def test_unfused_models_have_the_attention_that_they_had(kind: str) -> None:
    model = tiny_decoder(kind)
    before = model.config._attn_implementation
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unfuse(fuse(model))
    assert model.config._attn_implementation == before


def test_fused_models_can_be_copied() -> None:
    model = fuse(tiny_llama())
    batch = pack(TokenStore.empty(), random_store(3), [], [0, 1, 2])
    assert torch.equal(copy.deepcopy(model)(batch=batch), model(batch=batch))


def test_fused_models_can_be_pickled(tmp_path: Path) -> None:
    """As torch.save and spawned processes do."""
    model = fuse(tiny_llama()).eval()
    batch = pack(TokenStore.empty(), random_store(3), [], [0, 1, 2])
    torch.save(model, tmp_path / "model.pt")
    for copied in (pickle.loads(pickle.dumps(model)), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(copied(batch=batch), model(batch=batch))
        assert copied.lm_head.weight is copied.get_input_embeddings().weight
        assert type(unfuse(copied)) is transformers.LlamaForCausalLM


def test_unsupported_heads_are_refused_with_the_reason() -> None:
    model = tiny_llama(tie_word_embeddings=False)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"lm_head: expected a torch.nn.Linear, got .*Sequential"):
        fuse(model)


def test_a_head_that_does_not_give_the_logits_is_refused() -> None:
    """A model that scales its logits in a way unknown to efface."""

    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.5
            return out

    model = Shifted(tiny_llama().config).train()
    with pytest.raises(ValueError, match=r"its logits are not those of its head .* would train another model"):
        fuse(model)
    assert model.training


def test_head_of_reads_bias_and_softcap() -> None:
    assert head_of(build("Phi-1.5, biased head")).bias is not None
    assert head_of(build("Gemma-2, soft-capped head")).softcap == 3.0
