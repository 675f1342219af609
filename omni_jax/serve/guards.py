"""Checks before every route: whose requests are answered, how much they may send and for how long, and what a page may do.

A page of another site must not use this server through a visitor's browser. So `Host` must be a name of this server (a name that somebody
points at 127.0.0.1 is not), `Origin` must be this server's own, and browsers' `Sec-Fetch-Site` may not say that another site asks.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import http
import http.cookies
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
COOKIE = "omni_jax_token"
OPEN = ("/health",)  # answered without a token


class Refused(Exception):
    """A request that is not answered as it asks: a status and one line."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Rules:
    """Who may ask for what.

    Attributes:
      hosts: names, without a port, that `Host` may have; empty for any, which needs a token.
      token: what a client must show; None for nothing.
      max_bytes: bytes of a request's body, at most.
      max_seconds: seconds that a body may take to arrive.
    """

    hosts: tuple[str, ...] = LOOPBACK
    token: str | None = None
    max_bytes: int = 64 << 20
    max_seconds: float = 60.0


class Guard:
    """Middleware that applies the rules, limits bodies, and adds the headers that confine a page."""

    def __init__(self, app: Any, rules: Rules) -> None:
        self._app, self._rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # no websockets here
        scope["nonce"] = nonce = secrets.token_urlsafe(16)
        plain: tuple[int, MutableHeaders] | None = None
        said = b""

        async def confined(message: Message) -> None:
            nonlocal plain, said
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                if message["status"] >= 400 and answer.get("content-type") != JSONResponse.media_type:
                    plain = message["status"], answer  # a refusal of the server library; it is given the form of all others
                    return
                answer.update(_headers(nonce))
            elif plain is not None:
                said += message.get("body", b"")
                if not message.get("more_body", False):
                    (status, answer), plain = plain, None
                    kept = {name: value for name, value in answer.items() if name in ("allow", "content-range")}
                    line = said.decode(errors="replace") or http.HTTPStatus(status).phrase
                    await refused(status, line, kept)(scope, receive, confined)
                return
            await send(message)

        headers = Headers(scope=scope)
        try:
            self._check_origin(headers, scope)
            shown = self._check_token(headers, scope)
            if shown is not None:
                await shown(scope, receive, confined)
                return
            await self._app(scope, self._limited(headers, receive), confined)
        except Refused as refusal:
            await refused(refusal.status, str(refusal))(scope, receive, confined)

    def _check_origin(self, headers: Headers, scope: Scope) -> None:
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            raise Refused(400, "send one Host header")
        name = _name(hosts[0])
        if self._rules.hosts and name not in self._rules.hosts:
            raise Refused(421, f"this server is not called {name[:80]!r}; use the address that it printed, or start it with --allow-host")
        if any(_site(origin) != hosts[0] for origin in headers.getlist("origin")):
            raise Refused(403, "requests of other sites are not answered")
        site = headers.get("sec-fetch-site")
        arrives = scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"  # somebody follows a link
        if site not in (None, "same-origin", "none") and not arrives:
            raise Refused(403, "requests of other sites are not answered")

    def _check_token(self, headers: Headers, scope: Scope) -> Any:
        """Returns an answer that stores a token given in the page's address, None where the request may pass."""
        token = self._rules.token
        if token is None or scope["path"] in OPEN:
            return None
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        if given and scope["path"] == "/" and _same(given, token):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(COOKIE, token, httponly=True, samesite="strict")
            return answer
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        cookies = http.cookies.SimpleCookie()
        try:
            cookies.load(headers.get("cookie", ""))
        except http.cookies.CookieError:
            cookies.clear()
        kept = cookies[COOKIE].value if COOKIE in cookies else ""
        if not (kind.lower() == "bearer" and _same(bearer, token)) and not _same(kept, token):
            raise Refused(401, "send the token as 'Authorization: Bearer TOKEN', or open the page as /?token=TOKEN")
        return None

    def _limited(self, headers: Headers, receive: Receive) -> Receive:
        """Returns `receive` for bodies of limited size that arrive in time."""
        rules, declared = self._rules, headers.get("content-length")
        if declared is not None and (not declared.isdecimal() or int(declared) > rules.max_bytes):
            raise _too_large(rules)
        end, got = time.monotonic() + rules.max_seconds, 0
        whole = False

        async def limited() -> Message:
            nonlocal got, whole
            if whole:  # what follows is the end of the connection, which may take its time
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except TimeoutError:
                raise Refused(408, f"the request took longer than {rules.max_seconds:g} s to arrive") from None
            if message["type"] == "http.request":
                got += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if got > rules.max_bytes:
                    raise _too_large(rules)
            return message

        return limited


def refused(status: int, line: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Returns an error as OpenAI's API has them: one line, with a status."""
    headers = dict(headers or {}) | ({"connection": "close"} if status in (408, 413) else {})  # the rest of the body is not read
    return JSONResponse({"error": {"message": line, "type": "invalid_request_error" if status < 500 else "server_error"}}, status, headers)


def _too_large(rules: Rules) -> Refused:
    return Refused(413, f"the request is larger than {rules.max_bytes / 2**20:g} MiB; send less, or start the server with --max-upload")


def _headers(nonce: str) -> dict[str, str]:
    policy = {
        "default-src": "'none'",
        "script-src": f"'nonce-{nonce}'",
        "style-src": f"'nonce-{nonce}'",
        "img-src": "'self' blob:",
        "media-src": "'self' blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
        "cross-origin-opener-policy": "same-origin",
    }


def _site(origin: str) -> str | None:
    """Host and port of an Origin header; None where it has none."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    return (host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host).lower()


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())
