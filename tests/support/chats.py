"""Chat templates of real models, tokenizers with them, and open-unlearning's way to apply them."""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from support.helpers import TEXTS

# The chat templates of the models' tokenizers without tool calls. They render the conversations of these tests the
# same.
LLAMA_3 = (
    "{{ bos_token }}"
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}"
    "{{- 'Today Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}"
    "{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
GEMMA_2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN_2_5 = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
QWEN_3 = (
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- set content = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + content + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
MISTRAL_NEMO = (  # the system prompt goes into the last turn if that is the user's
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set messages = messages[1:] %}{%- endif %}"
    "{%- for m in messages %}{%- if m['role'] == 'user' %}"
    "{{- '[INST]' + ((system + '\n\n') if loop.last and system is defined else '') + m['content'] + '[/INST]' }}"
    "{%- else %}{{- m['content'] + eos_token }}{%- endif %}{%- endfor %}"
)

_SYSTEM = (
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 10 Apr 2025\n\n"
)
USER, ASSISTANT = (f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant"))
_QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"

# chat template, end-of-sequence token, text before the answer, text after it
CHATS = {
    "Llama-3.2": (
        LLAMA_3,
        "<|eot_id|>",
        f"<s>{_SYSTEM}You are a helpful assistant.<|eot_id|>{USER}Who?<|eot_id|>{ASSISTANT}",
        "<|eot_id|>",
    ),
    "Gemma-2": (
        GEMMA_2,
        "<eos>",
        "<s><start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn><eos>",
    ),
    "Qwen2.5": (
        QWEN_2_5,
        "<|im_end|>",
        f"{_QWEN}<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "Qwen3": (
        QWEN_3,
        "<|im_end|>",
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>",
    ),
}

# the regular expression by which OpenAI's and Llama-3's tokenizers split text into words
WORDS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<eos>"]
SPECIAL += ["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]


def chat_tokenizer(template: str, eos: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer like Llama-3's: its word pattern, special tokens and a leading <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text for row in TEXTS for text in row.values()], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, chat_template=template)


def llama_2_tokenizer() -> PreTrainedTokenizerFast:
    """Return a SentencePiece BPE tokenizer like Llama-2's.

    A leading <s>, ▁ for spaces and before the first word, and byte fallback for unknown characters.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    )
    text = [f"{row['question']} {row['answer']} [INST] [/INST] Question:\nAnswer:" for row in TEXTS]
    tokenizer.train_from_iterator([piece for line in text for piece in line.split(" ")], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def open_unlearning(
    tokenizer: PreTrainedTokenizerFast, config: dict[str, Any], question: str, answer: str
) -> tuple[list[int], list[int]]:
    """Return (ids, prompt ids) of one example, by the formulas of open-unlearning's preprocess_chat_instance."""
    if config["apply_chat_template"]:
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if config.get("system_prompt"):
            chat = [{"role": "system", "content": config["system_prompt"]}, *chat]
        options = {"date_string": config["date_string"]} if config.get("date_string") else {}
        options |= {"tokenize": True, "return_dict": False}
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=False, **options)
        prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, **options)
    else:
        text = config["user_start_tag"] + question + config["user_end_tag"] + config["asst_start_tag"]
        ids = tokenizer(text + answer, add_special_tokens=True)["input_ids"]
        prompt = tokenizer(text, add_special_tokens=True)["input_ids"]
    if ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    return ids, prompt
