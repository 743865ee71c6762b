"""What Ollama's clients ask about models: which there are, what they are like, which are loaded, which server it is."""

from __future__ import annotations

from datetime import UTC, datetime

from fastapi import FastAPI
from pydantic import BaseModel, Field

from mm_rec import __version__
from mm_rec.serve.errors import OLLAMA_ERRORS, ApiError
from mm_rec.serve.fields import Strict
from mm_rec.serve.service import Service

__all__ = ["add_ollama_models", "check_ollama_model", "now"]

FAMILY = "mm-rec"
NEVER = "9999-12-31T23:59:59Z"
"""When a model is unloaded that stays loaded."""


class ModelDetails(BaseModel):
    """What the model is like."""

    parent_model: str = ""
    format: str = "safetensors"
    family: str = FAMILY
    families: list[str] = [FAMILY]
    parameter_size: str
    quantization_level: str


class Tag(BaseModel):
    """The model that is served."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: ModelDetails


class TagList(BaseModel):
    """All models that are served: one."""

    models: list[Tag]


class LoadedModel(BaseModel):
    """The model that is served, and where it lies; it is never unloaded."""

    name: str
    model: str
    size: int
    digest: str
    details: ModelDetails
    expires_at: str = NEVER
    size_vram: int = Field(description="bytes of it on a GPU")


class LoadedList(BaseModel):
    """All models that are loaded: one."""

    models: list[LoadedModel]


class Version(BaseModel):
    """The version of MM-Rec."""

    version: str = __version__


class ShowRequest(Strict):
    """Body of POST /api/show."""

    model: str = Field(description="the name that /api/tags gives")
    verbose: bool | None = Field(None, description="taken, not used: all there is to say is always said")


class ShowReply(BaseModel):
    """What the model is like; its memory has no length, so there is no length of a context."""

    modified_at: str
    details: ModelDetails
    model_info: dict[str, str | int]
    capabilities: list[str] = ["completion"]


def now() -> str:
    """Returns the time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def check_ollama_model(service: Service, name: str) -> None:
    """Raises ApiError 404 unless a model is served under the name, to which clients may add ``:latest``."""
    service.check_model(name.removesuffix(":latest"))


def add_ollama_models(app: FastAPI, service: Service) -> None:
    """Adds the routes that tell of models."""
    started = now()
    model = service.engine.model
    parameters = list(model.parameters())
    count, size = sum(one.numel() for one in parameters), sum(one.nbytes for one in parameters)
    details = ModelDetails(
        parameter_size=f"{count / 1e6:.1f}M",
        quantization_level={"bfloat16": "BF16"}.get(str(parameters[0].dtype).removeprefix("torch."), "F32"),
    )
    name, digest = service.name, service.fingerprint

    @app.get("/api/tags", responses=OLLAMA_ERRORS)
    async def tags() -> TagList:
        """The model that is served, as Ollama lists models."""
        tag = Tag(name=name, model=name, modified_at=started, size=size, digest=digest, details=details)
        return TagList(models=[tag])

    @app.get("/api/ps", responses=OLLAMA_ERRORS)
    async def loaded() -> LoadedList:
        """The model that is loaded: the one that is served."""
        on_gpu = sum(one.nbytes for one in parameters if one.device.type != "cpu")
        one = LoadedModel(name=name, model=name, size=size, digest=digest, details=details, size_vram=on_gpu)
        return LoadedList(models=[one])

    @app.post("/api/show", responses=OLLAMA_ERRORS)
    async def show(body: ShowRequest) -> ShowReply:
        """What the model is like."""
        check_ollama_model(service, body.model)
        info: dict[str, str | int] = {
            "general.architecture": FAMILY,
            "general.parameter_count": count,
            f"{FAMILY}.block_count": model.config.n_layers,
            f"{FAMILY}.embedding_length": model.config.d_model,
            f"{FAMILY}.vocab_size": model.config.vocab_size,
        }
        return ShowReply(modified_at=started, details=details, model_info=info)

    @app.get("/api/version", responses=OLLAMA_ERRORS)
    async def version() -> Version:
        """The version of this server."""
        return Version()

    @app.post("/api/embed", include_in_schema=False)
    @app.post("/api/embeddings", include_in_schema=False)
    @app.post("/v1/embeddings", include_in_schema=False)
    async def no_embeddings() -> None:
        raise ApiError(
            400,
            "this model makes no embeddings, it writes text; ask a server with an embedding model for them",
            code="unsupported_operation",
        )
