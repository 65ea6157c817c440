"""Documents cut into windows: what is repeated as context, and what is never scored twice.

One idea: a window is read by itself, so whatever a model must see before any text stands before
every window, not only before the document. What those tokens are is the tokenizer's matter.
"""

from collections.abc import Iterator

import numpy as np

from stillroom.pipeline.corpus.chat import Tokens


def windows(tokens: Tokens, size: int, overlap: int, begin: int = 0) -> Iterator[Tokens]:
    """Cut a document into windows of at most `size` tokens.

    Each window but the first begins with the document's first `begin` tokens and the last `overlap`
    tokens of the one before, as context: their loss mask is False, so they are read and never
    scored twice. Behind tokens that begin a text, the first of a window is not scored either: what
    comes before it in the document is not there.
    """
    token_ids, mask = tokens
    start, stop = 0, size
    while start < len(token_ids):
        head = begin if start else 0
        context = head + max(overlap, min(head, 1)) if start else 0
        kept = np.concatenate([mask[:head], mask[start:stop]])
        kept[:context] = False
        yield np.concatenate([token_ids[:head], token_ids[start:stop]]), kept
        if stop >= len(token_ids):
            return
        start, stop = stop - overlap, stop - overlap + size - begin
