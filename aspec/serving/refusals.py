"""Why a request gets no answer: the errors of one request, and OpenAI's error object that tells them.

An error's text may hold what a request says, so it is cut, and control characters are escaped.
"""

from dataclasses import dataclass

from aspec.errors import NoTokenError, NumericError, PromptError, printable

MOST_SAID = 600  # characters of a message; one row may have many problems

Refused = PromptError | NumericError
"""The error of one request; other requests are not affected."""


class RequestError(PromptError):
    """A request that cannot be served: a message, the field, one of OpenAI's codes or a word like them."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextExceeded(RequestError):
    """A request needs more tokens than the context holds."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param, "context_length_exceeded")


@dataclass(frozen=True, slots=True)
class Refusal:
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str

    @classmethod
    def of(cls, error: Refused) -> "Refusal":
        """The error object of an error."""
        message = one_line(str(error))
        if isinstance(error, NumericError) and not isinstance(error, NoTokenError):
            return cls(message, "server_error", None, "numeric_error")
        if isinstance(error, RequestError):
            return cls(message, "invalid_request_error", error.param, error.code)
        return cls(message, "invalid_request_error", None, "invalid_prompt")

    def body(self) -> dict[str, str | None]:
        """The object as JSON values."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}


def one_error(problems: list[RequestError]) -> RequestError:
    """All problems of a request in one error, which names the first one's field."""
    text = "; ".join(map(str, problems))
    if len(text) > MOST_SAID:
        text = f"{len(problems)} problems: {text}"
    return RequestError(text, problems[0].param, problems[0].code)


def one_line(text: str) -> str:
    """A text as one printable line of bounded length."""
    return printable(" ".join(printable(text, MOST_SAID).split()), MOST_SAID)
