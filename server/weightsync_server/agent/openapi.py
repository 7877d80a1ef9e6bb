"""What ``/openapi.json`` tells: the calls, their bodies, their problems, and the token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from weightsync_server.agent.auth import OPEN_PATHS
from weightsync_server.agent.problems import MEDIA_TYPE


class Problem(BaseModel):
    """An RFC 9457 problem: how every call that fails is answered."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: str
    context: dict[str, Any]


#: of every call
RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "A problem",
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
}


def describing(app: FastAPI, schemas: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
    """What makes the description of ``app``, once.

    Args:
        app: Its routes are described when the result is first called.
        schemas: Of bodies, which FastAPI does not see: they are read by hand.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            made["components"]["schemas"] |= {"Problem": Problem.model_json_schema(), **schemas}
            made["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            for path, calls in made["paths"].items():
                for call in calls.values():
                    call["security"] = [] if path in OPEN_PATHS else [{"token": []}]
            app.openapi_schema = made
        return app.openapi_schema

    return openapi
