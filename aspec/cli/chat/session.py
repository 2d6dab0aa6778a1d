"""A conversation with an open engine: a message becomes a turn; an answer that is stopped or fails harms nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from aspec.cli.chat.answering import Answering
from aspec.cli.chat.conversation import Conversation, Turn, fit
from aspec.cli.interrupts import present
from aspec.engine.engine import Engine
from aspec.errors import PromptError
from aspec.generation.params import SamplingParams
from aspec.generation.sampler import derive_seed
from aspec.observe.console import Console
from aspec.planning.resolve import Resolved


class Session:
    """The conversation and its settings; mutable, because entries change them."""

    def __init__(
        self,
        resolved: Resolved,
        engine: Engine,
        answering: Answering,
        console: Console,
        start_params: SamplingParams,
        system: str | None,
    ) -> None:
        self.engine, self.console, self.talk = engine, console, Conversation(system or None)
        self._resolved, self._answering = resolved, answering
        self.params = self.start_params = start_params
        self.leaving = False  # a command has ended the chat
        self._num_repeats = 0  # earlier answers to the newest message
        self._answered: tuple[list[int], SamplingParams] | None = None  # the prompt and settings of the last answer

    def encode(self, messages: Sequence[Mapping[str, str]], said: Sequence[int] = ()) -> list[int]:
        """The tokens of messages, see ``Tokenizer.encode_chat``. Raises PromptError if the template refuses them."""
        return self.engine.tokenizer.encode_chat(messages, said)

    def note(self, text: str) -> None:
        """Tell what a command did, on a terminal only."""
        if self.console.stderr.is_terminal:
            self.console.note(text)

    @property
    def model(self) -> str:
        """The target, as the user named it."""
        return str(self._resolved.options.target or "the embedded demo pair")

    @property
    def draft(self) -> str:
        """The draft, as the user named it."""
        named = self._resolved.options.draft
        if self.engine.plan.request.from_text:
            return str(named or "the text itself")
        return str(named or "embedded") if self._resolved.method.has_model else "none"

    @property
    def num_used(self) -> int | None:
        """Tokens of the context that the conversation fills; None if the chat template refuses it."""
        turns = self.talk.turns[self.talk.num_left_out :]
        if turns and turns[-1].tokens:
            return len(turns[-1].tokens)
        try:
            return len(self.encode(messages)) if (messages := self.talk.messages()) else 0
        except PromptError:
            return None

    def answer(self, text: str) -> None:
        """Answer a message. Raises PromptError if that is impossible; the conversation is then unchanged."""
        self._num_repeats, talk = 0, self.talk
        self.talk = replace(talk, unanswered=text)  # until the answer has a token
        try:
            self._take_turn(talk, text, self.params)
        except KeyboardInterrupt:  # while the message became tokens
            present().settle()
            self._note_no_answer()
        except BaseException:
            self.talk = talk
            raise

    def answer_again(self) -> None:
        """Replace the newest answer; the old one stays if the new one is stopped before its first token."""
        text = self.talk.last_user
        if text is None:
            raise PromptError("there is no message to answer again: write one.")
        params, base = self.params, self.talk.without_last()
        if params.temperature > 0.0 and self.talk.unanswered is None:
            self._num_repeats += 1
            params = replace(params, seed=derive_seed(params.seed, self._num_repeats))
            self.console.note(f"another answer, with seed {params.seed}")
        self._take_turn(base, text, params, again=True)

    def _take_turn(self, base: Conversation, text: str, params: SamplingParams, *, again: bool = False) -> None:
        """Add a message and its answer to ``base``."""
        talk, prompt = fit(base, text, self.encode, self.engine.max_context, params.max_new_tokens)
        if again and params.temperature == 0.0 and self._answered == (prompt, params):
            raise PromptError(
                "the answer would be the same: with temperature 0 the likeliest token is always taken. /set "
                "temperature 0.7 allows other answers."
            )
        if dropped := talk.num_left_out - base.num_left_out:
            turns = "oldest turn is" if dropped == 1 else f"{dropped} oldest turns are"
            self.console.note(f"the context is full: the {turns} dropped from it; /save keeps all turns")
        answer = self._answering.ask(prompt, params)
        if not answer.pieces:
            self._note_no_answer()
            return
        self._answered = (prompt, params) if answer.is_whole else None
        self.talk = talk.with_turn(Turn(text, answer.text, (*prompt, *answer.token_ids)))

    def _note_no_answer(self) -> None:
        self.console.note("stopped before the answer began: /regen sends the message again")
