"""The beginning of an example in words, for the index of a cache.

One idea: whoever browses a cache sees what it is about without a tokenizer. It decodes for people;
nothing is ever trained on a preview.
"""

from collections.abc import Callable

from stillroom.pipeline.record import Example

PREVIEW_TOKENS = 48


def text_preview(model: str, trusts_code: bool = False) -> Callable[[Example], str]:
    """What decodes the first tokens of an example with the tokenizer of a model directory."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trusts_code)

    def preview(example: Example) -> str:
        tokens = example.token_ids[:PREVIEW_TOKENS].tolist()
        return " ".join(tokenizer.decode(tokens).split())

    return preview
