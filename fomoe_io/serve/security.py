"""Who may call: hosts, origins and keys, checked before anything else is read."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fomoe_io.serve.errors import ApiError, forbidden, not_authorized
from fomoe_io.serve.settings import ServeConfig

PUBLIC = frozenset({"/", "/index.html", "/page.js", "/favicon.ico", "/health", "/v1/health", "/models", "/v1/models"})
"""Paths that need no key, as in llama-server: whether there is a model, its name, and a page without data."""


class Guard:
    """Wraps an application.

    A page of another site that a user happens to visit must not reach a server on the same machine.  Two ways lead
    there: a request to this address, which its `Origin` gives away, and a name that resolves to it, which `Host` does.

    Parameters
    ----------
    app : ASGI application
    config : ServeConfig
    answer : callable
        Sends an error: `answer(scope, receive, send, error)`.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, answer: Any) -> None:
        self._app = app
        self._answer = answer
        self._origins = config.allowed_origins
        self._keys = [_digest(key) for key in config.api_keys]
        own = {"localhost", socket.gethostname().lower(), config.host.lower()}
        self._hosts = own | {name.lower() for name in config.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, then pass on."""
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        try:
            self._check_host(headers)
            self._check_origin(origin, headers)
        except ApiError as error:
            return await self._answer(scope, receive, send, error)
        sender = send if origin is None else _with_headers(send, _cors_headers(origin))
        if scope["method"] == "OPTIONS" and origin is not None:
            return await _answer_preflight(sender)
        if not self._may_enter(scope["path"], headers):
            return await self._answer(scope, receive, sender, not_authorized())
        await self._app(scope, receive, sender)

    def _check_host(self, headers: Headers) -> None:
        names = headers.getlist("host")
        name = host_of(names[0]) if len(names) == 1 else None
        if name is None or not (_is_address(name) or name in self._hosts or name.endswith(".localhost")):
            said = names[0][:80] if names else ""
            raise forbidden(f"host {said!r} is not this server's name: start it with --allow-host NAME to let it be")

    def _check_origin(self, origin: str | None, headers: Headers) -> None:
        if origin is None or "*" in self._origins or origin in self._origins:
            return
        _, _, netloc = origin.partition("://")
        if netloc and netloc == headers.get("host"):
            return
        name = host_of(netloc) or ""
        if name == "localhost" or name.endswith(".localhost") or (_is_address(name) and _address(name).is_loopback):
            return
        raise forbidden(f"origin {origin[:80]!r} may not call: start the server with --cors ORIGIN to let it")

    def _may_enter(self, path: str, headers: Headers) -> bool:
        if not self._keys or path in PUBLIC:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        offered = [token.strip() if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
        # all are compared, whichever fits, and digests have one length: the time taken says nothing
        fits = [hmac.compare_digest(_digest(given), key) for given in offered for key in self._keys]
        return any(fits)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def host_of(netloc: str) -> str | None:
    """The name in a Host header, without the port; None when it is none."""
    try:
        return urlsplit(f"//{netloc}").hostname
    except ValueError:
        return None


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(name)


def _is_address(name: str) -> bool:
    try:
        _address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address to listen on."""
    return host == "localhost" or (_is_address(host) and _address(host).is_loopback)


def _cors_headers(origin: str) -> dict[str, str]:
    return {
        "access-control-allow-origin": origin,
        "access-control-allow-credentials": "true",
        "access-control-expose-headers": "retry-after",
        "vary": "Origin",
    }


def _with_headers(send: Send, added: dict[str, str]) -> Send:
    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            message.setdefault("headers", [])
            MutableHeaders(scope=message).update(added)
        await send(message)

    return sender


async def _answer_preflight(send: Send) -> None:
    headers = {
        b"access-control-allow-methods": b"GET, POST",
        b"access-control-allow-headers": b"authorization, content-type, x-api-key, anthropic-version, *",
        b"access-control-max-age": b"600",
        b"content-length": b"0",
    }
    await send({"type": "http.response.start", "status": 204, "headers": list(headers.items())[:3]})
    await send({"type": "http.response.body", "body": b""})
