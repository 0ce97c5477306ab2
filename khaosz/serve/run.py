"""`khaosz serve`: an address, a model, and a server until it is told to stop."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter

from khaosz.errors import ConfigError
from khaosz.interop.models import default_name
from khaosz.serve.models import Limits, Model, Models, describe
from khaosz.serve.records.conversation_store import ConversationStore
from khaosz.serve.records.conversations import conversation_routes
from khaosz.serve.records.preferences import FILE, PreferenceFile, preference_routes
from khaosz.serve.records.runs import run_routes


def record_routes(data: Path, runs: Path) -> list[APIRouter]:
    """Conversations and preferences in the folder `data`, and training runs below `runs`. Raises
    `DataError` for a file in `data` that cannot be used."""
    return [
        conversation_routes(ConversationStore(data / "conversations.db")),
        preference_routes(PreferenceFile(data / FILE)),
        run_routes(runs),
    ]


DRAIN = 30  # seconds that answers under way have after SIGTERM


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
    data: Path,
    runs: Path,
    max_upload: int,
    address: Address,
    device: str,
    limits: Limits,
    timeout: float,
    announce: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C; answers under way are finished first. `models` are paths, or
    NAME=PATH; `loras` NAME=DIR for the first of them, or MODEL:NAME=DIR; `embedders` and
    `rerankers` as `Offered` takes them. `data`: the folder of what is kept; `runs`: that of
    training runs; `max_upload`: bytes of a document. `timeout`: seconds for a request. `announce`
    is told the addresses once the first model is there.

    Raises `ConfigError` for a port in use, an address that isn't this machine's, no key off
    loopback, a folder that another server uses, and where fastapi or uvicorn is missing;
    `DataError` for a file in it that cannot be used; `ModelError`.
    """
    host, port, api_key = address.host, address.port, address.api_key
    if api_key is not None and not (api_key.isascii() and api_key.strip() == api_key != ""):
        raise ConfigError("the API key is empty, or has spaces around it or letters beyond ASCII")
    if not timeout > 0:
        raise ConfigError(f"--request-timeout is {timeout:g}, not above 0")
    local = is_loopback(host)
    if not local and api_key is None:
        raise ConfigError(
            f"{host} can be reached from other machines: a key is required",
            hint="set KHAOSZ_API_KEY, or leave --host away to serve this machine only",
        )
    try:
        import uvicorn

        from khaosz.serve.app import build_app
        from khaosz.serve.knowledge.library import Library
        from khaosz.serve.retrieval_models import Offered
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the service needs {error.name}", hint="pip install 'khaosz[serve]'"
        ) from None
    from khaosz.serve.guard import LOOPBACK, Guard

    with listen(host, port) as bound:
        served = Models(named_models(models, loras), limits, device=device)
        offered = Offered(embedders, rerankers)
        if both := {*served.names} & {*offered.embedders, *offered.rerankers}:
            raise ConfigError(f"two models are named {min(both)!r}", hint="NAME=SOURCE names one")
        served.preload()
        with suppress(OSError):  # the library says what is wrong
            data.mkdir(mode=0o700, parents=True, exist_ok=True)
        library = Library(data, offered, max_upload=max_upload)
        routers = record_routes(data, runs)
        app = build_app(served, offered=offered, library=library, timeout=timeout, routers=routers)
        hosts = (*LOOPBACK, host) if local else None
        guarded = Guard(app, key=api_key, hosts=hosts, origins=address.origins)
        config = uvicorn.Config(
            guarded,
            http="h11",
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=DRAIN,
        )
        shown = ", ".join(served.names)
        address_shown = f"http://{_shown(host)}:{bound.getsockname()[1]}"
        announce(f"{shown}: {address_shown}/v1")
        announce(f"page: {address_shown}/")
        uvicorn.Server(config).run([bound])


def named_models(models: Sequence[str], loras: Sequence[str] = ()) -> list[Model]:
    """Raises `ConfigError` and `ModelError`."""
    given = [_named(each) for each in models]
    adapters: dict[str, dict[str, Path]] = {name: {} for name, _ in given}
    for lora in loras:
        name, equals, path = lora.partition("=")
        owner, colon, own = name.rpartition(":")
        owner = owner if colon else given[0][0]
        if not (equals and own and path) or owner not in adapters:
            raise ConfigError(
                f"--lora {lora!r} is not NAME=DIR or MODEL:NAME=DIR",
                hint=f"models here: {', '.join(adapters)}",
            )
        adapters[owner][own] = Path(path)
    return [describe(name, path, adapters[name]) for name, path in given]


def _named(given: str) -> tuple[str, Path]:
    name, equals, path = given.partition("=")
    if equals and name and not Path(given).exists():
        return name, Path(path)
    return default_name(Path(given)), Path(given)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, before anything is loaded: a port in use is known at once. Port 0 is any
    free one. Raises `ConfigError`."""
    if not 0 <= port < 1 << 16:  # getaddrinfo would take what is left of it modulo 2**16
        raise ConfigError(f"--port is {port}, not 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
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


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
