"""Errors of the server, in the shape that OpenAI's clients read."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

__all__ = ["ApiError", "ErrorReply", "add_handlers"]

_log = logging.getLogger("mm_rec.serve")
_MAX_REPORTED = 3
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

    def response(self) -> JSONResponse:
        """The reply."""
        return JSONResponse(self.body, self.status, self.headers)


def add_handlers(app: FastAPI) -> None:
    """Give every error of ``app`` the shape of :class:`ErrorReply`."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _bug)


async def _api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"there is no {request.method} {request.url.path} here"
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}"
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    faults = list(error.errors())
    if faults[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {faults[0]['ctx']['error']}").response()
    # Of a field that may be of several types, every type complains; the best complaint is not about the type, or
    # else got furthest.
    best: dict[str, Mapping[str, Any]] = {}
    for fault in faults:
        name = str(fault["loc"][1:2])
        if name not in best or _rank(fault) > _rank(best[name]):
            best[name] = fault
    message = "; ".join(_describe(fault) for fault in list(best.values())[:_MAX_REPORTED])
    if len(best) > _MAX_REPORTED:
        message += f"; and {len(best) - _MAX_REPORTED} more"
    first = next(iter(best.values()))
    return ApiError(400, message, param=".".join(_path(first)) or None, code=_code(first)).response()


async def _bug(request: Request, error: Exception) -> JSONResponse:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error").response()


def _rank(fault: Mapping[str, Any]) -> tuple[bool, int]:
    return not fault["type"].endswith("_type"), len(_path(fault))


def _describe(fault: Mapping[str, Any]) -> str:
    field = ".".join(_path(fault))
    if fault["type"] == "extra_forbidden":
        return f"{field or 'a field of that name'} is not a parameter of this server"
    return f"{field}: {fault['msg']}" if field else str(fault["msg"])


def _code(fault: Mapping[str, Any]) -> str | None:
    return {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}.get(fault["type"])


def _path(fault: Mapping[str, Any]) -> list[str]:
    """``["messages", "0", "role"]`` of a fault in ("body", "messages", 0, "role"), without the names of types."""
    location: Sequence[str | int] = fault["loc"][1:]
    return [str(part) for part in location if isinstance(part, int) or (part.isidentifier() and part != "str")]
