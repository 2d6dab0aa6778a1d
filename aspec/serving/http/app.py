"""The application: its routes, and what every request passes before: the guard, the errors, the counts."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router

from aspec.errors import AspecError, reason_of
from aspec.serving.http.completions import Completions
from aspec.serving.http.errors import HttpError, as_http
from aspec.serving.http.guard import Guard
from aspec.serving.http.limits import Left, Receive
from aspec.serving.http.metrics import CONTENT_TYPE, exposition
from aspec.serving.http.page.files import page_routes
from aspec.serving.http.page.live import Live
from aspec.serving.http.responses import Responses, StoredResponses
from aspec.serving.http.service import Service, State
from aspec.serving.http.writing import Send, send_whole
from aspec.serving.request_fields import CHAT, COMPLETION, RESPONSES

LEFT = 499  # the status of a request whose client has gone, as nginx counts it
PATHS = (CHAT, COMPLETION, RESPONSES, "/v1/models", "/health", "/metrics")  # that metrics name

Log = Callable[[str], None]
"""Takes a line of the log."""


def make_app(service: Service, guard: Guard, warn: Log, log: Log | None = None) -> "Counted":
    """The ASGI application. ``warn`` gets errors that are aspec's own; ``log`` a line per request, if there is one."""
    stored = StoredResponses()
    routes = [
        Route(CHAT, Completions(service, CHAT), methods=["POST"]),
        Route(COMPLETION, Completions(service, COMPLETION), methods=["POST"]),
        Route(RESPONSES, Responses(service, stored), methods=["POST"]),
        Route(f"{RESPONSES}/{{name}}", _stored(stored), methods=["GET", "DELETE"]),
        Route("/v1/models", _models(service)),
        Route("/v1/models/{name:path}", _models(service)),
        Route("/health", _health(service)),
        Route("/metrics", _metrics(service)),
        Route("/live", Live(service)),
        *page_routes(),
    ]
    return Counted(Router(routes), service, guard, warn, log)


class Counted:
    """The outermost application: it guards, answers errors, counts, and logs if asked."""

    def __init__(self, router: Router, service: Service, guard: Guard, warn: Log, log: Log | None) -> None:
        self._router, self._service, self._guard, self._warn, self._log = router, service, guard, warn, log

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens. Raises only to break off a response that has begun."""
        status, begun_s = 0, time.monotonic()

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._guard.check(scope)
            await self._router({**scope, "app": self}, receive, sending)
        except Left:
            status = LEFT
        except Exception as error:
            told = _told(error)
            if told.status == 500 and not isinstance(error, HttpError | AspecError):
                self._warn(f"a request failed: {reason_of(error)}")
            if status:
                status = told.status
                raise
            await send_whole(sending, *told.response())
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self._service.metrics.requests[path, status] += 1
            if self._log is not None:
                self._log(f"{scope['method']} {scope['path']} {status} {time.monotonic() - begun_s:.2f} s")


def _told(error: Exception) -> HttpError:
    """An error as clients are told of it."""
    if not isinstance(error, HTTPException):
        return as_http(error)
    if error.status_code == 405:
        return HttpError(405, "this path takes another method", code="method_not_allowed")
    return HttpError(error.status_code, "there is nothing at this path", code="not_found")


def _models(service: Service) -> Callable[[HttpRequest], Any]:
    async def models(request: HttpRequest) -> Response:
        entries = [_model(service, name) for name in service.names.known]
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": entries})
        return JSONResponse(_model(service, service.names.check(name)))

    return models


def _stored(stored: StoredResponses) -> Callable[[HttpRequest], Any]:
    async def response(request: HttpRequest) -> Response:
        name = request.path_params["name"]
        body = stored.get(name)
        if request.method == "DELETE":
            stored.remove(name)
            body = {"id": name, "object": "response", "deleted": True}
        return JSONResponse(body)

    return response


def _model(service: Service, name: str) -> Mapping[str, Any]:
    context = {"max_model_len": service.engine.max_context} if service.state is State.READY else {}
    return {"id": name, "object": "model", "created": service.names.created, "owned_by": "aspec", **context}


def _health(service: Service) -> Callable[[HttpRequest], Any]:
    async def health(request: HttpRequest) -> Response:
        body = {"status": service.state.value} | ({"reason": service.reason} if service.reason else {})
        return JSONResponse(body, 200 if service.state is State.READY else 503)

    return health


def _metrics(service: Service) -> Callable[[HttpRequest], Any]:
    async def metrics(request: HttpRequest) -> Response:
        text = exposition(service.metrics, service.present(), time.perf_counter())
        return Response(text, headers={"content-type": CONTENT_TYPE.decode()})

    return metrics
