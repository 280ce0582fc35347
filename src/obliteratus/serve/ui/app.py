"""Starts the workbench: one web server with the page, and downloads from the workspace."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from typing import Any

from obliteratus.core.errors import UserError
from obliteratus.serve.listen import open_socket
from obliteratus.serve.ui.pages import read_page
from obliteratus.serve.ui.server import Gate, choose_token, find_download, zip_folder
from obliteratus.serve.ui.workbench import Workbench
from obliteratus.serve.ui.workspace import MAX_UPLOAD

# A run's page may run its own script, which sorts and filters, and nothing of it reaches this server or the tabs.
ISOLATED = "sandbox allow-scripts"
ENDS_WITHIN = 2  # seconds that open pages have to hear that the server ends


def serve(bench: Workbench, host: str, port: int, token: str, announce: Callable[[str], None]) -> None:
    """Serve the workbench until it is interrupted. Raises UserError if it cannot listen there, or without Gradio.

    token: see `choose_token`. announce: is told the address to open.
    """
    token = choose_token(host, token)
    listening = open_socket(host, port)
    app = build_app(bench, token)
    server = _make_server(app)
    place = f"[{host.strip('[]')}]" if ":" in host else host
    announce(f"http://{place}:{listening.getsockname()[1]}/{f'?token={token}' if token else ''}")
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        pass  # how it is ended; uvicorn has closed its connections by now
    finally:
        bench.close()


def _make_server(app: Any) -> Any:
    """Return the server. While it ends it says nothing: open pages are always cut off, which is no error."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: Any = None) -> None:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
            await super().shutdown(sockets)

    options: dict[str, Any] = {"log_level": "warning", "timeout_graceful_shutdown": ENDS_WITHIN}
    return Server(uvicorn.Config(app, server_header=False, **options))


def build_app(bench: Workbench, token: str = "") -> Any:
    """Return the ASGI application. Raises UserError if Gradio is missing."""
    uploads = bench.workspace.root / ".uploads"
    shutil.rmtree(uploads, ignore_errors=True)  # what an earlier start was sent and did not keep
    uploads.mkdir()
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(uploads),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    try:
        import gradio as gr
        from fastapi import FastAPI
    except ModuleNotFoundError as error:
        raise UserError("the page is made with Gradio; pip install 'obliteratus[ui]'") from error
    from obliteratus.serve.ui.layout import STYLE, THEME, build

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _add_downloads(app, bench)
    page = build(bench)
    page.queue(api_open=False)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        max_file_size=MAX_UPLOAD,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=THEME,
        css_paths=[STYLE],
    )
    return Gate(app, token)


def _add_downloads(app: Any, bench: Workbench) -> None:
    from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse, StreamingResponse

    def download(kind: str, name: str, file: str = "") -> Any:
        whole = not file and name.endswith(".zip")
        try:
            path = find_download(bench.workspace, kind, name.removesuffix(".zip") if whole else name, file)
        except UserError as error:
            return PlainTextResponse(bench.hide_places(f"{error}\n"), status_code=404)
        if not whole:
            return FileResponse(path, filename=path.name, content_disposition_type="attachment")
        headers = {"content-disposition": f'attachment; filename="{path.name}.zip"'}
        return StreamingResponse(zip_folder(path), media_type="application/zip", headers=headers)

    def show_page(name: str) -> Any:
        try:
            page = read_page(find_download(bench.workspace, "runs", name))
        except UserError as error:
            return PlainTextResponse(bench.hide_places(f"{error}\n"), status_code=404)
        return HTMLResponse(page, headers={"content-security-policy": ISOLATED})

    app.get("/page/{name}")(show_page)
    app.get("/download/{kind}/{name}")(download)
    app.get("/download/{kind}/{name}/{file:path}")(download)
