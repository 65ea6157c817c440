"""Tiny real models for tests: a trained byte-level BPE tokenizer and randomly initialised decoders.

One idea: everything a test needs of a teacher (HF directory, tokenizer, chat template, more than
one architecture) in a few hundred kilobytes made in about a second, the same bytes every time.
"""

import os
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stillroom.pipeline  # noqa: F401  (see pipeline.cpu_wheels)

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN_CHAT_TEMPLATE = CHAT_TEMPLATE.replace("{% generation %}", "").replace(
    "{% endgeneration %}", ""
)
"""The same conversation format without generation blocks, as most published models have it."""


def english(limit: int = 200_000) -> str:
    """Real English that every Python ships: its own help topics, in name order."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))[:limit]


def save_tokenizer(directory: str | Path, vocab_size: int = 768, chat_template=CHAT_TEMPLATE):
    """Train a byte-level BPE tokenizer on English and save it as HF files; returns it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([english()], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=512,
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    return tokenizer


def shape(num_layers: int, hidden_size: int, vocab_size: int, **more) -> dict:
    """Arguments of a tiny decoder's config; `more` wins."""
    usual = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    return usual | more


def save_llama(
    directory: str | Path,
    num_layers: int = 3,
    hidden_size: int = 64,
    vocab_size: int = 768,
    chat_template=CHAT_TEMPLATE,
    seed: int = 0,
    **config,
) -> Path:
    """A Llama-shaped model with its tokenizer, fp32, as an HF directory.

    Weights are drawn wide (std 0.2), so that the answers are peaked and their errors show.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    made = LlamaConfig(**shape(num_layers, hidden_size, vocab_size, **{"head_dim": 32} | config))
    return _save(LlamaForCausalLM, made, directory, chat_template, seed)


def save_qwen3(
    directory: str | Path,
    num_layers: int = 2,
    hidden_size: int = 64,
    vocab_size: int = 768,
    padded_vocab_size: int = 800,
    chat_template=PLAIN_CHAT_TEMPLATE,
    seed: int = 1,
    **config,
) -> Path:
    """A Qwen3-shaped model: q/k norms, own head_dim, untied head wider than the tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    more = {"head_dim": 32, "tie_word_embeddings": False} | config
    made = Qwen3Config(**shape(num_layers, hidden_size, padded_vocab_size, **more))
    return _save(Qwen3ForCausalLM, made, directory, chat_template, seed, vocab_size)


def _save(model_class, config, directory, chat_template, seed: int, vocab_size: int = 0) -> Path:
    drawn(lambda: model_class(config), seed).save_pretrained(directory)
    save_tokenizer(directory, vocab_size or config.vocab_size, chat_template)
    return Path(directory)


def drawn(make: Callable[[], Any], seed: int) -> Any:
    """What `make` gives, its weights drawn from a seed, in fp32 and for inference."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().float().eval()
