"""The short way in: a POST goes straight to what answers it.

Routing, and what else a framework does for a call, takes longer than most of ours, and while
engines stand still for a push there are four of them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from weightsync.errors import WeightSyncError
from weightsync_server.agent.problems import problem_response

Handler = Callable[[Request], Awaitable[Response]]


class Door:
    """ASGI middleware before the routes.

    Args:
        app: Answers everything else.
        posts: By path, what the app's own route of a POST calls, too.
        count: Told the path and the code of each error.
    """

    def __init__(
        self, app: ASGIApp, *, posts: Mapping[str, Handler], count: Callable[[str, str], None]
    ) -> None:
        self._app = app
        self._posts = posts
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        posts = scope["type"] == "http" and scope["method"] == "POST"
        handler = self._posts.get(scope["path"]) if posts else None
        if handler is None:
            await self._app(scope, receive, send)
            return
        try:
            answer = await handler(Request(scope, receive))
        except WeightSyncError as error:
            self._count(scope["path"], error.code)
            answer = problem_response(error)
        await answer(scope, receive, send)
