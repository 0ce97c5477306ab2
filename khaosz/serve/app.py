"""The service as one ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from khaosz import __version__
from khaosz.interop.local_models import RUNS
from khaosz.serve.answering import Answering
from khaosz.serve.anthropic.messages import message_routes, model_info
from khaosz.serve.anthropic.schema import ModelInfo, ModelPage
from khaosz.serve.catalogue.pulls import Pulls
from khaosz.serve.catalogue.routes import catalogue_routes
from khaosz.serve.errors import ApiError, errors, explain_errors
from khaosz.serve.generations.routes import generation_routes
from khaosz.serve.knowledge.library import Library
from khaosz.serve.knowledge.routes import knowledge_routes
from khaosz.serve.metrics import Metered, Meters
from khaosz.serve.models import Models
from khaosz.serve.ollama.models import Catalogue, with_latest
from khaosz.serve.ollama.routes import ollama_routes
from khaosz.serve.openai.chat import chat_routes
from khaosz.serve.openai.responses import response_routes
from khaosz.serve.openai.tokens import token_routes
from khaosz.serve.openai.vectors import Vectors, vector_routes
from khaosz.serve.page import page_routes
from khaosz.serve.records.conversation_store import ConversationStore
from khaosz.serve.records.conversations import conversation_routes
from khaosz.serve.records.drawn_answers import ANSWERS, DrawnFile, Peer, answer_routes
from khaosz.serve.records.preferences import FILE, PreferenceFile, preference_routes
from khaosz.serve.records.runs import run_routes
from khaosz.serve.replies import Live, ModelCard, ModelList, Ready
from khaosz.serve.retrieval_models import RetrievalModels

TIMEOUT = 600.0  # seconds that a request may take
# Schemas of requests whose `model` answers.
_WITH_MODEL = (
    "ChatRequest", "GenerationRequest", "CompletionRequest", "TokenizeRequest", "ResponseRequest",
    "InputCountRequest", "MessagesRequest", "CountRequest",
)  # fmt: skip
_ANTHROPIC = "anthropic-version"  # a header
HEARTBEAT = 5.0  # seconds after which a silent stream sends a comment

# Routes that answer with models get what answers.
Routes = APIRouter | Callable[[Answering], APIRouter]


def record_routes(data: Path, runs: Path, peers: Sequence[Peer] = ()) -> list[Routes]:
    """Conversations, their generations and preferences in the folder `data`, and training runs
    below `runs`; `peers` are ranked beside the models here. Raises `DataError` for a file in `data`
    that cannot be used."""
    conversations = ConversationStore(data / "conversations.db")
    preferences = PreferenceFile(data / FILE)
    return [
        conversation_routes(conversations),
        partial(generation_routes, conversations),
        preference_routes(preferences, [peer.name for peer in peers]),
        partial(answer_routes, preferences, DrawnFile(data / ANSWERS), peers),
        run_routes(runs),
    ]


def build_app(
    models: Models,
    *,
    retrieval: RetrievalModels | None = None,
    library: Library | None = None,
    pulls: Pulls | None = None,
    runs: Path = RUNS,
    timeout: float = TIMEOUT,
    heartbeat: float = HEARTBEAT,
    routers: Sequence[Routes] = (),
) -> FastAPI:
    """The service of these models; it stops their threads when it ends. `library`: knowledge bases;
    `pulls`: models that are added, of the catalogue and below `runs`; `routers`: further routes,
    such as `record_routes`. `timeout` and `heartbeat` are in seconds."""
    retrieval = retrieval or RetrievalModels()
    meters = Meters(models)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if models.names:
            models.give_back(await models.take(models.names[0]))
        yield
        if pulls is not None:
            await pulls.stop()
        await models.stop()

    # No /docs: that page loads its scripts from another host.
    app = FastAPI(
        title="KHAOSZ", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    explain_errors(app)
    app.add_middleware(Metered, meters=meters)
    app.add_middleware(HeadAsGet)
    answering = Answering(models, meters, timeout, library, heartbeat)
    openai = chat_routes(answering), response_routes(answering), token_routes(models)
    vectors = Vectors(retrieval)
    others = (
        message_routes(answering),
        ollama_routes(answering, vectors, Catalogue(models, retrieval)),
    )
    knowledge = [] if library is None else [knowledge_routes(library)]
    more = [] if pulls is None else [catalogue_routes(pulls, runs)]
    for router in (
        *openai, vector_routes(vectors), *others, *knowledge, *more, page_routes(), *routers,
    ):  # fmt: skip
        app.include_router(router if isinstance(router, APIRouter) else router(answering))

    @app.get("/v1/models", response_model=ModelList | ModelPage, responses=errors())
    async def list_models(request: Request) -> dict[str, Any]:
        """All models; in the layout of Anthropic's API if the header anthropic-version is sent."""
        names = (*models.names, *retrieval.embedders, *retrieval.rerankers)
        cards = [model_card(name) for name in names]
        if _ANTHROPIC not in request.headers:
            return {"object": "list", "data": cards}
        data = [model_info(card) for card in cards]
        first, last = (names[0], names[-1]) if names else (None, None)
        return {"data": data, "has_more": False, "first_id": first, "last_id": last}

    @app.get("/v1/models/{model:path}", response_model=ModelCard | ModelInfo, responses=errors(404))
    async def one_model(model: str, request: Request) -> dict[str, Any]:
        """One model, in the layout of the list."""
        card = model_card(model)
        return model_info(card) if _ANTHROPIC in request.headers else card

    def model_card(name: str) -> dict[str, Any]:
        card: dict[str, Any] = {"id": name, "object": "model", "created": models.started}
        card |= {"owned_by": "khaosz", "context": None, "parent": None}
        if name in retrieval.embedders:
            return {**card, "kind": "embedding"}
        if name in retrieval.rerankers:
            return {**card, "kind": "rerank"}
        model = models.find(name)
        parent = None if name == model.name else model.name
        card |= {"thinking": model.thinking.kind, "sampling": dict(model.sampling)}
        card["languages"] = None if model.languages is None else sorted(model.languages)
        return {**card, "kind": "chat", "context": model.context, "parent": parent}

    @app.get("/health/live", response_model=Live, responses=errors())
    async def live() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "live"}

    @app.get(
        "/health/ready",
        response_model=Ready,
        response_model_exclude_unset=True,
        responses=errors(503),
    )
    async def ready(request: Request) -> dict[str, Any]:
        """Whether every loaded model can answer; with the key, `models` says which are loaded,
        and `memory` what they were planned to need."""
        if not all(model.loaded.worker.alive for model in models.all if model.loaded):
            raise ApiError(503, "an engine has ended")
        if not getattr(request.state, "has_key", True):
            return {"status": "ready"}
        loaded = {model.name: model.loaded is not None for model in models.all}
        planned = {
            model.name: model.loaded.generator.memory.parts
            for model in models.all
            if model.loaded and model.loaded.generator.memory
        }
        return {"status": "ready", "models": loaded, "memory": planned}

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

    def name_models() -> None:
        names = {
            "EmbeddingRequest": list(retrieval.embedders),
            "RerankRequest": list(retrieval.rerankers),
            "OllamaEmbedRequest": with_latest(retrieval.embedders),
            "OllamaEmbeddingsRequest": with_latest(retrieval.embedders),
            "OllamaChatRequest": with_latest(models.names),
            "GenerateRequest": with_latest(models.names),
            **dict.fromkeys(_WITH_MODEL, models.names),
        }
        patch_openapi(app.openapi(), names)

    name_models()
    if pulls is not None:
        pulls.on_added = name_models
    return app


class HeadAsGet:
    """ASGI middleware: HEAD answers as GET does, without the body (RFC 9110, section 9.3.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, send_head)


def patch_openapi(document: dict[str, Any], names: dict[str, list[str]]) -> None:
    """Correct what FastAPI cannot know: the models' names, by request schema, and that validation
    errors are answered with 400, not 422."""
    schemas = document["components"]["schemas"]
    for request, models in names.items():
        if models and request in schemas:
            schemas[request]["properties"]["model"]["enum"] = models
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
