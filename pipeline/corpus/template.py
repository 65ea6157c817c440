"""A chat template with everything it takes: messages, tools, documents and arguments of its own.

One idea: templates are rendered in this one place, with the same arguments for every purpose (a
corpus, prompts for a writer, checks). What a rendering means is not decided here.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillroom.cache_schemas.errors import ConfigError, CorpusError
from stillroom.pipeline.config.strict import nearest
from stillroom.pipeline.corpus.characters import whole
from stillroom.pipeline.corpus.turns import Messages

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\b")
OF_THE_PROGRAM = ("messages", "tools", "documents", "add_generation_prompt")


class ChatTemplate:
    """The template of a tokenizer or processor, or one of the user's own.

    Args:
        owner: whose `chat_template` it is.
        special_tokens: name -> text, as templates get them.
        path: file of the user's own template; empty takes the owner's.
        arguments: passed to the template with every call.

    Raises:
        CorpusError: there is none, or it is no Jinja template.
        ConfigError: it takes no argument of such a name.
    """

    def __init__(
        self,
        owner: Any,
        special_tokens: Mapping[str, Any],
        path: str = "",
        arguments: Mapping[str, Any] | None = None,
    ):
        self._template = _read(path) if path else owner.chat_template
        if not self._template:
            raise CorpusError(
                "the tokenizer has no chat template",
                where="[[prepare.source]] messages_column",
                remedy="Use an instruct model, a text column, or [prepare] chat_template.",
            )
        self._arguments = dict(arguments or {})
        self._given = {**special_tokens, **self._arguments}
        self.variables = _variables(self.text(), path or "the tokenizer's chat template")
        self._check_arguments()

    @property
    def marks_itself(self) -> bool:
        """Whether it says with `{% generation %}` what the assistant said."""
        return bool(GENERATION_BLOCK.search(self.text()))

    @property
    def writes_the_date(self) -> bool:
        """Whether what it writes depends on the day."""
        return "strftime_now" in self.variables

    @property
    def source(self) -> str:
        """All of the template as text."""
        return str(self._template)

    def text(self, tools: bool = False) -> str:
        """The template's text; some models have one of their own for tools."""
        if isinstance(self._template, str):
            return self._template
        named = dict(self._template)
        chosen = named.get("tool_use") if tools else None
        chosen = chosen or named.get("default")
        if chosen is None:
            found = f"has chat templates {', '.join(sorted(named))}, and none is the default"
            raise CorpusError(found, remedy="Choose one with [prepare] chat_template.")
        return chosen

    def render(self, messages: Messages, prompt: bool, context: Mapping[str, Any]) -> str:
        """The text of messages; whatever else the template raises comes through.

        Args:
            messages: as the template takes them.
            prompt: whether the generation prompt follows.
            context: `tools`, `documents` and further arguments of this conversation.

        Raises:
            CorpusError: the text holds half of a character.
        """
        return whole(self._rendered(messages, prompt, context, marks=False)[0][0])

    def marked(
        self, messages: Messages, context: Mapping[str, Any]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and its characters inside `{% generation %}` blocks."""
        texts, spans = self._rendered(messages, False, context, marks=True)
        return texts[0], [(int(start), int(end)) for start, end in spans[0]]

    def _rendered(self, messages: Messages, prompt: bool, context: Mapping[str, Any], marks: bool):
        from transformers.utils.chat_template_utils import render_jinja_template

        return render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.text(bool(context.get("tools"))),
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marks,
            **{**self._given, **context},
        )

    def _check_arguments(self) -> None:
        for name in self._arguments:
            if name in OF_THE_PROGRAM or name not in self.variables:
                known = sorted(self.variables.difference(OF_THE_PROGRAM))
                raise ConfigError(
                    f"the chat template takes no argument '{name}'",
                    expected=f"one of {', '.join(known)}" if known else "none",
                    where="[prepare.template]",
                    remedy=nearest(name, known),
                )


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = f"cannot be read ({error})"
        raise CorpusError(found, where=path, remedy="Check [prepare] chat_template.") from None


def _variables(text: str, where: str) -> frozenset[str]:
    """Names that a template takes from outside."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import _get_template_variables

    try:
        return _get_template_variables(text)
    except TemplateError as error:
        raise CorpusError(f"is no Jinja template ({error})", where=where) from None
