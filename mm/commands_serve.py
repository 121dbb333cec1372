"""`mm serve`: a model over HTTP."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mm.serving.limits import Limits, flags
from mm.usage import RUN, Parser, UsageError, number

KEY = "MM_API_KEY"


def serve(argv: Sequence[str]) -> int:
    parser = Parser("serve", "Embeddings, images and classification over HTTP; docs/serving.md has examples.")
    parser.add_argument("run", metavar="RUN", help=RUN)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for the whole network (default: 127.0.0.1)")
    parser.add_argument("--port", type=number(int, 0), default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument("--name", help="of the model, as clients ask for it (default: of RUN's folder)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--api-key", metavar="KEY", help=f"that clients must show (default: ${KEY}; ps shows flags)")
    parser.add_argument("--cors", metavar="ORIGIN", action="append", default=[], help="a page's origin that may call")
    parser.add_argument("--allow-host", metavar="HOST", action="append", default=[], help="a name to be called by")
    parser.add_argument("--quiet", action="store_true", help="no line for each request")
    limits = parser.add_argument_group("limits; what is over one is refused, naming it")
    for flag in flags():
        words = f"{flag.words} (default: {flag.shown})"
        limits.add_argument(
            flag.spelled, type=number(flag.kind, flag.low), default=flag.default, metavar="N", help=words
        )
    args = parser.read(argv)
    key = _key(args.api_key)
    if args.port > 65535:
        raise UsageError(f"--port {args.port}: must be from 0 to 65535")
    for origin in args.cors:
        if origin != "*" and not origin.startswith(("http://", "https://")):
            raise UsageError(f"--cors {origin}: must be an origin such as https://example.com, or *")
    try:
        from mm.serving.app import create_app
        from mm.serving.server import LOOPBACK, bind, only_loopback, run, url_of
    except ImportError as error:
        raise UsageError(f"mm serve needs fastapi and uvicorn ({error}); pip install 'mm[serve]'") from error
    from mm.serving.service import Service

    sock = bind(args.host, args.port)  # before the seconds that a model takes
    try:
        open_to_all = not only_loopback(sock)
        if open_to_all and key is None:
            print(
                f"mm serve: warning: {args.host} is open to the network and there is no key; set {KEY}", file=sys.stderr
            )
        import mm

        model = mm.load(args.run, device=args.device)
        bounds = Limits(**{flag.name: getattr(args, flag.name) for flag in flags()})
        service = Service(model, bounds, name=args.name or _name(args.run), api_key=key)
        hosts = () if open_to_all or key is not None else (*LOOPBACK, args.host, *args.allow_host)
        app = create_app(service, cors=args.cors, hosts=hosts)
        ready = f"mm serve: {service.name} on {url_of(args.host, sock)} (described at /docs; Ctrl-C stops it)"
        return run(app, service, sock, ready=ready, quiet=args.quiet)
    finally:
        sock.close()


def _key(given: str | None) -> str | None:
    name, key = ("--api-key", given) if given is not None else (f"${KEY}", os.environ.get(KEY))
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise UsageError(f"{name}: is empty, or holds what no header can; give letters and digits, or unset it")
    return key


def _name(run: str) -> str:
    """Of a folder, its last part ("export" says nothing: the part before); of any other source, all of it."""
    if not Path(run).exists():
        return run
    folder = Path(run).resolve()
    return folder.parent.name if folder.name == "export" else folder.name
