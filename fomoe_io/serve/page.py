"""The page at /: one file of HTML and one of script, read once, with no file named by a request."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

_FILES = files("fomoe_io.serve")
_SECURITY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _SECURITY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

PATHS = {
    "/": ("page.html", "text/html"),
    "/index.html": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
}


async def answer(request: Request) -> Response:
    """The page or its script."""
    name, kind = PATHS[request.url.path]
    return Response(_FILES.joinpath(name).read_bytes(), media_type=kind, headers=_HEADERS)
