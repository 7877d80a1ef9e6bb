"""The page at ``/`` that shows a person what the agent does.

Its files hold nothing secret, so they come without a token; what they show comes from ``/status``
and ``/events``, which the page asks for with the token that a person types in.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import HTMLResponse

#: where the page's files are, below the page itself
FOLDER = "/page/"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # nothing from elsewhere, nothing inline: what an engine says stays text whatever it says
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serve the page and its files."""
    folder = files("weightsync_server") / "page"
    known = {
        entry.name: (entry.read_bytes(), kind)
        for entry in folder.iterdir()
        if (kind := _TYPES.get("." + entry.name.rpartition(".")[2])) is not None
    }

    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        """A page that shows all this to a person."""
        return Response(known["index.html"][0], media_type=_TYPES[".html"], headers=_HEADERS)

    @app.get(FOLDER + "{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        """A file of the page."""
        if name not in known:
            raise HTTPException(404, "the page has no such file")
        body, kind = known[name]
        return Response(body, media_type=kind, headers=_HEADERS)
