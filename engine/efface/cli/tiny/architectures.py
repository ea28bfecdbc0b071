"""Small models of the recipes' architectures, with tokenizers that write their prompts."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    set_seed,
)

# What opens every prompt of TOFU's Llama-3 models. As one token, or a third of what they read would be this.
_LLAMA_3_OPENING = "Cutting Knowledge Date: December 2023\nToday Date: 10 Apr 2025\n\nYou are a helpful assistant."
# Llama-3's turns: the system's opens with two dates, of which a template sets the second.
_LLAMA_3_CHAT = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: ' }}"
    "{{ date_string | default('26 Jul 2024') }}"
    "{{ '\n\n' + system + '<|eot_id|>' }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """Of a tiny model."""

    hidden: int = 192
    layers: int = 4
    heads: int = 4
    vocabulary: int = 4096

    def common(self) -> dict[str, Any]:
        """Return what every configuration names alike."""
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
        }


@dataclass(frozen=True)
class Architecture:
    """What makes a family's models and prompts what they are.

    Attributes:
        template: of ``efface.hf.templates``.
        begin: token that begins every text; empty for none.
        end: token that ends every answer.
        positions: of its published models; rotary embeddings cost none of them.
        special: other tokens of the family's prompts.
        phrases: of every prompt, a token each.
        chat_template: of the tokenizer; empty for none.
        config: from a size and the arguments that name the vocabulary.
    """

    template: str
    begin: str
    end: str
    positions: int
    special: tuple[str, ...]
    phrases: tuple[str, ...]
    chat_template: str
    config: Callable[..., Any]


def _llama_3(size: Size, **vocabulary: Any) -> Any:
    """Llama-3.2: head and embeddings tied, grouped-query attention, scaled rotary embeddings of a long period."""
    return AutoConfig.for_model(
        "llama",
        **size.common(),
        **vocabulary,
        intermediate_size=size.hidden * 4,
        num_key_value_heads=max(1, size.heads // 4),
        tie_word_embeddings=True,
        rope_theta=500_000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        rms_norm_eps=1e-5,
    )


def _llama_2(size: Size, **vocabulary: Any) -> Any:
    """Llama-2: a head of its own, as many key-value heads as heads."""
    return AutoConfig.for_model(
        "llama",
        **size.common(),
        **vocabulary,
        intermediate_size=size.hidden * 8 // 3 // 32 * 32,
        num_key_value_heads=size.heads,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
    )


def _phi(size: Size, **vocabulary: Any) -> Any:
    """Phi-1.5: biases everywhere, in the head too; half of each head's dimensions are rotated."""
    return AutoConfig.for_model(
        "phi",
        **size.common(),
        **vocabulary,
        intermediate_size=size.hidden * 4,
        num_key_value_heads=size.heads,
        partial_rotary_factor=0.5,
        tie_word_embeddings=False,
        hidden_act="gelu_new",
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )


ARCHITECTURES = {
    "llama-3": Architecture(
        "llama-3",
        begin="<|begin_of_text|>",
        end="<|eot_id|>",
        positions=131_072,
        special=("<|start_header_id|>", "<|end_header_id|>"),
        phrases=(_LLAMA_3_OPENING,),
        chat_template=_LLAMA_3_CHAT,
        config=_llama_3,
    ),
    "llama-2": Architecture("llama-2", "<s>", "</s>", 4096, (), (), "", _llama_2),
    "phi": Architecture("phi", "", "<|endoftext|>", 2048, (), (), "", _phi),
}


def tokenizer_of(architecture: Architecture, texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most ``vocabulary`` tokens, trained on the texts.

    Every family gets byte-level BPE, Llama-2 too, whose own tokenizer is SentencePiece: what its prompts look like and
    where a text begins and ends are the family's.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [*filter(None, [architecture.begin]), architecture.end, *architecture.special]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in architecture.phrases])
    options: dict[str, Any] = {"eos_token": architecture.end, "pad_token": architecture.end}
    if architecture.begin:
        begin = architecture.begin
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A",
            pair=f"{begin} $A {begin} $B",
            special_tokens=[(begin, tokenizer.token_to_id(begin))],
        )
        options["bos_token"] = begin
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=architecture.positions, **options)
    if architecture.chat_template:
        made.chat_template = architecture.chat_template
    return made


def model_of(
    architecture: Architecture, tokenizer: PreTrainedTokenizerFast, size: Size, *, seed: int
) -> PreTrainedModel:
    """Return a new model with weights drawn by the seed."""
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    config = architecture.config(
        size,
        vocab_size=len(tokenizer),
        max_position_embeddings=architecture.positions,
        bos_token_id=begin,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model
