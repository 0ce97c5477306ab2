from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from browser_helpers import browser
from fork_server import ForkServer
from serving import service, taught, tiny

__all__ = ["browser", "fork_server", "service", "taught", "tiny"]


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    if os.name == "nt":
        pytest.skip("Windows has no fork")
    server = ForkServer(tmp_path_factory.mktemp("fork_server"))
    yield server
    server.close()
