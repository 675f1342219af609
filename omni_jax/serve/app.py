"""The routes: a page, `/v1/embeddings`, `/v1/search`, media of results, health and metrics."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from omni_jax import __version__
from omni_jax.media.workers import CannotStart
from omni_jax.retrieval.rows import finished
from omni_jax.serve.batching import Batcher, Busy
from omni_jax.serve.embedding import Embedder
from omni_jax.serve.guards import Guard, Refused, Rules, refused
from omni_jax.serve.library import Library
from omni_jax.serve.requests import Query, read_query
from omni_jax.types import ClipError, Features, InputError

TEMPLATES = Path(__file__).parent / "templates"
MOST_RESULTS = 1000
SEARCHES = 64  # queries that are compared with a table together
PREFIX = "omni_jax"  # of the names of metrics


def make_app(embedder: Embedder, library: Library, rules: Rules, name: str) -> Starlette:
    """Returns the ASGI application. `name`: what the model is called in answers."""
    service = _Service(embedder, library, name)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        batches = [asyncio.create_task(batcher.run()) for batcher in (embedder.batcher, service.searches)]
        try:
            yield
        finally:
            for running in batches:
                running.cancel()
            embedder.close()

    routes = [
        Route("/", service.page, methods=["GET"]),
        Route("/v1/embeddings", service.counted(service.embeddings), methods=["POST"]),
        Route("/v1/search", service.counted(service.search), methods=["POST"]),
        Route("/v1/models", service.models, methods=["GET"]),
        Route("/media/{number}/{kind}", service.media, methods=["GET"]),
        Route("/favicon.ico", lambda _: Response(status_code=204), methods=["GET"]),  # browsers ask for it
        Route("/health", service.health, methods=["GET"]),
        Route("/metrics", service.metrics, methods=["GET"]),
    ]
    handlers: Mapping[Any, Any] = {
        Refused: lambda _, error: refused(error.status, str(error)),
        ClipError: lambda _, error: refused(422, str(error)),
        InputError: lambda _, error: refused(400, str(error)),
        Busy: lambda _, error: _later("too many requests wait; try again in a moment"),
        CannotStart: lambda _, error: _later(str(error)),
        HTTPException: lambda _, error: refused(error.status_code, str(error.detail), error.headers),
        Exception: lambda _, error: refused(500, "the server failed; its log says how"),
    }
    return Starlette(routes=routes, middleware=[Middleware(Guard, rules=rules)], exception_handlers=handlers, lifespan=lifespan)


class _Service:
    def __init__(self, embedder: Embedder, library: Library, name: str) -> None:
        self.embedder, self.library, self.name = embedder, library, name
        self.searches = Batcher(library.searches, SEARCHES, embedder.most_waiting, kind=lambda asked: asked[0], wait_s=0)
        self.started = int(time.time())
        environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined)
        self._page = environment.get_template("page.html.j2")
        self.registry = CollectorRegistry()
        self._requests = Counter(f"{PREFIX}_requests", "Requests answered.", ["route", "status"], registry=self.registry)
        self._seconds = Histogram(
            f"{PREFIX}_request_seconds", "Seconds from a request's head to its answer.", ["route"], registry=self.registry
        )
        batcher = embedder.batcher
        for metric, text, value in (
            ("waiting_items", "Items that wait for the encoder.", lambda: batcher.waiting),
            ("encoded_items", "Items encoded.", lambda: batcher.items),
            ("encoded_batches", "Batches encoded.", lambda: batcher.batches),
            ("compiled_programs", "Programs compiled for shapes.", lambda: len(embedder.model.programs)),
        ):
            Gauge(f"{PREFIX}_{metric}", text, registry=self.registry).set_function(value)

    def counted(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Returns an endpoint whose requests, and what they take, are in the metrics."""

        async def answer(request: Request) -> Response:
            begun, status, route = time.perf_counter(), "500", request.url.path
            try:
                response = await endpoint(request)
                status = str(response.status_code)
                return response
            except (Refused, ClipError, InputError, Busy, HTTPException) as error:
                status = str(
                    getattr(error, "status", None)
                    or getattr(error, "status_code", None)
                    or (503 if isinstance(error, Busy | CannotStart) else 422)
                )
                raise
            finally:
                self._requests.labels(route, status).inc()
                self._seconds.labels(route).observe(time.perf_counter() - begun)

        return answer

    async def page(self, request: Request) -> Response:
        sizes = self.library.sizes
        return HTMLResponse(
            self._page.render(nonce=request.scope["nonce"], sizes=sizes, records=len(self.library.ids), name=self.name, version=__version__)
        )

    async def embeddings(self, request: Request) -> Response:
        """The embeddings of a caption, an object, a list of these, or a form's files, in the shape of OpenAI's API."""
        query = await read_query(request)
        form = _choice(query, "encoding_format", ("float", "base64"), "float")
        width = _number(query, "dimensions", self.embedder.model.dim, self.embedder.model.dim)
        prompt = self._prompt(query, None)
        rows, features = await self.embedder.vectors(query.items, prompt)
        rows = finished(rows, width, normalize=True, precision="float32").astype("<f4")
        tokens = sum(self.embedder.model.count_tokens(item.record.text) for item in features if item.record.text)
        data = [
            {"object": "embedding", "index": i, "embedding": base64.b64encode(row).decode() if form == "base64" else row.tolist()}
            for i, row in enumerate(rows)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": self.name, "usage": usage})

    async def search(self, request: Request) -> Response:
        """The records nearest to a caption, an object or a form's files."""
        query = await read_query(request)
        if len(query.items) > 1:
            raise Refused(400, f"input holds {len(query.items)} items; a search has one")
        k = _number(query, "k", MOST_RESULTS, 10)
        chosen = query.options.get("table")
        if chosen is not None and not (isinstance(chosen, str) and len(chosen) < 80):
            raise Refused(400, "table is no name; give one of the tables")
        if chosen is not None:
            self.library.table_for("text", chosen)  # before the media are decoded
        begun = time.perf_counter()
        rows, (features,) = await self.embedder.vectors(query.items, self._prompt(query, "query"))
        embedded = time.perf_counter()
        table = self.library.table_for(_asked(features), chosen)
        (results,) = await self.searches.answers([(table, rows[0], k)])
        seconds = {"embed": round(embedded - begun, 4), "search": round(time.perf_counter() - embedded, 4)}
        return JSONResponse({"table": table, "records": self.library.sizes[table], "seconds": seconds, "results": results})

    async def models(self, request: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [{"id": self.name, "object": "model", "created": self.started, "owned_by": "omni_jax"}]}
        )

    async def media(self, request: Request) -> Response:
        """A picture (JPEG) or a sound (MP3) of a record as previews show it, or its file."""
        given, kind = request.path_params["number"], request.path_params["kind"]
        number = int(given) if given.isascii() and given.isdecimal() and len(given) < 10 else -1
        if kind == "file":
            found = self.library.file(number)
            if found is not None:
                return FileResponse(found[0], media_type=found[1])
        elif kind in ("image", "sound"):
            content = await asyncio.get_running_loop().run_in_executor(self.library.threads, self.library.preview, number, kind)
            if content is not None:
                headers = {"cache-control": "private, max-age=3600"}
                return Response(content, media_type="image/jpeg" if kind == "image" else "audio/mpeg", headers=headers)
        raise Refused(404, "this record has no such media")

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.name, "records": len(self.library.ids), "version": __version__})

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    def _prompt(self, query: Query, usual: str | None) -> str | None:
        known = self.embedder.model.prompts
        given = query.options.get("prompt_name")
        if given is not None and given not in tuple(known):  # it may be anything that JSON holds
            raise Refused(400, f"prompt_name is none of this model's; it has {', '.join(known) or 'none'}")
        return given if given is not None else usual if known else None


def _asked(features: Features) -> str:
    """The kind of query that `retrieval.search.TARGETS` knows: what media it has, or text."""
    if features.vision is not None:
        return "video" if features.audio is None else "av"
    return "audio" if features.audio is not None else "text"


def _choice(query: Query, name: str, choices: tuple[str, ...], usual: str) -> str:
    value = query.options.get(name, usual)
    if value not in choices:
        raise Refused(400, f"{name} must be one of {', '.join(choices)}")
    return value


def _number(query: Query, name: str, most: int, usual: int) -> int:
    value = query.options.get(name, usual)
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 10:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise Refused(400, f"{name} must be a whole number from 1 to {most}")
    return value


def _later(line: str) -> Response:
    response = refused(503, line)
    response.headers["retry-after"] = "1"
    return response
