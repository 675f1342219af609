"""Requests that are refused before any route: other sites, other names, no token, too much, too slow. No model is needed for that."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from omni_jax.serve.guards import COOKIE, LOOPBACK, Guard, Refused, Rules, refused
from omni_jax.serve.heads import PromptHeads

TOKEN = "0123456789abcdefXYZ"


async def _answer(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


async def _file(request: Request) -> Response:
    return FileResponse(__file__)


def client(rules: Rules, base_url: str = "http://127.0.0.1:8000") -> TestClient:
    routes = [Route(path, _answer, methods=["GET", "POST"]) for path in ("/", "/v1/search", "/media/1/image", "/health")]
    routes.append(Route("/file", _file))
    handlers: Any = {Refused: lambda _, error: refused(error.status, str(error))}
    return TestClient(Starlette(routes=routes, middleware=[Middleware(Guard, rules=rules)], exception_handlers=handlers), base_url=base_url)


def line_of(response: Any) -> str:
    line = response.json()["error"]["message"]
    assert "\n" not in line and line
    return line


def test_refusals_of_the_server_library_have_the_same_form() -> None:
    """Starlette's own are plain text; what a client needs of their heads is kept."""
    there = client(Rules())
    answers = [
        (there.get("/nowhere"), 404, "not found"),
        (there.put("/v1/search"), 405, "method not allowed"),
        (there.get("/file", headers={"range": "bytes=9-3"}), 400, "range"),
        (there.get("/file", headers={"range": "bytes=99999999-"}), 416, "range not satisfiable"),
    ]
    for response, status, words in answers:
        assert response.status_code == status and words in line_of(response).lower()
        assert response.headers["content-type"] == "application/json" and "content-security-policy" in response.headers
    assert set(answers[1][0].headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}
    # The lowest allowed Starlette leaves out the unit.
    assert answers[3][0].headers["content-range"].removeprefix("bytes ").startswith("*/")
    assert there.get("/file", headers={"range": "bytes=0-9"}).status_code == 206


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "LOCALHOST", "[::1]:8000", "[::1]"])
def test_names_of_this_machine_are_answered(host: str) -> None:
    assert client(Rules()).get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "127.0.0.2", "", "localhost.", "[::2]:8000", "a" * 5000]
)
def test_another_name_for_this_machine_is_not_answered(host: str) -> None:
    """What a browser sends after a name of an attacker's was pointed at 127.0.0.1."""
    response = client(Rules()).get("/", headers={"host": host})
    assert response.status_code == 421 and "--allow-host" in line_of(response)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://127.0.0.1:9000", "http://localhost:8000", "file://", "", "http://[::1"]
)
@pytest.mark.parametrize("path", ["/v1/search", "/media/1/image", "/"])
def test_requests_of_other_sites_are_refused(origin: str, path: str) -> None:
    response = client(Rules()).post(path, headers={"origin": origin}, content=b"x")
    assert response.status_code == 403 and line_of(response) == "requests of other sites are not answered"


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_what_another_site_embeds_is_refused_and_a_followed_link_is_not(site: str) -> None:
    there = client(Rules())
    assert there.get("/media/1/image", headers={"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}).status_code == 403
    assert there.get("/v1/search", headers={"sec-fetch-site": site, "sec-fetch-mode": "navigate"}).status_code == 403
    assert there.get("/", headers={"sec-fetch-site": site, "sec-fetch-mode": "navigate"}).status_code == 200
    assert there.get("/media/1/image", headers={"sec-fetch-site": "same-origin"}).status_code == 200
    assert there.post("/v1/search", headers={"origin": "http://127.0.0.1:8000"}).status_code == 200


def test_every_answer_confines_its_page() -> None:
    nonces = set()
    for path, host in (("/", "localhost"), ("/nowhere", "localhost"), ("/", "evil.example")):
        headers = client(Rules()).get(path, headers={"host": host}).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert (headers["x-content-type-options"], headers["cross-origin-resource-policy"]) == ("nosniff", "same-origin")
        nonces |= set(re.findall(r"'nonce-([\w-]{20,})'", policy))
    assert len(nonces) == 3


def test_a_token_is_asked_for() -> None:
    there = client(Rules((), TOKEN))
    for headers in (
        {},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": TOKEN},
        {"cookie": f"{COOKIE}=no"},
        {"cookie": "\x01=;;="},
    ):
        response = there.post("/v1/search", headers=headers)
        assert response.status_code == 401 and "Bearer" in line_of(response)
    assert there.post("/v1/search", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert there.get("/health").status_code == 200
    assert there.get("/", params={"token": "wrong"}).status_code == 401


def test_the_page_keeps_the_token_in_a_cookie_that_no_script_reads() -> None:
    there = client(Rules((), TOKEN))
    response = there.get("/", params={"token": TOKEN}, follow_redirects=False)
    kept = response.headers["set-cookie"].lower()
    assert response.status_code == 303 and response.headers["location"] == "/"
    assert "httponly" in kept and "samesite=strict" in kept
    assert there.get("/").status_code == 200 and there.post("/v1/search").status_code == 200


def test_too_much_is_refused_whether_or_not_it_is_declared() -> None:
    there = client(Rules(max_bytes=100))
    assert there.post("/v1/search", content=b"x" * 100).text == "100"
    undeclared = (b"x" * 30 for _ in range(10))
    for content in (b"x" * 101, undeclared):
        response = there.post("/v1/search", content=content)
        assert response.status_code == 413 and "--max-upload" in line_of(response)
    assert there.post("/v1/search", headers={"content-length": "-5"}).status_code == 413


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    """As a client does that sends a byte now and then to keep a place."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    async def read(scope: Any, receive: Any, send: Any) -> None:
        while True:
            await receive()

    scope = {"type": "http", "path": "/v1/search", "headers": [(b"host", b"localhost")], "method": "POST", "query_string": b""}
    asyncio.run(Guard(read, Rules(max_seconds=0.1))(scope, receive, send))
    assert sent[0]["status"] == 408 and b"took longer than 0.1 s" in sent[1]["body"]


def test_half_a_head_does_not_keep_its_place_and_what_is_none_is_refused() -> None:
    """Beside a client that sends whole ones now and then."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("answer")(scope, receive, send)

    async def work() -> None:
        config = uvicorn.Config(app, http=PromptHeads, ws="none", lifespan="off", log_level="critical", timeout_keep_alive=1)
        server = uvicorn.Server(config)
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            running = asyncio.create_task(server.serve([bound]))
            while not server.started:
                await asyncio.sleep(0.01)
            port = bound.getsockname()[1]
            silent, slow, good = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            for turn in range(6):
                slow[1].write(b"x" if turn < 3 else b"")
                good[1].write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
                assert b"200 OK" in await good[0].readuntil(b"answer")
                await asyncio.sleep(0.25)
            for reader, _ in (silent, slow):
                assert await asyncio.wait_for(reader.read(), 1) == b""
            for head in (b"no request\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\na b\r\n\r\n", b"GET /" + b"a" * 70_000):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(head)
                answer, _, body = (await asyncio.wait_for(reader.read(), 5)).partition(b"\r\n\r\n")
                assert answer.startswith(b"HTTP/1.1 400 ") and json.loads(body)["error"]["message"] == "Invalid HTTP request received."
                writer.close()
            for _, writer in (silent, slow, good):
                writer.close()
            server.should_exit = True
            await running

    asyncio.run(work())


def test_loopback_names_are_the_default() -> None:
    assert Rules().hosts == LOOPBACK and Rules().token is None
