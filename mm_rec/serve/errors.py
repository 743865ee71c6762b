"""Errors of the server, in the shapes that OpenAI's and Ollama's clients read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from mm_rec.serve.refusals import first_place, say

__all__ = ["ERRORS", "OLLAMA_ERRORS", "STREAMED", "ApiError", "add_handlers"]

_log = logging.getLogger("mm_rec.serve")
RETRY_SECONDS = 2


class ErrorDetail(BaseModel):
    """What went wrong; ``param`` names the field of the request and ``code`` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Body of every reply that is not a success."""

    error: ErrorDetail


class OllamaErrorReply(BaseModel):
    """Body of every reply to Ollama's clients that is not a success."""

    error: str


Responses = dict[int | str, dict[str, Any]]


def _errors(shape: type[BaseModel]) -> Responses:
    return {
        "4XX": {"model": shape, "description": "The request is not served; the message says why."},
        503: {"model": shape, "description": "The server is busy; Retry-After says when to try again."},
    }


_EVENTS = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "properties": {"data": {"type": "string", "description": "a piece of the reply as JSON, or [DONE]"}},
            "required": ["data"],
        }
    }
}

ERRORS = _errors(ErrorReply)
"""What a route may reply beside a success, for its description."""
OLLAMA_ERRORS = _errors(OllamaErrorReply)
STREAMED: Responses = {200: {"content": _EVENTS}, **ERRORS}
"""The same of a route that streams, if it is asked to."""


class ApiError(Exception):
    """A request that is not served, with the HTTP status that says why."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @classmethod
    def busy(cls, message: str) -> ApiError:
        """503: the client may try again in a moment."""
        return cls(503, message, code="overloaded", headers={"Retry-After": str(RETRY_SECONDS)})

    def response(self, path: str) -> JSONResponse:
        """Returns the reply to a request of ``path``, in the shape of the protocol that is spoken there."""
        return JSONResponse(self.for_ollama() if path.startswith("/api/") else self.body, self.status, self.headers)

    def for_ollama(self) -> dict[str, str]:
        """Returns the body in the shape that Ollama's clients read."""
        return {"error": self.body["error"]["message"]}


def add_handlers(app: FastAPI) -> None:
    """Give every error of ``app`` the shape of :class:`ErrorReply`."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _bug)


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response(request.url.path)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"there is no {request.method} {request.url.path} here"
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}"
    return ApiError(error.status_code, message, headers=error.headers).response(request.url.path)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    faults = list(error.errors())
    place = faults[0]["loc"]
    if place == ("body",) and not _says_json(request.headers.get("content-type", "")):
        return _no_json(request).response(request.url.path)
    if faults[0]["type"] == "json_invalid":
        problem = f"the body is not JSON: {faults[0]['ctx']['error']} at character {place[1]}"
        return ApiError(400, problem).response(request.url.path)
    param, code = first_place(faults)
    return ApiError(400, say(faults), param=param, code=code).response(request.url.path)


def _says_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _no_json(request: Request) -> ApiError:
    given = request.headers.get("content-type")
    said = f"Content-Type {given[:80]!r}" if given else "no Content-Type"
    return ApiError(415, f"the request has {said}; send JSON with the header `Content-Type: application/json`")


async def _bug(request: Request, error: Exception) -> JSONResponse:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    failure = ApiError(500, "the server failed on this request; its log says why", code="internal_error")
    return failure.response(request.url.path)
