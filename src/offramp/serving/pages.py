"""The page at /, as files of the package. It loads nothing from anywhere else."""

from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.exceptions import HTTPException

POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "object-src 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


def add_page(app: FastAPI) -> None:
    """Serve the page at / and its files at /page/NAME."""

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return _file("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        return _file(name)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)


def _file(name: str) -> Response:
    """Return a file of the page. Raises HTTPException for any other name."""
    folder = files("offramp.serving").joinpath("page")
    kind = TYPES.get(name.rpartition(".")[2])
    found = {each.name: each for each in folder.iterdir()} if folder.is_dir() else {}
    if kind is None or name not in found or not found[name].is_file():
        raise HTTPException(404)
    return Response(found[name].read_bytes(), headers={**HEADERS, "content-type": kind})
