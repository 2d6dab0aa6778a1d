"""Text in and text out: the tokenizer, the vocabularies of a pair, text streamed without half a character."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from transformers import AutoTokenizer

from aspec.errors import CheckpointError, PromptError, VocabularyError

REPLACEMENT = "�"  # what a decoder writes for an incomplete character
MAX_PENDING = 16  # tokens that may wait for the end of a character


class Tokenizer:
    """A checkpoint's own tokenizer."""

    def __init__(self, inner: Any, folder: Path) -> None:
        self._inner = inner
        self.folder = folder

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises CheckpointError where the folder has no usable tokenizer."""
        try:
            inner = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{folder} has no usable tokenizer: expected tokenizer.json or the files its family needs ({reason}). "
                f"Copy the tokenizer files of the original model into the folder."
            ) from error
        return cls(inner, folder)

    def encode(self, text: str) -> list[int]:
        """Token ids with the special tokens this tokenizer adds."""
        return list(self._inner.encode(text))

    @property
    def has_chat_template(self) -> bool:
        """Whether a conversation can be laid out as this model expects."""
        return bool(getattr(self._inner, "chat_template", None))

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """A conversation, ready for the model's answer. Raises PromptError without a template or where it refuses."""
        if not self.has_chat_template:
            raise PromptError(f"{self.folder} has no chat template: give plain text (--raw) or choose a chat model.")
        try:
            text = self._inner.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is code of the checkpoint's and raises what it likes
            raise PromptError(f"the chat template of {self.folder} refuses the conversation: {error}.") from error
        return list(self._inner.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self._inner.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def vocabulary(self) -> dict[int, str]:
        """Token id -> token, added tokens included."""
        return {index: token for token, index in self._inner.get_vocab().items()}

    @property
    def added_ids(self) -> set[int]:
        """Ids that were added to the tokenizer's own vocabulary."""
        return set(self._inner.get_added_vocab().values())


def check_vocabulary(target: Tokenizer, draft: Tokenizer, target_size: int, draft_size: int) -> None:
    """Raises VocabularyError unless both tokenizers give every id the same token; padding may differ."""
    ours, theirs = target.vocabulary(), draft.vocabulary()
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index) and index < min(target_size, draft_size):
            raise VocabularyError(
                f"target and draft do not share a vocabulary: token {index} is {ours.get(index)!r} in {target.folder}, "
                f"{theirs.get(index)!r} in {draft.folder}. Choose a draft of the target's own family, or none."
            )


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises VocabularyError where a tokenizer's own vocabulary is larger than its model's.

    Added tokens beyond it are common (a padding token, say) and harm only a prompt that holds one.
    """
    largest = max(tokenizer.vocabulary().keys() - tokenizer.added_ids, default=-1)
    if largest >= vocab_size:
        raise VocabularyError(
            f"the tokenizer of {tokenizer.folder} has token {largest}, its model knows 0 .. {vocab_size - 1}: "
            f"tokenizer and weights do not belong together. Fetch both from the same place."
        )


class TextStream:
    """Token ids in, text out: never half a character, never part of a stop string.

    The text handed out so far is always a prefix of the decoded whole. Only the tokens since the last settled
    boundary are decoded again, so a token costs the same at any length.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._context: list[int] = []  # tokens whose text is settled; they decide on a leading space
        self._pending: list[int] = []  # tokens whose text may still change
        self._held = ""  # settled text that may be the beginning of a stop string
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """New text that will not change any more; empty once a stop string was found."""
        settled = ""
        for token in tokens:
            self._pending.append(token)
            settled += self._settle(len(self._pending) > MAX_PENDING)
        return self._release(settled, final=False)

    def finish(self) -> str:
        """What was held back."""
        return self._release(self._settle(force=True), final=True)

    def _settle(self, force: bool) -> str:
        """Decode the pending tokens behind their context, unless they end in an incomplete character."""
        if not self._pending:
            return ""
        before = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._pending)
        if not force and (text.endswith(REPLACEMENT) or not text.startswith(before)):
            return ""
        self._context, self._pending = self._pending[-4:], []
        return text[len(before) :]

    def _release(self, settled: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + settled
        self._held = ""
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        if not final:
            keep = max((_overlap(text, stop) for stop in self._stop), default=0)
            self._held = text[len(text) - keep :]
            text = text[: len(text) - keep]
        return text


def _overlap(text: str, stop: str) -> int:
    """The longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
