"""Whatever goes wrong in a request leaves as problem details (RFC 9457) with a code of ours."""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from weightsync.errors import InputError, WeightSyncError

MEDIA_TYPE = "application/problem+json"

log = logging.getLogger(__name__)


def problem_response(
    error: WeightSyncError, *, headers: dict[str, str] | None = None, status: int | None = None
) -> JSONResponse:
    """The error as an HTTP answer; ``status`` where it is to be another than the error's own."""
    problem = error.to_problem()
    if status is not None:
        problem["status"] = status
    if problem["status"] == HTTPStatus.UNAUTHORIZED:
        headers = {"WWW-Authenticate": "Bearer"} | (headers or {})
    return JSONResponse(
        problem, status_code=problem["status"], media_type=MEDIA_TYPE, headers=headers
    )


def invalid_input(error: ValidationError | RequestValidationError) -> InputError:
    """A failed validation, with where each mistake is.  What was sent is not repeated."""
    wrong = [
        {"loc": [str(part) for part in e["loc"]], "msg": str(e["msg"])} for e in error.errors()[:32]
    ]
    first = "; ".join(f"{'.'.join(w['loc']) or 'body'}: {w['msg']}" for w in wrong[:4])
    return InputError(
        f"the request is not valid: {first}",
        hint="docs/protocol.md and /openapi.json tell what is; versions must match",
        errors=wrong,
    )


def install(app: FastAPI, count: Callable[[str, str], None]) -> None:
    """Set the app's error handlers; ``count`` is told the path and the code of each error."""

    async def ours(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, WeightSyncError):
            raise error
        count(request.url.path, error.code)
        return problem_response(error)

    async def validation(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, RequestValidationError):
            raise error
        count(request.url.path, InputError.code)
        return problem_response(invalid_input(error))

    async def http(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, HTTPException):
            raise error
        status = HTTPStatus(error.status_code)
        ours = WeightSyncError(
            f"{request.method} {request.url.path}: {error.detail}",
            hint="docs/protocol.md and /openapi.json list what there is",
        )
        code = status.phrase.lower().replace(" ", "_")
        count(request.url.path, code)
        problem = ours.to_problem() | {
            "type": f"urn:weightsync:error:{code}",
            "title": status.phrase,
            "status": status.value,
            "code": code,
        }
        return JSONResponse(
            problem, status_code=status.value, media_type=MEDIA_TYPE, headers=error.headers
        )

    async def bug(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        count(request.url.path, WeightSyncError.code)
        return problem_response(
            WeightSyncError(
                f"{request.method} {request.url.path} failed: {type(error).__name__}",
                hint="this is an error in the agent; its log has the traceback",
            )
        )

    app.add_exception_handler(WeightSyncError, ours)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, bug)
