"""A conversation as a value: its turns, and those that a full context leaves out. No model, no terminal, no files."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from aspec.errors import PromptError

Encode = Callable[[Sequence[Mapping[str, str]], Sequence[int]], list[int]]
"""Messages to the tokens of a prompt, which begin with the second argument where the text allows it."""

KEPT_SHARE = 2  # a conversation that does not fit keeps the newest turns that fill half of the context
ANSWER_SHARE = 4  # a quarter of the context stays free for an answer, or less if an answer is shorter


@dataclass(frozen=True, slots=True)
class Turn:
    """A message and its answer."""

    user: str
    answer: str
    tokens: tuple[int, ...] = ()  # of the prompt and the answer, whose KV may be cached; empty: unknown


@dataclass(frozen=True, slots=True)
class Conversation:
    """All turns so far. The model sees the system message and the turns that are not left out."""

    system: str | None = None
    turns: tuple[Turn, ...] = ()
    num_left_out: int = 0  # of the oldest turns
    unanswered: str | None = None  # a last message whose answer was stopped before its first token

    @property
    def last_user(self) -> str | None:
        """The newest message of the user, answered or not."""
        return self.unanswered if self.unanswered is not None or not self.turns else self.turns[-1].user

    def messages(self, user: str | None = None) -> list[dict[str, str]]:
        """The messages that the model sees, with a new one of the user."""
        texts = [("system", self.system)] if self.system else []
        for turn in self.turns[self.num_left_out :]:
            texts += [("user", turn.user), ("assistant", turn.answer)]
        return [{"role": role, "content": text} for role, text in (*texts, ("user", user)) if text is not None]

    def prompt(self, user: str, encode: Encode) -> list[int]:
        """The tokens of a new message after all that the model sees. May raise PromptError."""
        return encode(self.messages(user), self.turns[-1].tokens if self.turns else ())

    def with_turn(self, turn: Turn) -> "Conversation":
        """The conversation with a new turn."""
        return replace(self, turns=(*self.turns, turn), unanswered=None)

    def without_last(self) -> "Conversation":
        """The conversation without its newest message and the answer to it."""
        if self.unanswered is not None:
            return replace(self, unanswered=None)
        turns = self.turns[:-1]
        return replace(self, turns=turns, num_left_out=min(self.num_left_out, len(turns)))


def fit(talk: Conversation, user: str, encode: Encode, context: int, max_new: int) -> tuple[Conversation, list[int]]:
    """Leave the oldest turns out until ``context`` tokens hold a new message; returns also the tokens of the prompt.

    Every turn stays while an answer has room: ``max_new`` tokens, or a quarter of the context. Then many turns go at
    once, because the model reads all turns again that follow a gap. Raises PromptError if the message alone is too
    long, or if the chat template refuses the conversation.
    """
    prompt = talk.prompt(user, encode)
    if len(prompt) + max(1, min(max_new, context // ANSWER_SHARE)) <= context:
        return talk, prompt
    shortest = replace(talk, num_left_out=len(talk.turns))
    alone = shortest.prompt(user, encode) if talk.num_left_out < len(talk.turns) else prompt
    if len(alone) >= context:
        raise PromptError(
            f"this message alone, with the system message, has {len(alone)} tokens; the context holds {context}, and "
            f"at least one must stay free for the answer. The conversation is unchanged: write a shorter message, or "
            f"restart with a larger --max-context."
        )

    def is_short(num_left_out: int) -> bool:
        return len(replace(talk, num_left_out=num_left_out).prompt(user, encode)) <= context // KEPT_SHARE

    counts = range(talk.num_left_out + 1, len(talk.turns))
    fitting = replace(talk, num_left_out=counts.start + bisect_left(counts, True, key=is_short)) if counts else shortest
    return fitting, fitting.prompt(user, encode)


def check_system(system: str | None, encode: Encode) -> None:
    """Raise PromptError if the chat template refuses or ignores a system message."""
    if not system:
        return
    user = {"role": "user", "content": "Hi"}
    try:
        with_system = encode([{"role": "system", "content": system}, user], ())
    except PromptError as error:
        reason = str(error).partition(". Change")[0]
        raise PromptError(
            f"the system message cannot be used: {reason}. Chat without one, or write it into the first message."
        ) from error
    if with_system == encode([user], ()):
        raise PromptError(
            "the chat template ignores system messages: the model would not see this one. Chat without one, or write "
            "it into the first message."
        )
