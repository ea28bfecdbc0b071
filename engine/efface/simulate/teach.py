"""Small models trained from scratch: tokenizers, architectures, and a cache of trained models."""

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
from efface.hf.text.token_cache import TAUGHT, file_digest, own_folder
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
    """Train a byte-level BPE tokenizer on texts.

    Args:
        texts: the texts.
        vocabulary: most tokens, without ``phrases``.
        begin: token that begins every text; empty for none.
        end: token that ends every answer, also used for padding.
        special: other special tokens.
        phrases: texts that become one token each.
        options: arguments of ``PreTrainedTokenizerFast``.
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


# The start of every prompt of TOFU's Llama-3 models. It is one token; otherwise it would be a third of all tokens.
_LLAMA_3_OPENING = "Cutting Knowledge Date: December 2023\nToday Date: 10 Apr 2025\n\nYou are a helpful assistant."
# Llama-3's chat template. The system turn starts with two dates; ``date_string`` sets the second.
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
    """The size of a small model."""

    hidden: int = 192
    layers: int = 4
    heads: int = 4
    vocabulary: int = 4096


@dataclass(frozen=True)
class Architecture:
    """The architecture and the prompt format of a family of models."""

    template: str  # name in `efface.hf.text.templates`
    model_type: str  # name in transformers
    positions: int  # context length of the published models; rotary embeddings need no parameters for it
    width: Callable[[int], int]  # hidden size -> width of the feed-forward layers
    options: Mapping[str, Any]  # other values of the configuration
    group: int = 1  # query heads that share a key-value head
    begin: str = ""  # token that begins every text; empty for none
    end: str = "<|endoftext|>"  # token that ends every answer
    pads: bool = True  # whether the configuration has a padding token, whose initial embedding is zero
    special: tuple[str, ...] = ()  # other special tokens of the prompts
    phrases: tuple[str, ...] = ()  # texts in every prompt that are one token each
    chat_template: str | None = None  # chat template of the tokenizer


def _four_times(hidden: int) -> int:
    return hidden * 4


def _gated(hidden: int) -> int:
    """Return 8/3 of the hidden size, rounded down to a multiple of 32.

    A gated layer has three matrices instead of two, so two thirds of the usual width of 4 x hidden.
    """
    return hidden * 8 // 3 // 32 * 32


# The model of the demo: a plain Llama with plain question-answer prompts.
PLAIN = Architecture("question-answer", "llama", 512, _gated, {"tie_word_embeddings": True}, pads=False)
ARCHITECTURES = {
    # Llama-3.2: tied head, grouped-query attention, scaled rotary embeddings with a large base.
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
    # Llama-2: untied head, multi-head attention with as many key-value heads as query heads.
    "llama-2": Architecture(
        "llama-2", "llama", 4096, _gated, {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}, begin="<s>", end="</s>"
    ),
    # Phi-1.5: biases in all layers and the head; half of each attention head's dimensions are rotated.
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
    """Train a tokenizer of at most ``vocabulary`` tokens for an architecture.

    Every architecture gets byte-level BPE with its own prompt format and its own begin and end tokens. This includes
    Llama-2, whose original tokenizer is SentencePiece.
    """
    of_the_family = {name: getattr(architecture, name) for name in ("begin", "end", "special", "phrases")}
    made = train_tokenizer(texts, vocabulary, **of_the_family, model_max_length=architecture.positions)
    made.chat_template = architecture.chat_template
    return made


def model_of(
    architecture: Architecture, tokenizer: PreTrainedTokenizerFast, size: Size, *, seed: int
) -> PreTrainedModel:
    """Return a new model with random weights that depend on the seed."""
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
    """Return arguments of a training that prints nothing and saves no checkpoints.

    ``settings`` are other arguments, such as those of steps and learning rate.
    """
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
    """Train a model on the rows, save it and its tokenizer into a folder, and return the trainer."""
    trainer = FinetuneTrainer(model, args, data=list(rows), processing_class=tokenizer, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return trainer


FORMAT = 2  # part of every cache key; increase it when the same settings give another model
RECORD = "taught.json"
_LEFTOVER_SECONDS = 86_400  # age of a partial model from which it belongs to a killed process: training takes minutes


@dataclass(frozen=True)
class Teaching:
    """Training settings. The defaults suit models of a few million parameters with random initial weights."""

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
    """Return the folder of a small model that was trained on the rows, with its tokenizer.

    The folder is in ``tiny/`` of the cache, and its name is a digest of the rows and all settings. Another run, recipe
    or objective with the same rows and settings reuses the model. A new model is moved there with an atomic rename, so
    a killed process leaves no partial model, and if two processes train the same model, one copy is kept. A model with
    a changed byte is trained again.

    Args:
        rows: training rows with ``question`` and ``answer``.
        texts: texts to train the tokenizer on. They include other texts than the rows, so that models that are compared
            have the same tokenizer.
        template: a name in ``ARCHITECTURES``, which sets the architecture and the prompt format.
        size: size of the model.
        teaching: settings of the training.
        callbacks: callbacks of the trainer.
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
    folder = own_folder(TAUGHT, cache_dir) / digest(made_of)
    if _whole(folder):
        return _in_use(folder)
    remove_leftovers(folder.parent, seconds=_LEFTOVER_SECONDS)
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
            adam_beta2=0.99,  # with 0.999 the gradients of the first steps count for too long
            seed=teaching.seed,
        )
        teach(model, tokenizer, rows, args, partial, callbacks)
        record = {**made_of, "files": _file_digests(partial)}
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return _in_use(folder)


_locks: dict[Path, int] = {}  # folder -> lock of a model in use, which `efface cache purge` does not remove


def _in_use(folder: Path) -> Path:
    """Take a shared lock on the folder of a trained model until this process ends. Return the folder."""
    with suppress(OSError, ImportError):  # the system or file system has no locks
        if folder not in _locks and (handle := take_lock(folder, shared=True)) is not None:
            _locks[folder] = handle
    return folder


def _whole(folder: Path) -> bool:
    """Return whether a folder contains an unchanged trained model. Warn if it contains a damaged one."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except ValueError:  # not JSON, or not text
        record = {}
    files = record.pop("files", None) if isinstance(record, dict) else None
    if isinstance(files, dict) and digest(record) == folder.name and files.items() <= _file_digests(folder).items():
        return True
    warnings.warn(f"trained model {str(folder)!r} is damaged; it is trained again", stacklevel=3)
    return False


def _file_digests(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != RECORD}


def digest(value: Any) -> str:
    """Return a SHA-256 digest of a JSON value, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
