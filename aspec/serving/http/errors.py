"""The status and the error object of everything that can go wrong with a request."""

import json
from typing import Any

from aspec.errors import AspecError, ClosedError, DeviceError, NoTokenError, NumericError, PromptError
from aspec.serving.refusals import Refusal, one_line

RETRY_S = 5  # after which a client may ask again, where nothing better is known


class HttpError(Exception):
    """A request that gets no answer: the status, OpenAI's error object, and when to try again."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_s: int | None = None
    ) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        kind = "rate_limit_error" if status == 429 else kind
        self.status, self.retry_s = status, retry_s
        self.refusal = Refusal(one_line(message), kind, param, code)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": self.refusal.body()}

    def response(self) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Status, headers and body."""
        data = json.dumps(self.body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        if self.retry_s is not None:
            headers.append((b"retry-after", str(self.retry_s).encode()))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.status in (408, 413):
            headers.append((b"connection", b"close"))  # the rest of the body is not read
        return self.status, headers, data


def as_http(error: Exception) -> HttpError:
    """Any error as the one that a client is told; what is no error of aspec tells nothing but that it happened."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, PromptError | NumericError):
        refusal = Refusal.of(error)
        status = 500 if refusal.type == "server_error" and not isinstance(error, NoTokenError) else 400
        return HttpError(status, refusal.message, code=refusal.code, param=refusal.param)
    if isinstance(error, ClosedError):
        return HttpError(503, "the server is stopping", code="stopping", retry_s=RETRY_S)
    if isinstance(error, DeviceError):
        return HttpError(503, "the engine has failed; the server's own output names the reason", code="engine_failed")
    name = type(error).__name__ if isinstance(error, AspecError) else "an internal error"
    return HttpError(500, f"{name}: the server's own output says more", code="internal_error")
