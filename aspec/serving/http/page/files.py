"""The page's files: plain HTML, CSS and JavaScript beside this module, which ask nothing of other servers."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

TYPES = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
PATHS = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
"""The browser runs and asks for nothing but what this server has, also if a model's text were taken for HTML."""


def page_routes() -> list[Route]:
    """A route for each file."""
    return [Route(path, _file(name)) for path, name in PATHS.items()]


def _file(name: str) -> Callable[[HttpRequest], Awaitable[Response]]:
    body = Path(__file__).with_name(name).read_bytes()

    async def send(request: HttpRequest) -> Response:
        return Response(body, headers=HEADERS, media_type=TYPES[name])

    return send
