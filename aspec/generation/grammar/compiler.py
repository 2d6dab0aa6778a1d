"""Grammars compiled for the tokens of one vocabulary, by llguidance (the extra ``grammar``).

llguidance was chosen over xgrammar: it depends on no other package (xgrammar: five, torch and triton among them), reads
any tokenizer of the Rust library, rolls states back, and refuses a schema's keywords that it does not enforce.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from aspec.errors import PromptError, printable, reason_of
from aspec.generation.grammar.grammar import WHITESPACE, Grammar
from aspec.generation.grammar.masks import GrammarMasks
from aspec.generation.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

MOST_KEPT = 64  # compiled grammars of an engine
MOST_REASON = 300  # characters of the library's reason in a message


class Grammars:
    """Compiles grammars for one model; mutable, from any thread: it keeps the latest ones."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Iterable[int]) -> None:
        """For a model of ``vocab_size`` tokens, of which ``end_ids`` end a text."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._end_ids = sorted(token for token in end_ids if 0 <= token < vocab_size)
        self._tokens: llguidance.LLTokenizer | None = None  # made at the first grammar: 0.5 s for 49,152 tokens
        self._made: dict[Grammar, llguidance.LLMatcher] = {}  # none has consumed a token

    def masks(self, grammar: Grammar) -> GrammarMasks:
        """The state of a new text. Blocks. Raises PromptError if the grammar or the tokenizer cannot be used."""
        made = self._made.get(grammar)
        if made is None:
            made = self._compile(grammar)
            while len(self._made) >= MOST_KEPT:
                self._made.pop(next(iter(self._made)), None)
            self._made[grammar] = made
        return GrammarMasks(made, self._vocab_size, frozenset(self._end_ids))

    def _compile(self, grammar: Grammar) -> "llguidance.LLMatcher":
        check_grammar(grammar)
        library = _library()
        if not self._end_ids:
            raise PromptError(
                "a text cannot be held to a form by a model without an end-of-sequence token: expected eos_token_id in "
                "its config.json or generation_config.json. Add it, or leave the form out."
            )
        if self._tokens is None:
            self._tokens = self._read_tokens()
        made: llguidance.LLMatcher = library.LLMatcher(self._tokens, _source(grammar), log_level=0)
        if made.is_error():
            raise _invalid(grammar, made.get_error())
        return made

    def _read_tokens(self) -> "llguidance.LLTokenizer":
        stored, folder = self._tokenizer.as_json(), self._tokenizer.folder
        reason = "it is not one of the Rust library"
        if stored is not None:
            try:
                made: llguidance.LLTokenizer = _library().LLTokenizer(stored, self._vocab_size, self._end_ids)
                return made
            except Exception as error:  # the library raises many types
                reason = reason_of(error)
        raise PromptError(
            f"the tokenizer of {folder} cannot be held to a grammar ({reason}): expected a tokenizer.json that "
            f"llguidance reads. Leave out response_format, or choose a model with one."
        )


@lru_cache(MOST_KEPT)
def check_grammar(grammar: Grammar) -> None:
    """Raise PromptError if a grammar is not valid, asks for what cannot be enforced, or cannot be met by any text.

    It needs no vocabulary, and takes a millisecond for an ordinary schema.
    """
    failed, said = _library().LLMatcher.validate_grammar_with_warnings(_source(grammar))
    if failed:
        raise _invalid(grammar, said[0])


def _source(grammar: Grammar) -> str:
    """The grammar as llguidance takes it. Raises PromptError if a schema is no JSON object."""
    matcher = _library().LLMatcher
    if grammar.form == "regex":
        return str(matcher.grammar_from_regex(grammar.text))
    if grammar.form == "lark":
        return str(matcher.grammar_from_lark(grammar.text))
    try:
        return str(matcher.grammar_from_json_schema(grammar.text, overrides={"whitespace_pattern": WHITESPACE}))
    except ValueError as error:
        raise _invalid(grammar, str(error)) from error


def _invalid(grammar: Grammar, reason: str) -> PromptError:
    name = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "grammar"}[grammar.form]
    return PromptError(
        f"the {name} cannot be used: expected one that a text can match and llguidance enforces; found: "
        f"{printable(' '.join(reason.split()), MOST_REASON)}. Change it."
    )


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise PromptError(
            "a text can be held to a grammar only with llguidance, which is not installed: run `pip install "
            "'aspec[grammar]'`, or leave out response_format and tools."
        ) from error
    return llguidance
