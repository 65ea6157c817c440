"""Tokens as servers and other people's files spell them: which id is meant, which text is said.

One idea: a token is one id or the row is refused, and where tokens stand beside the text that they
are of, they must hold it. How a format lays its rows is in the readers beside this module.
"""

from functools import cached_property
from typing import Annotated, Any

from pydantic import Field

from stillroom.cache_schemas.errors import first_line
from stillroom.pipeline.doors.foreign_rows import NOTHING, Id, Nats, Shape, wrong


class Token(Shape):
    """A token as a server spells it."""

    token: str = ""
    token_id: Id | None = None
    bytes: list[Annotated[int, Field(ge=0, le=255)]] | None = None
    logprob: Nats


class Words:
    """A tokenizer's words by their bytes.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    @cached_property
    def _ids(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for word in range(len(self.tokenizer)):
            found.setdefault(self.tokenizer.decode([word]), []).append(word)
        return found

    def id_of(self, told: Token, where: str) -> int:
        """The id of a server's token.

        Raises:
            CacheError: it says no number, and no word or several look like it.
        """
        if told.token_id is not None:
            return told.token_id
        number = told.token.removeprefix("token_id:")  # vLLM's return_tokens_as_token_ids
        if number != told.token and number.isascii() and number.isdigit() and len(number) < 10:
            return int(number)
        text = told.token
        if told.bytes:
            text = bytes(told.bytes).decode("utf-8", errors="replace")
        found = [] if "\ufffd" in text else self._ids.get(text, [])  # part of a character
        if len(found) == 1:
            return found[0]
        raise wrong(
            where,
            f"the token {text!r} is {len(found) or 'none'} of the tokenizer's words",
            "one",
            "Ask the server for ids (vLLM: return_tokens_as_token_ids), and capture again.",
        )

    def conversation(self, messages: Any, where: str, **more: Any) -> list[int]:
        """Ids of messages as the template writes them.

        Raises:
            CacheError: it does not.
        """
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **more)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # templates raise whatever they like
            found = f"the template does not write these messages ({first_line(error)})"
            raise wrong(where, found) from None

    def check_shown(self, ids: list[int], text: Any, what: str, where: str) -> None:
        """Refuse tokens that do not hold a text which stands beside them: one of them is missing,
        or they are of another text or tokenizer.

        Tokens may say more (thoughts, ends of turns); white space and broken characters are not
        compared, and what the tokenizer changes of a text is changed in both.

        Args:
            ids: tokens.
            text: what they should hold; compared where it is one.
            what: its name, for messages.
            where: the row.

        Raises:
            CacheError: they do not.
        """
        if not isinstance(text, str) or not text:
            return
        own = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        wanted = self._bare(own, False)
        if any(wanted in self._bare(ids, skips) for skips in (False, True)):
            return
        raise wrong(
            where,
            f"the {len(ids)} tokens beside {what} do not hold its text",
            "every token of it",
            f"{NOTHING}; or take {what} out of it, where the tokens are what the teacher read.",
        )

    def _bare(self, ids: list[int], skips: bool) -> str:
        """Text of tokens without white space, with or without the special ones."""
        text = self.tokenizer.decode(ids, skip_special_tokens=skips)
        return "".join(text.replace("\ufffd", "").split())
