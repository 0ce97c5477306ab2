"""Servers of conversations to be killed, one after the other: forks of a process that has imported
everything, so that each starts at once. Prints the port and the process id of each."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from khaosz.serve.errors import explain_errors
from khaosz.serve.records.conversation_store import ConversationStore
from khaosz.serve.records.conversations import conversation_routes
from khaosz.serve.run import listen


def main(path: Path) -> None:
    for _ in sys.stdin:  # one server per line
        with listen("127.0.0.1", 0) as bound:
            child = os.fork()
            if not child:
                app = FastAPI()
                explain_errors(app)
                app.include_router(conversation_routes(ConversationStore(path)))
                uvicorn.Server(uvicorn.Config(app, log_level="error")).run([bound])
                os._exit(0)
            print(bound.getsockname()[1], child, flush=True)
        os.waitpid(child, 0)
        print("gone", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
