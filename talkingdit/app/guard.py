# SPDX-License-Identifier: Apache-2.0
"""Who may ask the server for what. Everything passes here before gradio sees it.

Gradio gives files to anyone who knows their path, and fetches what a request calls a file from anywhere. So a browser
has a token in a cookie, a program one in a header, and a file is for the token that brought it, or for which it was
made. Other sites' pages cannot use the server by way of a person's browser, and of gradio's addresses only those are
open that the page needs.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE, HEADER = "talkingdit", "x-talkingdit-token"
TOKEN = re.compile(r"[A-Za-z0-9_-]{16,128}")
YEAR = 365 * 24 * 3600
FRAME = 4096  # bytes around the file in an upload
MOST_FILES = 1000  # that are known before those that are gone are forgotten
MOST_JSON = 4 << 20  # bytes of a request that is no upload
API = "/gradio_api/"
UPLOAD, FILE = API + "upload", API + "file="
OPEN = (
    "/theme.css",
    "/config",
    "/static/",
    "/assets/",
    "/svelte/",
    "/favicon.ico",
    "/robots.txt",
    "/manifest.json",
    "/talkingdit/",
)
OPEN_API = (
    *("upload", "upload_progress", "file=", "queue/", "run/", "call/", "api/", "info", "openapi.json"),
    *("heartbeat/", "cancel", "reset", "theme.css", "startup-events", "app_id"),
)
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; form-action 'self'; frame-ancestors 'none'; base-uri 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-dns-prefetch-control", b"off"),
]


def token_in(headers: Mapping[str, str]) -> str:
    """The token of a browser or a program; "" where there is none."""
    found = headers.get(HEADER, "")
    if not found:
        try:
            jar = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return ""
        found = jar[COOKIE].value if COOKIE in jar else ""
    return found if TOKEN.fullmatch(found) else ""


class Shares:
    """Which files under gradio's folder are for whom."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: dict[str, set[str]] = {}
        self._most = MOST_FILES

    def add(self, path: str | Path, token: str) -> None:
        with self._lock:
            self._owners.setdefault(_real(path), set()).add(token)
            if len(self._owners) > self._most:  # gradio removes files after a day
                self._owners = {file: tokens for file, tokens in self._owners.items() if Path(file).exists()}
                self._most = max(MOST_FILES, 2 * len(self._owners))

    def allows(self, path: str | Path, token: str) -> bool:
        with self._lock:
            return bool(token) and token in self._owners.get(_real(path), ())


def _real(path: str | Path) -> str:
    try:
        return str(Path(path).resolve())
    except (OSError, ValueError, RuntimeError):  # a zero byte, a circle of links
        return ""


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        sentence: for whoever asks.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class RequestGuard:
    """ASGI middleware around everything.

    Args:
        app: what is guarded.
        shares: files of people; uploads are added to it.
        password: that everybody needs; "" for none.
        hosts: names of the server that a browser may call it by; none: any.
        limit: bytes of an upload.
    """

    def __init__(self, app: App, shares: Shares, password: str, hosts: Iterable[str], limit: int) -> None:
        self._app, self._shares, self._password, self._limit = app, shares, password, limit
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check_caller(headers)
            token = token_in(headers)
            fresh = "" if token else secrets.token_urlsafe(24)
            receive = await self._check_request(scope, headers, token, receive)
        except Refused as error:
            await _refuse(send, error)
            return
        answer = _Answer(send, self._shares, scope, token, fresh)
        upload = receive if isinstance(receive, _Counted) else None

        async def reply(message: Message) -> None:
            if upload is None or not upload.exceeded:  # what is said of an upload that was cut off helps nobody
                await answer(message)

        try:
            await self._app(scope, receive, reply)
        except Exception:
            if upload is None or not upload.exceeded:
                raise
        if upload is not None and upload.exceeded and not answer.started:
            await _refuse(send, Refused(413, self.too_large))

    def _check_caller(self, headers: Mapping[str, str]) -> None:
        host = headers.get("host", "")
        if self._hosts and urlsplit(f"//{host}").hostname not in self._hosts:
            raise Refused(421, f"expected one of {', '.join(sorted(self._hosts))} as the host, got another.")
        origin = headers.get("origin", "")
        if origin and urlsplit(origin).netloc != host:
            raise Refused(403, "a page of another site may not use this server.")
        if self._password and not self._knows(headers.get("authorization", "")):
            raise Refused(401, "expected the password of this server.")

    def _knows(self, given: str) -> bool:
        kind, _, words = given.partition(" ")
        try:
            said = base64.b64decode(words, validate=True).partition(b":")[2]
        except ValueError:
            return False
        return kind.lower() == "basic" and secrets.compare_digest(said, self._password.encode())

    async def _check_request(self, scope: Scope, headers: Mapping[str, str], token: str, receive: Receive) -> Receive:
        path = scope["path"]
        if not _open(path):
            raise Refused(404, "there is nothing at this address.")
        if path.startswith(FILE) and not self._shares.allows(unquote(path.removeprefix(FILE)), token):
            raise Refused(404, "there is no such file for you.")
        if scope["method"] in ("GET", "HEAD"):
            return receive
        if not token:
            raise Refused(403, f"a program must send a header {HEADER} with 16 or more letters and digits of its own.")
        size = int(headers.get("content-length", "0") or "0") if headers.get("content-length", "0").isdecimal() else 0
        if path.rstrip("/") == UPLOAD:
            if size > self._limit + FRAME:
                raise Refused(413, self.too_large)
            return _Counted(receive, self._limit + FRAME)
        body = await _body(receive)
        self._check_files(body, token)
        return _replay(body, receive)

    @property
    def too_large(self) -> str:
        """The sentence about an upload over the limit."""
        return f"the file is too large: this server takes up to {self._limit // 1_000_000} MB."

    def _check_files(self, body: bytes, token: str) -> None:
        """A request may name files only that are for its token: no other's, none of the machine, none elsewhere."""
        if not body:
            return
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(400, "expected JSON.") from None
        for path in _paths(found):
            if not self._shares.allows(path, token):
                raise Refused(403, "a file that was asked for is not one that you have uploaded.")


def _open(path: str) -> bool:
    if path.startswith(API):
        return path.removeprefix(API).startswith(OPEN_API)
    return path == "/" or path.startswith(OPEN)


def _paths(value: Any) -> Iterable[str]:
    """What gradio takes for files in a request."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            for name in ("path", "url"):
                said = one.get(name)
                if isinstance(said, str) and (name == "path" or "meta" in one or "path" in one):
                    yield from _named(said)
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)


def _named(said: str) -> Iterable[str]:
    """The file that a path or an address names, by our own address or without; another address stands for itself."""
    mark = said.find(FILE)
    yield unquote(said[mark + len(FILE) :]) if mark >= 0 else said


async def _body(receive: Receive) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the request is not whole.")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MOST_JSON:
            raise Refused(413, "the request is too large.")
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


class _Counted:
    """What comes of an upload, whose length may be unknown or wrong; over the limit it ends."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self._limit, self._seen = receive, limit, 0

    @property
    def exceeded(self) -> bool:
        return self._seen > self._limit

    async def __call__(self) -> Message:
        message = await self._receive()
        self._seen += len(message.get("body", b""))
        return {"type": "http.disconnect"} if self.exceeded else message


class _Answer:
    """Sends an answer on: with our headers, with a token for a browser that has none; uploads are written down."""

    def __init__(self, send: Send, shares: Shares, scope: Scope, token: str, fresh: str) -> None:
        self._send, self._shares, self._token, self._fresh = send, shares, token, fresh
        self._upload = scope["method"] == "POST" and scope["path"].rstrip("/") == UPLOAD
        self._body = b""
        self.started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            named = {name for name, _ in HEADERS}
            headers = [(name, value) for name, value in message["headers"] if name.lower() not in named]
            if self._fresh:
                cookie = f"{COOKIE}={self._fresh}; Path=/; Max-Age={YEAR}; HttpOnly; SameSite=Strict"
                headers.append((b"set-cookie", cookie.encode()))
            self._upload = self._upload and message["status"] == 200
            message = {**message, "headers": [*headers, *HEADERS]}
        elif message["type"] == "http.response.body" and self._upload:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                for path in json.loads(self._body):
                    self._shares.add(path, self._token)
        await self._send(message)


async def _refuse(send: Send, error: Refused) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS]
    if error.status == 401:
        headers.append((b"www-authenticate", b'Basic realm="talkingdit", charset="UTF-8"'))
    body = f"{error}\n".encode()
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
