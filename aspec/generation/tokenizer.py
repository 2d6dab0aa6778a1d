"""Text in and text out: the tokenizer, the vocabularies of a pair, text streamed without half a character."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from transformers import AutoTokenizer

from aspec.errors import CheckpointError, PromptError, VocabularyError
from aspec.generation.time_limit import TimeLimit, TimeLimitError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are not, or not yet, a character
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # a byte of a sentencepiece-style tokenizer with byte fallback
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
MAX_WINDOW = 8  # tokens decoded again at every step; a character has at most 4 bytes, so at most 4 tokens
TEMPLATE_S = 10.0  # of processor time, for a chat template: a long conversation takes a hundredth of it

Kind = Literal["text", "byte", "silent"]


class Tokenizer:
    """A checkpoint's own tokenizer."""

    def __init__(self, inner: Any, folder: Path) -> None:
        self._inner = inner
        self.folder = folder
        self._kinds: dict[int, Kind] = {}  # what is known so far, one entry per token seen

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises CheckpointError where the folder has no usable tokenizer."""
        if not any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern)):
            raise CheckpointError(
                f"{folder} has no tokenizer: expected tokenizer.json, or the vocabulary files of its family; found "
                f"none. Copy the tokenizer files of the original model into the folder."
            )
        try:
            inner = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Warning:  # turned into an error: no fault of the files
            raise
        except Exception as error:  # every family's loader, and the Rust one, raises what it likes
            raise _unusable(folder, _reason(error)) from error
        if not inner.get_vocab():
            raise _unusable(folder, "its vocabulary is empty")
        inner.encode("")  # resets what the file says of padding and cutting: later calls may come from several threads
        return cls(inner, folder)

    def encode(self, text: str) -> list[int]:
        """Token ids with the special tokens this tokenizer adds by default. PromptError if ``text`` is no Unicode."""
        return self._encode(text, add_special_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether a conversation can be laid out as this model expects."""
        return bool(getattr(self._inner, "chat_template", None))

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], said: Sequence[int] = (), limit: TimeLimit | None = None
    ) -> list[int]:
        """A conversation, ready for the model's answer.

        Raises PromptError without a template, where it refuses, and where it takes longer than ``limit`` (default:
        ``TEMPLATE_S``).

        It begins with the tokens ``said``, or all but the last few, where its text begins with theirs: what a model
        generated need not be what the tokenizer makes of the same text, and only the same tokens have their KV already.
        """
        if not self.has_chat_template:
            raise PromptError(f"{self.folder} has no chat template: give plain text (--raw) or choose a chat model.")
        conversation = [dict(message) for message in messages]
        limit = limit or TimeLimit(TEMPLATE_S)
        try:
            with limit:
                text = self._inner.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        except Warning:  # turned into an error: no fault of the conversation
            raise
        except TimeLimitError as error:
            raise PromptError(
                f"the chat template of {self.folder} did not end within {limit.seconds:g} s of processor time. Send "
                f"fewer or shorter messages, or give plain text (--raw); if none helps, the template is damaged."
            ) from error
        except Exception as error:  # a template is code of the checkpoint's and raises what it likes
            raise PromptError(
                f"the chat template of {self.folder} refuses the conversation ({_reason(error)}). Change the messages' "
                f"roles or order to what the model expects, or give plain text (--raw)."
            ) from error
        for count in range(len(said), max(0, len(said) - MAX_WINDOW), -1):  # it may end in half a character
            begun = self.spell(said[:count])
            if text.startswith(begun):
                tokens = [*said[:count], *self._encode(text[len(begun) :], add_special_tokens=False)]
                if self.spell(tokens) == text:
                    return tokens
        return self._encode(text, add_special_tokens=False)

    def spell(self, tokens: Sequence[int]) -> str:
        """Text with special tokens, which are written by their names."""
        return str(self._inner.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens; spaces stay as they were generated."""
        return str(self._inner.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def vocab(self) -> dict[int, str]:
        """Token id -> token, added tokens included."""
        return {int(index): token for token, index in self._inner.get_vocab().items()}

    def added(self) -> frozenset[int]:
        """Ids of tokens that stand beside the base vocabulary."""
        return frozenset(int(index) for index in self._inner.get_added_vocab().values())

    def kind(self, token: int) -> Kind:
        """What ``decode`` makes of a token: text, nothing at all, or a byte of a run.

        Special tokens and ids beyond the tokenizer's vocabulary (a model may be padded) are silent. A run of bytes
        is valid text or not as a whole, so it is text only once the token after it is known.
        """
        if token not in self._kinds:
            self._kinds[token] = self._find_kind(token)
        return self._kinds[token]

    def _find_kind(self, token: int) -> Kind:
        name = self._inner.convert_ids_to_tokens(token)
        if name is None:
            return "silent"
        if BYTE_TOKEN.fullmatch(name):
            return "byte"
        hidden = not self.decode([token]) and self._inner.decode([token], skip_special_tokens=False)
        return "silent" if hidden else "text"

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the prompt is not valid Unicode at character {error.start}: expected UTF-8 text, found "
                f"{text[error.start]!r}. Convert the input to UTF-8."
            ) from error
        return [int(token) for token in self._inner.encode(text, add_special_tokens=add_special_tokens, verbose=False)]


def check_vocabulary(
    target_tokenizer: Tokenizer, draft_tokenizer: Tokenizer, target_vocab_size: int, draft_vocab_size: int
) -> None:
    """Raises VocabularyError unless both tokenizers give every id the same token.

    Padding of the embeddings may differ, and one side may lack tokens that the other *added* (a newer model of a
    family knows more special tokens); the draft is then merely wrong about those. Each must fit its own model.
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
    """Raises VocabularyError where a tokenizer knows ids that its model's embedding of ``vocab_size`` rows lacks.

    Special tokens may lie beyond (gemma-3-1b's image token does): no plain text leads to them.
    """
    beyond = [index for index in tokenizer.vocab() if index >= vocab_size and tokenizer.kind(index) != "silent"]
    if beyond:
        first = min(beyond)
        raise VocabularyError(
            f"the tokenizer of {tokenizer.folder} knows token {first} ({tokenizer.vocab()[first]!r}), its model only "
            f"0 .. {vocab_size - 1}: tokenizer and weights do not belong together. Fetch both from the same place."
        )


class TextStream:
    """Token ids in, text out: never half a character, never part of a stop string.

    The pieces add up to ``tokenizer.decode`` of all tokens, cut before the stop string that is complete first.
    What comes out depends on the tokens alone, not on how they are spread over pushes. Only a few tokens are
    decoded again at every step, so a token costs the same at any length.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._context: list[int] = []  # the last token whose text is out; it decides on a leading space
        self._window: list[int] = []  # the tokens after it, whose text may not all be out
        self._bytes: list[int] = []  # the byte tokens after those: only the token after the last makes them text
        self._sent = 0  # characters of the window's text that are out
        self._held = ""  # text that is final but may begin a stop string
        self.stopped = False  # a stop string was found: nothing comes out any more

    def push(self, tokens: Sequence[int]) -> str:
        """The new text that will not change any more."""
        if self.stopped:
            return ""
        settled = ""
        for token in tokens:
            kind = self._tokenizer.kind(token)
            if kind == "silent":
                continue
            self._bytes.append(token)
            if kind == "text":
                self._window += self._bytes
                self._bytes.clear()
                settled += self._settle()
        return self._release(settled, final=False)

    def finish(self) -> str:
        """The rest, an incomplete character as the tokenizer writes it; call it once, after the last push."""
        if self.stopped:
            return ""
        rest = self._text(self._context, self._window + self._bytes)[self._sent :]
        self._context, self._window, self._bytes, self._sent = [], [], [], 0
        return self._release(rest, final=True)

    def _settle(self) -> str:
        """The window's new text, less a last character that may still be incomplete."""
        text = self._text(self._context, self._window)
        final = text.removesuffix(REPLACEMENT)
        new = final[self._sent :]
        self._sent = max(self._sent, len(final))
        if text and final == text:
            self._context, self._window, self._sent = self._window[-1:], [], 0
        elif len(self._window) > MAX_WINDOW:
            self._shorten(text)
        return new

    def _shorten(self, text: str) -> None:
        """Move the window's start to a border between two tokens that lies between characters, too."""
        for border in range(len(self._window) - 4, 0, -1):
            head = self._text(self._context, self._window[:border])
            context, window = self._window[border - 1 : border], self._window[border:]
            if len(head) <= self._sent and head + self._text(context, window) == text:
                self._context, self._window, self._sent = context, window, self._sent - len(head)
                return

    def _text(self, context: list[int], window: list[int]) -> str:
        """What ``window`` says after ``context``."""
        before = self._tokenizer.decode(context) if context else ""
        return self._tokenizer.decode(context + window)[len(before) :]

    def _release(self, settled: str, final: bool) -> str:
        text, self._held = self._held + settled, ""
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


def _name(vocabulary: Mapping[int, str], index: int) -> str:
    return repr(vocabulary[index]) if index in vocabulary else "absent"


def _unusable(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer of {folder} cannot be used: expected tokenizer.json or the files its family needs "
        f"({reason}). Copy the tokenizer files of the original model into the folder."
    )


def _reason(error: Exception) -> str:
    """A foreign error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].rstrip(".: ")
