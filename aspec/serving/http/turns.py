"""What conversations have said, in tokens: the next turn begins with the same ones, so their KV is reused.

A text can be encoded in several ways, and the model need not have chosen the tokenizer's.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any


class Turns:
    """The tokens of the latest conversations, by their messages; mutable, because they grow."""

    def __init__(self, most: int = 64) -> None:
        self.most = most  # conversations; the oldest are forgotten first
        self._tokens: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()

    def add(self, messages: Sequence[Any], tokens: Sequence[int]) -> None:
        """Note the tokens of a conversation that ends with an answer."""
        *_, key = _keys(messages)
        self._tokens[key] = tuple(tokens)
        self._tokens.move_to_end(key)
        while len(self._tokens) > self.most:
            self._tokens.popitem(last=False)

    def said(self, messages: Sequence[Any]) -> tuple[int, ...]:
        """The tokens of the longest known conversation that begins this one; empty if none is known."""
        for key in reversed(list(_keys(messages))):
            if key in self._tokens:
                return self._tokens[key]
        return ()


def _keys(messages: Sequence[Any]) -> list[bytes]:
    """A digest of every beginning of a conversation."""
    digest, keys = hashlib.blake2b(digest_size=16), []
    for message in messages:
        digest.update(json.dumps(_said(message), sort_keys=True).encode() + b"\n")
        keys.append(digest.digest())
    return keys


def _said(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message with its text in one form: a list of one text part is that text."""
    content = message.get("content")
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        return {**message, "content": content[0].get("text")}
    return message
