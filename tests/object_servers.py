"""Object stores on loopback, of Amazon's and of Google's kind, whose reads fail or are late, for the clients of `s3://` and `gs://`."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any

BUCKET = "clips"
FAILING, SLOW = 20, 2  # of 100 reads: refused the first time; late
SLOW_S = 0.2
ANONYMOUS = "Anonymous caller does not have storage.objects.get access to the Google Cloud Storage object."
AWS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
# Neither client looks for credentials or settings elsewhere. gcsfs would ask a service that the server lacks for the kind of a bucket.
ENVIRONMENT = {
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "NO_GCE_CHECK": "true",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
}


class Faults:
    """What a server answers in place of what was asked for.

    Attributes:
      counts: ranges asked for, and those of them that `failed` or were `slow`.
      anonymous: whether everything is refused, as to a caller without credentials.
    """

    def __init__(self, slow_s: float = SLOW_S) -> None:
        self._slow_s, self._guard = slow_s, threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forgets what was asked for."""
        self.counts: collections.Counter[str] = collections.Counter()
        self.anonymous = False
        self._seen: set[tuple[str, str]] = set()

    def status(self, method: str, path: str, asked: str) -> int | None:
        """Returns the status to answer with, None for the right answer, after a pause where the read is to be late.

        Args:
          asked: the header Range; only reads that have one fail.
        """
        if self.anonymous:
            return 401
        if method != "GET" or not asked:
            return None
        chance = int.from_bytes(hashlib.blake2b(f"{path} {asked}".encode(), digest_size=4).digest(), "little") % 100
        with self._guard:
            first = (path, asked) not in self._seen
            self._seen.add((path, asked))
            self.counts["ranges"] += 1
            self.counts["failed"] += first and chance < FAILING
            late = self.counts["ranges"] % (100 // SLOW) == 0
            self.counts["slow"] += late
        if late:
            time.sleep(self._slow_s)
        return 503 if first and chance < FAILING else None


@contextlib.contextmanager
def s3(faults: Faults) -> Iterator[dict[str, str]]:
    """Runs moto's server; yields the environment of its clients."""
    from moto.server import DomainDispatcherApplication, create_backend_app  # pyright: ignore[reportMissingImports]
    from werkzeug.serving import make_server  # pyright: ignore[reportMissingImports]

    application = DomainDispatcherApplication(create_backend_app)

    def faulty(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        status = faults.status(environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE", ""))
        if status is None:
            return application(environ, start_response)
        start_response(f"{status} Refused", [("Content-Length", "0")])
        return [b""]

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = make_server("127.0.0.1", 0, faulty, threaded=True)
    with _served(server):
        yield ENVIRONMENT | AWS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}


@contextlib.contextmanager
def gs(faults: Faults) -> Iterator[dict[str, str]]:
    """Runs gcp-storage-emulator's server; yields the environment of its clients."""
    from gcp_storage_emulator.handlers import buckets  # pyright: ignore[reportMissingImports]
    from gcp_storage_emulator.server import RequestHandler  # pyright: ignore[reportMissingImports]
    from gcp_storage_emulator.storage import Storage  # pyright: ignore[reportMissingImports]

    guard = threading.Lock()  # a request may change the tables that another one walks through

    def guarded(answer: Callable[[RequestHandler], None]) -> Callable[[RequestHandler], None]:
        def alone(handler: RequestHandler) -> None:
            with guard:
                answer(handler)

        return alone

    class Faulty(RequestHandler):
        do_PUT, do_PATCH, do_DELETE = map(guarded, (RequestHandler.do_PUT, RequestHandler.do_PATCH, RequestHandler.do_DELETE))

        def do_POST(self) -> None:
            if "/moveTo/" in self.path:  # the emulator cannot, and gcsfs would try again before it copies
                return self._refuse(405)
            guarded(RequestHandler.do_POST)(self)

        def do_GET(self) -> None:
            status = faults.status("GET", self.path, self.headers.get("Range", ""))
            if status is None:
                return guarded(RequestHandler.do_GET)(self)
            self._refuse(status)

        def _refuse(self, status: int) -> None:
            said = json.dumps({"error": {"code": status, "message": ANONYMOUS if status == 401 else "Refused"}}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # a client that opens more connections at once than can wait would lose a request, and never know

    storage = Storage(use_memory_fs=True)
    buckets.create_bucket(BUCKET, storage)
    server = Server(("127.0.0.1", 0), partial(Faulty, storage))
    with _served(server):
        address = f"http://127.0.0.1:{server.server_port}"
        yield ENVIRONMENT | {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}


@contextlib.contextmanager
def _served(server: Any) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
