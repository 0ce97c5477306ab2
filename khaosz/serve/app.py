"""The service as one ASGI application: OpenAI's paths over the models, and what is beside them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response

from khaosz import __version__
from khaosz.serve.errors import Refused, errors, explain_errors
from khaosz.serve.knowledge.library import Library
from khaosz.serve.knowledge.routes import knowledge_routes
from khaosz.serve.metrics import Metered, Meters
from khaosz.serve.models import Models
from khaosz.serve.openai.chat import chat_routes
from khaosz.serve.openai.tokens import token_routes
from khaosz.serve.openai.vectors import vector_routes
from khaosz.serve.page import page_routes
from khaosz.serve.replies import Live, ModelCard, ModelList, Ready
from khaosz.serve.retrieval_models import Offered

TIMEOUT = 600.0  # seconds that a request may take


def build_app(
    models: Models,
    *,
    offered: Offered | None = None,
    library: Library | None = None,
    timeout: float = TIMEOUT,
    routers: Sequence[APIRouter] = (),
) -> FastAPI:
    """The service of these models; it stops their threads when it ends. `offered`: embedders and
    rerankers; `library`: knowledge bases; `routers`: what is served beside them."""
    offered = offered or Offered()
    meters = Meters(models)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        models.give_back(await models.take(models.names[0]))
        yield
        await models.stop()

    # No /docs: that page loads its scripts from another host.
    app = FastAPI(
        title="KHAOSZ", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    explain_errors(app)
    app.add_middleware(Metered, meters=meters)
    app.include_router(chat_routes(models, meters, timeout, library))
    app.include_router(token_routes(models))
    app.include_router(vector_routes(offered))
    if library is not None:
        app.include_router(knowledge_routes(library))
    app.include_router(page_routes())
    for router in routers:
        app.include_router(router)

    @app.get("/v1/models", response_model=ModelList, responses=errors())
    async def list_models() -> dict[str, Any]:
        names = (*models.names, *offered.embedders, *offered.rerankers)
        return {"object": "list", "data": [model_card(name) for name in names]}

    @app.get("/v1/models/{model:path}", response_model=ModelCard, responses=errors(404))
    async def one_model(model: str) -> dict[str, Any]:
        return model_card(model)

    def model_card(name: str) -> dict[str, Any]:
        card: dict[str, Any] = {"id": name, "object": "model", "created": models.started}
        card |= {"owned_by": "khaosz", "context": None, "parent": None}
        if name in offered.embedders:
            return {**card, "kind": "embedding"}
        if name in offered.rerankers:
            return {**card, "kind": "rerank"}
        model = models.find(name)
        parent = None if name == model.name else model.name
        return {**card, "kind": "chat", "context": model.context, "parent": parent}

    @app.get("/health/live", response_model=Live, responses=errors())
    async def live() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "live"}

    @app.get("/health/ready", response_model=Ready, responses=errors(503))
    async def ready() -> dict[str, Any]:
        """Whether every model that is loaded can answer; `models` says which are."""
        if not all(model.loaded.worker.alive for model in models.all if model.loaded):
            raise Refused(503, "an engine has ended", "server_error")
        loaded = {model.name: model.loaded is not None for model in models.all}
        return {"status": "ready", "models": loaded}

    @app.get(
        "/metrics",
        response_class=Response,
        responses={
            200: {"content": {meters.content_type: {"schema": {"type": "string"}}}},
            **errors(),
        },
    )
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(meters.text(), media_type=meters.content_type)

    known = {
        "EmbeddingRequest": list(offered.embedders),
        "RerankRequest": list(offered.rerankers),
        **dict.fromkeys(("ChatRequest", "CompletionRequest", "TokenizeRequest"), models.names),
    }
    _make_true(app.openapi(), known)
    return app


def _make_true(document: dict[str, Any], models: dict[str, list[str]]) -> None:
    """What FastAPI can't know: names of models, by request, and that what it answers with 422 is a
    400."""
    forms = document["components"]["schemas"]
    for request, names in models.items():
        if names:
            forms[request]["properties"]["model"]["enum"] = names
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        forms.pop(name, None)
