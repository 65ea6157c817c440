"""Real chat templates and conversations to try them on.

One idea: TRL ships the templates of many model families, and versions with `{% generation %}` marks
of most; they are read from the installed package, so none is copied. One small byte-level tokenizer
whose special tokens include those of every template serves them all.
"""

import importlib.util
import re
from functools import cache
from pathlib import Path

from tests import tiny_models

_TOKEN = re.compile(
    r"<\|[^|<>'\n]+\|>|<\|[a-z_]+>|<[a-z_]+\|>|<｜[^｜\n]+｜>|</?s>"
    r"|<(?:start|end)_of_turn>|<end_of_utterance>|<start_of_image>|\[gMASK\]|<sop>"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Which."}},
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Oslo"}},
}


def _folder() -> Path:
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "chat_templates"


@cache
def originals() -> dict[str, str]:
    """Name -> template, as its model family ships it."""
    paths = sorted(_folder().glob("*.jinja"))
    return {p.stem: p.read_text() for p in paths if not p.stem.endswith("_training")}


@cache
def marked() -> dict[str, str]:
    """Name of an original -> TRL's version of it with generation marks."""
    paths = {p.stem.removesuffix("_training"): p for p in _folder().glob("*_training.jinja")}
    return {name: path.read_text() for name, path in sorted(paths.items())}


def save_tokenizer(directory: Path, eos: str = "<|im_end|>"):
    """A tokenizer that knows the special tokens of all the templates."""
    tokenizer = tiny_models.save_tokenizer(directory, vocab_size=512)
    texts = [*originals().values(), *marked().values()]
    found = dict.fromkeys(token for text in texts for token in _TOKEN.findall(text))
    tokenizer.add_special_tokens({"additional_special_tokens": list(found), "eos_token": eos})
    tokenizer.model_max_length = 1 << 20
    tokenizer.save_pretrained(directory)
    return tokenizer


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def tool(text):
    return {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": text}


CODE = "Like so:\n\n```python\ndef f(x):\n    return x < 3 and x > 1  # <b>\n```\n"
CONVERSATIONS: dict[str, tuple[list[dict], dict]] = {
    "plain": ([user("What is two and two?"), said("It makes four.")], {}),
    "system": (
        [{"role": "system", "content": "Be brief."}, user("Are you there?"), said("Certainly.")],
        {},
    ),
    "multi-turn": (
        [
            user("Apples?"),
            said("Yes, apples."),
            user("Pears?"),
            said("No pears."),
            user("Figs?"),
            said("Perhaps figs."),
        ],
        {},
    ),
    "think": (
        [
            user("Add two."),
            said("<think>\nadding\n</think>\n\nDone, four."),
            user("Three?"),
            said("<think>\nadding more\n</think>\n\nDone, seven."),
        ],
        {},
    ),
    "tools": (
        [
            user("How cold is Oslo?"),
            said("", tool_calls=[CALL]),
            tool("minus four degrees"),
            said("Rather cold."),
        ],
        {"tools": [WEATHER]},
    ),
    "null": (
        [
            user("How cold is Oslo?"),
            said(None, tool_calls=[CALL]),
            tool("minus four degrees"),
            said("Rather cold."),
        ],
        {"tools": [WEATHER]},
    ),
    "unicode": ([user("Grüße, 你好 🙂"), said("Καλημέρα 👩‍👩‍👧 done")], {}),
    "empty answer": ([user("Say nothing."), said(""), user("Well?"), said("I did.")], {}),
    "code": (
        [user("Write <b>code</b>."), said(CODE), user("Again?"), said("<tag>again</tag>")],
        {},
    ),
    "two answers alike": ([user("Red?"), said("Yes."), user("Round?"), said("Yes.")], {}),
    "long": (
        [m for n in range(12) for m in (user(f"Question {n}? " * 9), said(f"Answer {n}. " * 9))],
        {},
    ),
    "image": (
        [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "A red house."}]},
        ],
        {},
    ),
}
WORDS = {
    "tools": ("Oslo?", "weather", "minus four degrees", "Rather cold."),
    "null": ("Oslo?", "weather", "minus four degrees", "Rather cold."),
    "think": ("Add two.", "Done, four.", "Three?", "Done, seven."),
    "image": ("What is this?", "A red house."),
}
"""What a template has to show of a conversation, where that is not every content."""


def words(name: str) -> tuple[str, ...]:
    """Texts that have to be in a rendering of a conversation."""
    messages, _ = CONVERSATIONS[name]
    return WORDS.get(name) or tuple(m["content"].strip() for m in messages)
