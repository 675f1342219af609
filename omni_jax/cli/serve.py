"""`omni-jax serve`: a page to search clips with, and an API, on this machine."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import socket
from pathlib import Path

from omni_jax.cli.argtypes import positive
from omni_jax.cli.model_arguments import add_index_arguments, check_preset, model_for_index
from omni_jax.types import InputError

EXAMPLE = "omni-jax serve --model omni7b --index clips.npz --manifest clips.jsonl --media clips"

PACKAGES = ("starlette", "uvicorn", "python_multipart", "prometheus_client")
SHORTEST = 16  # characters of a token


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_index_arguments(parser)
    parser.add_argument(
        "--media",
        metavar="DIR",
        help="folder of the media to serve; the paths of --manifest start from it. Without --manifest, files are named after their records",
    )
    parser.add_argument("--manifest", action="append", default=[], metavar="FILE.jsonl", help="captions and media paths; may be repeated")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; any but this machine's own needs --token (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for a free one (default: %(default)s)")
    parser.add_argument("--token", metavar="TOKEN", help=f"token that clients must send, {SHORTEST} characters or more")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="another name by which clients reach this server")
    parser.add_argument("--max-upload", type=positive(float), default=64.0, metavar="MIB", help="largest request (default: %(default)g)")
    parser.add_argument(
        "--upload-time", type=positive(float), default=60.0, metavar="SECONDS", help="time for a request to arrive (default: %(default)g)"
    )
    parser.add_argument(
        "--timeout", type=positive(float), default=30.0, metavar="SECONDS", help="time to decode a file (default: %(default)g)"
    )
    parser.add_argument("--workers", type=positive(int), metavar="N", help="decoding processes (default: one less than the cores)")
    parser.add_argument("--batch-size", type=positive(int), default=16, metavar="N", help="items encoded together (default: %(default)s)")
    parser.add_argument("--max-waiting", type=positive(int), default=1024, metavar="N", help="items that may wait (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Serves until it is interrupted."""
    local = args.host in ("127.0.0.1", "localhost", "::1")
    if not local and args.token is None:
        raise InputError(f"--host {args.host}: is reached from other machines; give a --token that clients must show")
    if args.token is not None and not (len(args.token) >= SHORTEST and args.token.isascii() and args.token.isalnum()):
        raise InputError(f"--token: give {SHORTEST} letters and digits or more")
    if lacking := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(f"{', '.join(lacking)} is not installed; run pip install 'omni-jax[serve]'")

    import uvicorn

    from omni_jax.cli.report import records_of
    from omni_jax.serve.guards import LOOPBACK, Rules
    from omni_jax.serve.heads import PromptHeads
    from omni_jax.serve.library import Library, open_indexes

    with listening(args.host, args.port) as bound:
        records = records_of(args.manifest, args.media)
        indexes = open_indexes(args.index)
        check_preset(args)
        workers = args.workers or max(1, (os.cpu_count() or 1) - 1)
        library = Library(indexes, records, Path(args.media) if args.media is not None else None, workers)

        from omni_jax.serve.app import make_app
        from omni_jax.serve.embedding import Embedder

        source, _, model = model_for_index(args, next(iter(indexes.values())).made_with)
        embedder = Embedder(model, batch_size=args.batch_size, workers=workers, timeout_s=args.timeout, most_waiting=args.max_waiting)
        names = (*(LOOPBACK if local else (args.host,)), *(name.lower() for name in args.allow_host))
        hosts = () if args.host in ("0.0.0.0", "::") and not args.allow_host else names
        rules = Rules(hosts, args.token, int(args.max_upload * 2**20), args.upload_time)
        app = make_app(embedder, library, rules, source.home.resolve().name)
        embedder.warm_up()
        bound.listen(socket.SOMAXCONN)  # clients of the address that is printed next wait, and are not refused
        host, port = bound.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{port}/{'?token=TOKEN' if args.token else ''}  (Ctrl-C ends it)", flush=True)
        config = uvicorn.Config(
            app, http=PromptHeads, ws="none", log_level="warning", server_header=False, timeout_keep_alive=20, timeout_graceful_shutdown=10
        )
        uvicorn.Server(config).run(sockets=[bound])
    return 0


def listening(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound before anything large is read.

    Raises:
      InputError: for a port that is taken or may not be used, or an address that is not this machine's.
    """
    if not 0 <= port < 1 << 16:
        raise InputError(f"--port {port}: is not a port; give a number from 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as e:
        bound.close()
        if e.errno == errno.EADDRINUSE:
            raise InputError(
                f"--port {port}: is in use on {host}; end the other program, or choose another port (0 takes a free one)"
            ) from None
        raise InputError(f"--host {host} --port {port}: cannot be listened on ({e.strerror or e}); choose another") from None
    return bound
