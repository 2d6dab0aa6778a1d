"""Between text and token ids: the tokenizer, the check of two vocabularies, streamed text in whole characters."""

import re
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Literal, Self, cast

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from aspec.errors import CheckpointError, PromptError, VocabularyError, reason_of
from aspec.generation.text.chat_template import ChatTemplate, check_unicode
from aspec.generation.text.prompts import Prompt, is_chat
from aspec.generation.text.stop_strings import StopStrings
from aspec.generation.text.time_limit import TimeLimit
from aspec.generation.text.tool_format import ToolFormat
from aspec.generation.text.vocabulary_files import missing_reader
from aspec.io.hub import known_as
from aspec.io.json_file import read_json
from aspec.models.skeleton import load_config
from aspec.units import format_bytes

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # decoders write it for bytes that are not, or not yet, a character
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # a byte of a sentencepiece-style tokenizer with byte fallback
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
MAX_WINDOW = 8  # most tokens decoded again at every step; a character has at most 4 bytes, so at most 4 tokens
TEMPLATE_S = 5.0  # of processor time, for a chat template: a long conversation takes 2 % of it
MOST_BYTES = 256 << 20  # of tokenizer.json; a vocabulary of 256,000 tokens takes 35 MB
LONG_PATTERN = re.compile(rb'"Regex"\s*:\s*"(?:[^"\\]|\\.){20000}', re.DOTALL)  # common ones have 400 characters

TokenKind = Literal["text", "byte", "silent"]


class Tokenizer:
    """A checkpoint's own tokenizer."""

    def __init__(self, inner: Any, folder: Path) -> None:
        self._inner = inner
        self.folder = folder
        self._template = ChatTemplate(inner, folder)
        self._tool_format: ToolFormat | None = None  # None: not asked for yet
        self._kinds: dict[int, TokenKind] = {}  # a cache, one entry per token seen

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Load a folder's tokenizer. Raises CheckpointError if the folder has no usable one."""
        if not any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern)):
            raise CheckpointError(
                f"{folder} has no tokenizer: expected tokenizer.json, or the vocabulary files of its family; found "
                f"none. Copy the tokenizer files of the original model into the folder."
            )
        if (folder / "config.json").is_file():
            load_config(folder)  # transformers reads it too, and its faults are not the tokenizer's
        if (reason := missing_reader(folder)) is not None:
            raise _unusable(folder, reason)
        _check_size(folder)
        try:
            inner = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            size = len(inner.get_vocab())
            inner.encode("")  # resets the file's padding and truncation before threads share it
        except Warning:  # a warning that the user turned into an error: not the files' fault
            raise
        except BaseException as error:  # the loaders, and the Rust one, raise many types
            if not _is_library_error(error):
                raise
            raise _unusable(folder, reason_of(error)) from error
        if not size:
            raise _unusable(folder, "its vocabulary is empty")
        if not getattr(inner, "chat_template", None):
            inner.chat_template = _template_of_processor(folder)
        return cls(inner, known_as(folder))

    def encode(self, text: str) -> list[int]:
        """Token ids, with the tokenizer's default special tokens. Raises PromptError if ``text`` is no Unicode."""
        return self._encode(text, add_special_tokens=True)

    def encode_prompt(
        self,
        prompt: Prompt,
        limit: TimeLimit | None = None,
        said: Sequence[int] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of a text as it is, a conversation or token ids. Raises PromptError if there are none.

        ``said`` and ``variables`` are of a conversation, see ``encode_chat``.
        """
        if isinstance(prompt, str):
            tokens = self.encode(prompt) if prompt else []
        elif is_chat(prompt):
            tokens = self.encode_chat(prompt, said, limit, variables)
        else:
            tokens = cast("list[int]", prompt)
        if not tokens:
            raise PromptError("the prompt is empty: expected at least one token. Give some text.")
        return tokens

    def spellings(self, text: str) -> list[list[int]]:
        """The tokens of a word alone and after a space, without special tokens. Raises PromptError as ``encode``."""
        word = text.lstrip()
        found = [self._encode(spelled, add_special_tokens=False) for spelled in (word, f" {word}")]
        return [tokens for tokens in found if tokens]

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer can lay out a conversation as its model expects."""
        return self._template.exists

    def template_uses(self, name: str) -> bool:
        """Whether the chat template names a variable."""
        return self._template.uses(name)

    def tool_format(self) -> ToolFormat:
        """How the model writes calls of tools. Raises PromptError if it takes no tools, or in an unknown form."""
        if self._tool_format is None:
            self._tool_format = self._template.tool_format(TimeLimit(TEMPLATE_S))
        return self._tool_format

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        said: Sequence[int] = (),
        limit: TimeLimit | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of a conversation, up to the start of the model's answer; the template reads ``variables``.

        The content of a message is a text or a list of text parts. Raises PromptError as ``ChatTemplate.render`` does;
        the default of ``limit`` is ``TEMPLATE_S``.

        The result begins with the tokens ``said``, or all but their last few, if the text begins with their text. The
        tokenizer may encode the same text differently, and only the same tokens already have KV.
        """
        text = self._template.render(messages, limit or TimeLimit(TEMPLATE_S), variables)
        for count in range(len(said), max(0, len(said) - MAX_WINDOW), -1):  # the last ones may end inside a character
            begun = self.spell(said[:count])
            if text.startswith(begun):
                tokens = [*said[:count], *self._encode(text[len(begun) :], add_special_tokens=False)]
                if self.spell(tokens) == text:
                    return tokens
        return self._encode(text, add_special_tokens=False)

    def spell(self, tokens: Sequence[int]) -> str:
        """The text of tokens; special tokens are written by name."""
        return str(self._inner.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens without special ones; spaces stay as generated."""
        return str(self._inner.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def name(self, token: int) -> str:
        """A token as its vocabulary writes it; of a special token this is its text. Empty beyond the vocabulary."""
        return self._inner.convert_ids_to_tokens(token) or ""

    def vocab(self) -> dict[int, str]:
        """Token id -> token, added tokens included."""
        return {int(index): token for token, index in self._inner.get_vocab().items()}

    def added(self) -> frozenset[int]:
        """Ids of tokens that were added to the base vocabulary."""
        return frozenset(int(index) for index in self._inner.get_added_vocab().values())

    def as_json(self) -> str | None:
        """The tokenizer as a tokenizer.json, added tokens included; None if it is not one of the Rust library."""
        if not isinstance(self._inner, PreTrainedTokenizerFast):
            return None
        backend = copy(self._inner.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        return str(backend.to_str())

    def kind(self, token: int) -> TokenKind:
        """How ``decode`` treats a token: as text, as a byte of a run, or silently (no text).

        Special tokens and ids beyond the tokenizer's vocabulary (a model may be padded) are silent. A run of bytes
        is valid text only as a whole, so its text is known only with the token after it.
        """
        if token not in self._kinds:
            self._kinds[token] = self._find_kind(token)
        return self._kinds[token]

    def _find_kind(self, token: int) -> TokenKind:
        name = self._inner.convert_ids_to_tokens(token)
        if name is None:
            return "silent"
        if BYTE_TOKEN.fullmatch(name):
            return "byte"
        hidden = not self.decode([token]) and self._inner.decode([token], skip_special_tokens=False)
        return "silent" if hidden else "text"

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        check_unicode(text, "the prompt")
        try:
            found = self._inner.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        except Warning:  # a warning that the user turned into an error
            raise
        except BaseException as error:
            if not _is_library_error(error):
                raise
            raise PromptError(
                f"the tokenizer of {self.folder} cannot encode the prompt ({reason_of(error)}). Change the text; if "
                f"other texts fail, too, tokenizer.json is damaged."
            ) from error
        return [int(token) for token in found]


def _template_of_processor(folder: Path) -> str | None:
    """The chat template that a processor of text and images keeps in a file of its own; None if there is none."""
    path = folder / "chat_template.json"
    if not path.is_file():
        return None
    held = read_json(path, "a chat template", error=CheckpointError)
    template = held.get("chat_template") if isinstance(held, dict) else None
    if not isinstance(template, str):
        raise CheckpointError(
            f"{path}: expected a JSON object with the text of chat_template, found none. Fetch it again, or remove it."
        )
    return template


def _check_size(folder: Path) -> None:
    """Refuse a tokenizer.json that would take minutes and gigabytes to load. Raises CheckpointError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    if (size := path.stat().st_size) > MOST_BYTES:
        raise _unusable(folder, f"tokenizer.json has {format_bytes(size)}, more than {format_bytes(MOST_BYTES)}")
    if LONG_PATTERN.search(path.read_bytes()):
        raise _unusable(folder, "a regular expression of tokenizer.json is too long")


def _is_library_error(error: BaseException) -> bool:
    """Whether a tokenizer raised it: an Exception, or a panic of Rust code (a pattern that backtracks too much)."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def check_vocabulary(
    target_tokenizer: Tokenizer, draft_tokenizer: Tokenizer, target_vocab_size: int, draft_vocab_size: int
) -> None:
    """Raise VocabularyError unless both tokenizers give every id the same token.

    Padding of the embeddings may differ, and one side may lack tokens that the other *added* (a newer model of a
    family knows more special tokens); the draft then proposes only those wrongly. Each tokenizer must fit its model.
    """
    check_tokenizer(target_tokenizer, target_vocab_size)
    check_tokenizer(draft_tokenizer, draft_vocab_size)
    target, draft = target_tokenizer.vocab(), draft_tokenizer.vocab()
    if target == draft:
        return
    extra = {i for i in target_tokenizer.added() if i not in draft}
    extra |= {i for i in draft_tokenizer.added() if i not in target}
    for index in sorted((target.keys() | draft.keys()) - extra):
        if target.get(index) != draft.get(index):
            raise VocabularyError(
                f"target and draft do not share a vocabulary: token {index} is {_name(target, index)} in "
                f"{target_tokenizer.folder} and {_name(draft, index)} in {draft_tokenizer.folder}. Choose a draft of "
                f"the target's own family, or none."
            )


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise VocabularyError if a tokenizer has ids beyond its model's embedding of ``vocab_size`` rows.

    Special tokens may lie beyond it (gemma-3-1b's image token does): no plain text produces them.
    """
    beyond = [index for index in tokenizer.vocab() if index >= vocab_size and tokenizer.kind(index) != "silent"]
    if beyond:
        first = min(beyond)
        raise VocabularyError(
            f"the tokenizer of {tokenizer.folder} knows token {first} ({tokenizer.vocab()[first]!r}), its model only "
            f"0 .. {vocab_size - 1}: tokenizer and weights do not belong together. Fetch both from the same place."
        )


class TextStream:
    """Turns token ids into text: never half a character, never part of a stop string.

    The pieces add up to ``tokenizer.decode`` of all tokens, cut before the stop string that is complete first. Special
    tokens are no text, but a stop string may name them, whole. The text depends only on the tokens, not on their split
    into pushes. Only a few tokens are decoded again at every step, so a token costs the same at any length.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, StopStrings(stop)
        self._context: list[int] = []  # the last token whose text was returned; it decides on a leading space
        self._window: list[int] = []  # the tokens after it, whose text is not all returned
        self._bytes: list[int] = []  # the byte tokens after those: the next token completes their text
        self._sent = 0  # characters of the window's text that were returned

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: no more text is returned."""
        return self._stops.found

    def push(self, tokens: Sequence[int]) -> str:
        """The new text that is final."""
        text = ""
        for token in tokens:
            if self.stopped:
                break
            kind = self._tokenizer.kind(token)
            if kind == "silent":
                text += self._push_silent(token)
                continue
            self._bytes.append(token)
            if kind == "text":
                self._window += self._bytes
                self._bytes.clear()
                text += self._stops.push(self._final_text())
        return text

    def _push_silent(self, token: int) -> str:
        """The text before a special token that completes a stop string; otherwise none."""
        name = self._tokenizer.name(token) if self._stops else ""
        return self._stops.push_hidden(name, self._rest()) if name else ""

    def finish(self) -> str:
        """The rest of the text; the tokenizer decides on an incomplete character. Call it once, after the last push."""
        if self.stopped:
            return ""
        rest = self._rest()
        self._context, self._window, self._bytes, self._sent = [], [], [], 0
        return self._stops.push(rest, final=True)

    def _rest(self) -> str:
        """The text of the window that was not returned, an incomplete character included."""
        return self._text(self._context, self._window + self._bytes)[self._sent :]

    def _final_text(self) -> str:
        """The window's new text, without a last character that may be incomplete."""
        text = self._text(self._context, self._window)
        final = text.removesuffix(REPLACEMENT)
        new = final[self._sent :]
        self._sent = max(self._sent, len(final))
        if text and final == text:
            self._context, self._window, self._sent = self._window[-1:], [], 0
        elif len(self._window) > MAX_WINDOW:
            self._shorten_window(text)
        return new

    def _shorten_window(self, text: str) -> None:
        """Move the window's start to a border between two tokens that is also a border between characters."""
        for border in range(len(self._window) - 4, 0, -1):
            head = self._text(self._context, self._window[:border])
            context, window = self._window[border - 1 : border], self._window[border:]
            if len(head) <= self._sent and head + self._text(context, window) == text:
                self._context, self._window, self._sent = context, window, self._sent - len(head)
                return

    def _text(self, context: list[int], window: list[int]) -> str:
        """The text of ``window`` after ``context``."""
        before = self._tokenizer.decode(context) if context else ""
        return self._tokenizer.decode(context + window)[len(before) :]


def _name(vocabulary: Mapping[int, str], index: int) -> str:
    return repr(vocabulary[index]) if index in vocabulary else "absent"


def _unusable(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer of {known_as(folder)} cannot be used: expected tokenizer.json or the files its family needs "
        f"({reason}). Copy the tokenizer files of the original model into the folder."
    )
