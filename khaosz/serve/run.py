"""`khaosz serve`: bind the address, load the first model, and serve until a signal."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from khaosz.errors import ConfigError
from khaosz.files import make_private
from khaosz.interop.local_models import named_path
from khaosz.interop.models import default_name
from khaosz.serve.models import Limits, Model, Models, describe

DRAIN = 30  # seconds that running requests have after SIGTERM


@dataclass(frozen=True)
class Address:
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    origins: tuple[str, ...] = ()  # of other pages, and of proxies


def serve(
    models: Sequence[str],
    *,
    loras: Sequence[str] = (),
    embedders: Sequence[str] = (),
    rerankers: Sequence[str] = (),
    peers: Sequence[str] = (),
    data: Path,
    runs: Path,
    max_upload: int,
    address: Address,
    device: str,
    deterministic: bool = False,
    limits: Limits,
    timeout: float,
    source: str | None = None,
    announce: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C; running requests are finished first. `models` are paths, or
    NAME=PATH, or none: then the page proposes one, and `source` is where it is fetched from, as
    `pull` takes it; `loras` NAME=DIR for the first of them, or MODEL:NAME=DIR; `embedders` and
    `rerankers` as `RetrievalModels` takes them; `peers`: NAME=http://host/v1#model, whose
    answers are ranked beside those of the models here. `data`: the folder for documents,
    conversations and preferences; `runs`: that of training runs; `max_upload`: bytes of a document.
    `timeout`: seconds for a request. `deterministic`: answers do not depend on other requests or
    caches. `announce` gets a line per address when the first model is loaded.

    Raises `ConfigError` for a port in use, an address that is not local, a missing key off
    loopback, a folder that another server uses, and where fastapi or uvicorn is missing;
    `DataError` for a file in the folder that cannot be used; `ModelError`.
    """
    host, port, api_key = address.host, address.port, address.api_key
    if api_key is not None and not (api_key.isascii() and api_key.strip() == api_key != ""):
        raise ConfigError("the API key is empty, or has spaces around it or non-ASCII characters")
    if not timeout > 0:
        raise ConfigError(f"--request-timeout is {timeout:g}, not above 0")
    local = is_loopback(host)
    if not local and api_key is None:
        raise ConfigError(
            f"{host} can be reached from other machines: a key is required",
            hint="set KHAOSZ_API_KEY, or omit --host to serve this machine only",
        )
    try:  # only here: `khaosz` works without them
        import uvicorn

        from khaosz.serve.app import build_app, record_routes
        from khaosz.serve.catalogue.pulls import Pulls
        from khaosz.serve.connections import BACKLOG, LimitedServer, limited_protocol
        from khaosz.serve.guard import LOOPBACK, Guard
        from khaosz.serve.knowledge.catalogue import Catalogue
        from khaosz.serve.knowledge.library import Library
        from khaosz.serve.records.conversation_store import ConversationStore
        from khaosz.serve.records.drawn_answers import named_peers
        from khaosz.serve.retrieval_models import RetrievalModels
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the service needs {error.name}", hint="pip install 'khaosz[serve]'"
        ) from None

    with listen(host, port) as listener:
        described = named_models(models, loras)
        served = Models(described, limits, device=device, deterministic=deterministic)
        retrieval = RetrievalModels(embedders, rerankers)
        retrieval.check()
        if both := {*served.names} & {*retrieval.embedders, *retrieval.rerankers}:
            raise ConfigError(f"two models are named {min(both)!r}", hint="NAME=SOURCE names one")
        others = named_peers(peers)
        if both := {*served.names} & {peer.name for peer in others}:
            raise ConfigError(
                f"two models are named {min(both)!r}", hint="--peer NAME=URL names one"
            )
        served.preload()
        Catalogue.check(data / "catalogue.db")
        ConversationStore.check(data / "conversations.db")
        os.umask(0o077)  # what is written is for this user only
        with suppress(OSError):  # `Library` reports it
            data.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                if make_private(data):
                    announce(f"{data} could be read by other users of this machine: now it cannot")
            except PermissionError:
                announce(f"{data} belongs to another user: who else can read it is not changed")
        library = Library(data, retrieval, max_upload=max_upload)
        app = build_app(
            served,
            retrieval=retrieval,
            library=library,
            pulls=Pulls(served, source),
            runs=runs,
            timeout=timeout,
            routers=record_routes(data, runs, others),
        )
        hosts = (*LOOPBACK, host) if local else None
        config = uvicorn.Config(
            Guard(app, key=api_key, hosts=hosts, origins=address.origins),
            http=limited_protocol(),
            backlog=BACKLOG,
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=DRAIN,
        )
        url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        announce(f"{', '.join(served.names) or 'no model yet'}: {url}/v1")
        announce(f"page: {url}/{'' if served.names else ' (it fetches a model on request)'}")
        for base in library.bases():
            if base.embedder is not None and base.embedder not in retrieval.embedders:
                announce(
                    f"knowledge base {base.name!r}: its embedder {base.embedder!r} is not available"
                    f" (--embedder {base.embedder}=SOURCE), so it is searched lexically only"
                )
        first = served.all[0].loaded if served.all else None
        if first is not None and (line := first.generator.memory_line):
            announce(line)
        LimitedServer(config, served.interrupt).run([listener])


def named_models(models: Sequence[str], loras: Sequence[str] = ()) -> list[Model]:
    """Raises `ConfigError` and `ModelError`."""
    sources = [_name_and_path(each) for each in models]
    adapters: dict[str, dict[str, Path]] = {name: {} for name, _ in sources}
    for lora in loras:
        key, equals, path = lora.partition("=")
        owner, colon, name = key.rpartition(":")
        owner = owner if colon else sources[0][0] if sources else ""
        if not (equals and name and path) or owner not in adapters:
            raise ConfigError(
                f"--lora {lora!r} is not NAME=DIR or MODEL:NAME=DIR",
                hint=f"models here: {', '.join(adapters) or 'none'}",
            )
        adapters[owner][name] = Path(path)
    return [describe(name, path, adapters[name]) for name, path in sources]


def _name_and_path(argument: str) -> tuple[str, Path]:
    name, equals, path = argument.partition("=")
    if equals and name and not Path(argument).exists():
        return name, named_path(path)
    found = named_path(argument)
    return default_name(found), found


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, bound before anything is loaded so that a port in use fails at once.
    Port 0 is any free one. Raises `ConfigError`."""
    if not 0 <= port < 1 << 16:  # getaddrinfo would take it modulo 2**16
        raise ConfigError(f"--port is {port}, not 0 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        why = str(error) if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise ConfigError(
            f"{host} port {port} cannot be used: {why}", hint="choose another with --port"
        ) from None


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
