"""Small models taught where none can be downloaded: tokenizers, families, and a cache of taught models."""

import hashlib
import importlib.metadata
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)

from efface.files import remove_leftovers, take_lock, written_folder
from efface.hf.text.token_cache import TAUGHT, cache_folder, file_digest
from efface.hf.train.arguments import UnlearnArguments
from efface.hf.train.trainer import FinetuneTrainer, PackedTrainer


def train_tokenizer(
    texts: Iterable[str],
    vocabulary: int,
    *,
    begin: str = "",
    end: str = "<|endoftext|>",
    special: Sequence[str] = (),
    phrases: Sequence[str] = (),
    **options: Any,
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most ``vocabulary`` tokens; ``end`` ends and pads sequences.

    ``begin``, ``special`` and ``phrases`` are those of ``Architecture``, and options of ``PreTrainedTokenizerFast``.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*filter(None, [begin]), end, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A",
            pair=f"{begin} $A {begin} $B",
            special_tokens=[(begin, tokenizer.token_to_id(begin))],
        )
        options["bos_token"] = begin
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end, **options)


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
    """Of a small model."""

    hidden: int = 192
    layers: int = 4
    heads: int = 4
    vocabulary: int = 4096


@dataclass(frozen=True)
class Architecture:
    """What makes a family's models and prompts what they are."""

    template: str  # of `efface.hf.text.templates`
    model_type: str  # of transformers
    positions: int  # of its published models; rotary embeddings cost none of them
    width: Callable[[int], int]  # of the feed-forward layers, from that of the hidden states
    options: Mapping[str, Any]  # what else its configuration says
    group: int = 1  # query heads that share a key-value head
    begin: str = ""  # token that begins every text; empty for none
    end: str = "<|endoftext|>"  # token that ends every answer
    pads: bool = True  # whether the configuration names a padding token, whose embedding begins at zero
    special: tuple[str, ...] = ()  # other tokens of the family's prompts
    phrases: tuple[str, ...] = ()  # of every prompt, a token each
    chat_template: str | None = None  # of the tokenizer


def _four_times(hidden: int) -> int:
    return hidden * 4


def _gated(hidden: int) -> int:
    """Two thirds of four times, of three matrices and not two; in whole blocks of 32."""
    return hidden * 8 // 3 // 32 * 32


# Made by the demo: a plain Llama, prompted without anything but question and answer.
PLAIN = Architecture("question-answer", "llama", 512, _gated, {"tie_word_embeddings": True}, pads=False)
ARCHITECTURES = {
    # Llama-3.2: head and embeddings tied, grouped-query attention, scaled rotary embeddings of a long period.
    "llama-3": Architecture(
        "llama-3",
        "llama",
        131_072,
        _four_times,
        {
            "tie_word_embeddings": True,
            "rope_theta": 500_000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "rms_norm_eps": 1e-5,
        },
        group=4,
        begin="<|begin_of_text|>",
        end="<|eot_id|>",
        special=("<|start_header_id|>", "<|end_header_id|>"),
        phrases=(_LLAMA_3_OPENING,),
        chat_template=_LLAMA_3_CHAT,
    ),
    # Llama-2: a head of its own, as many key-value heads as heads.
    "llama-2": Architecture(
        "llama-2", "llama", 4096, _gated, {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}, begin="<s>", end="</s>"
    ),
    # Phi-1.5: biases everywhere, in the head too; half of each head's dimensions are rotated.
    "phi": Architecture(
        "phi",
        "phi",
        2048,
        _four_times,
        {
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": False,
            "hidden_act": "gelu_new",
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
    ),
}


def tokenizer_of(architecture: Architecture, texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of at most ``vocabulary`` tokens, trained on the texts.

    Every family gets byte-level BPE, Llama-2 too, whose own tokenizer is SentencePiece: what its prompts look like and
    where a text begins and ends are the family's.
    """
    of_the_family = {name: getattr(architecture, name) for name in ("begin", "end", "special", "phrases")}
    made = train_tokenizer(texts, vocabulary, **of_the_family, model_max_length=architecture.positions)
    made.chat_template = architecture.chat_template
    return made


def model_of(
    architecture: Architecture, tokenizer: PreTrainedTokenizerFast, size: Size, *, seed: int
) -> PreTrainedModel:
    """Return a new model with weights drawn by the seed."""
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    config = AutoConfig.for_model(
        architecture.model_type,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=max(1, size.heads // architecture.group),
        intermediate_size=architecture.width(size.hidden),
        max_position_embeddings=architecture.positions,
        vocab_size=len(tokenizer),
        bos_token_id=begin,
        eos_token_id=tokenizer.eos_token_id,
        **({"pad_token_id": tokenizer.pad_token_id} if architecture.pads else {}),
        **architecture.options,
    )
    set_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def quiet_arguments(folder: str | Path, template: str, **settings: Any) -> UnlearnArguments:
    """Return the arguments of a training that says and writes nothing meanwhile, at ``settings`` of steps and rate."""
    return UnlearnArguments(
        output_dir=str(folder),
        template=template,
        warmup_steps=10,
        weight_decay=0.01,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **settings,
    )


def teach(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Mapping[str, Any]],
    args: UnlearnArguments,
    folder: Path,
    callbacks: Sequence[TrainerCallback],
) -> PackedTrainer:
    """Teach a model the rows, write it and its tokenizer into a folder, and return what taught it."""
    trainer = FinetuneTrainer(model, args, data=list(rows), processing_class=tokenizer, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return trainer


FORMAT = 2  # part of every key: raise it when the same settings make another model
RECORD = "taught.json"
_LEFT_BEHIND = 86_400  # seconds after which a half-taught model is nobody's: teaching takes minutes


@dataclass(frozen=True)
class Teaching:
    """How a model is taught. The rates suit models of a few million parameters that begin with random weights."""

    steps: int = 1000
    batch: int = 4
    learning_rate: float = 2e-3
    seed: int = 0


def taught(
    rows: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
    *,
    template: str,
    size: Size,
    teaching: Teaching,
    callbacks: Sequence[TrainerCallback] = (),
    cache_dir: str | Path | None = None,
) -> Path:
    """Return the folder of a small model and its tokenizer that was taught the rows.

    It lies in ``tiny/`` of the cache under a name that says what made it, so another run, recipe or objective with the
    same rows and settings finds it there. It is moved there whole: a killed process leaves none, and of two at once one
    is kept. One of which a byte is not as it was written is taught anew.

    Args:
        rows: with ``question`` and ``answer``.
        texts: what the tokenizer is trained on; more than the rows, so that models to be compared share it.
        template: a name in ``ARCHITECTURES``: the family, and how its prompts are written.
        size: of the model.
        teaching: how.
        callbacks: of the trainer.
        cache_dir: see ``efface.hf.text.token_cache.cache_folder``.
    """
    made_of = {
        "format": FORMAT,
        "template": template,
        "size": asdict(size),
        "teaching": asdict(teaching),
        "rows": digest([[row["question"], row["answer"]] for row in rows]),
        "texts": digest(list(texts)),
        "efface": importlib.metadata.version("efface"),
        "transformers": transformers.__version__,
    }
    folder = cache_folder(cache_dir) / TAUGHT / digest(made_of)
    if _whole(folder):
        return _in_use(folder)
    remove_leftovers(folder.parent, seconds=_LEFT_BEHIND)
    architecture = ARCHITECTURES[template]
    tokenizer = tokenizer_of(architecture, texts, size.vocabulary)
    with written_folder(folder, keeps=_whole, private=True) as partial:
        model = model_of(architecture, tokenizer, size, seed=teaching.seed)
        args = quiet_arguments(
            partial,
            architecture.template,
            max_steps=teaching.steps,
            pairs_per_step=teaching.batch,
            learning_rate=teaching.learning_rate,
            lr_scheduler_type="cosine",
            adam_beta2=0.99,  # with 0.999 the first steps of random weights weigh too long
            seed=teaching.seed,
        )
        teach(model, tokenizer, rows, args, partial, callbacks)
        record = {**made_of, "files": _file_digests(partial)}
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return _in_use(folder)


_locks: dict[Path, int] = {}  # of taught models that this process uses: `efface cache purge` leaves them alone


def _in_use(folder: Path) -> Path:
    """Hold the lock of a taught model, shared with other processes, until this one ends; return the folder."""
    with suppress(OSError, ImportError):  # without locks
        if folder not in _locks and (handle := take_lock(folder, shared=True)) is not None:
            _locks[folder] = handle
    return folder


def _whole(folder: Path) -> bool:
    """Whether a folder holds a taught model as it was written; one that does not is warned about, if it is there."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:  # not JSON, or not text
        record = {}
    files = record.pop("files", None) if isinstance(record, dict) else None
    if isinstance(files, dict) and digest(record) == folder.name and files.items() <= _file_digests(folder).items():
        return True
    warnings.warn(f"taught model {str(folder)!r} is damaged; it is taught anew", stacklevel=3)
    return False


def _file_digests(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != RECORD}


def digest(value: Any) -> str:
    """Return what tells JSON values apart."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
