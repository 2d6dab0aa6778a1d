"""Which requests are let in: those with the key, and none that a foreign page makes a browser send."""

import hmac
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from aspec.serving.http.errors import HttpError
from aspec.serving.http.page.files import PATHS as PAGE

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
OPEN = frozenset({"/health", *PAGE})  # paths that tell nothing and need no key


@dataclass(frozen=True, slots=True)
class Guard:
    """The rules of one server."""

    key: str | None  # None: everybody is let in
    hosts: frozenset[str] | None  # names under which a loopback server may be asked; None: any

    def check(self, scope: Any) -> None:
        """Raise HttpError for a request that is not let in."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if self.hosts is not None and _name_of(host) not in self.hosts:
            # a foreign name that resolves to this machine: a page elsewhere asks through a browser (DNS rebinding)
            raise HttpError(403, "the Host header names another server: use 127.0.0.1 or localhost", code="wrong_host")
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise HttpError(403, "pages of other servers may not ask this one", code="wrong_origin")
        if self.key is None or scope["path"] in OPEN:
            return
        scheme, _, given = headers.get(b"authorization", "").partition(" ")
        fits = hmac.compare_digest(given.strip().encode("latin-1"), self.key.encode())
        if scheme.lower() != "bearer" or not fits:
            raise HttpError(401, "the key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key")


def _name_of(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
