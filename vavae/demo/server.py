"""The server of the page of a run: it listens where it is told, asks no network for anything, and keeps no upload."""

import ipaddress
import os
import socket
import tempfile
from contextlib import suppress

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from vavae.demo.page import CSS, THEME, build_page
from vavae.demo.playground import Playground
from vavae.errors import UserError

_PORT = 7860
"""The one of gradio."""
_LARGEST_UPLOAD = "100mb"
_SHUTDOWN_SECONDS = 1
"""Time that open connections, which pages keep, have to end."""


def listen(host: str, port: int | None) -> socket.socket:
    """Listen at an address.

    Args:
        host: the address, or its name.
        port: of it; 0 takes any, and None gradio's or, where that is taken, any.

    Raises:
        UserError: it is not an address of this machine, or the port is taken.
    """
    try:
        if port is None:
            with suppress(OSError):
                return socket.create_server((host, _PORT))
        return socket.create_server((host, port or 0))
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no such port"
        raise UserError(f"--host {host} --port {port or 0}: {reason}: give another host or port") from error


def serve(playground: Playground, listener: socket.socket) -> None:
    """Serve the page of a run until Ctrl-C; uploads and pictures lie in a folder that goes with it."""
    host, port = listener.getsockname()[:2]
    with tempfile.TemporaryDirectory(prefix="vavae-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        server = uvicorn.Server(
            uvicorn.Config(
                build_app(playground, host),
                log_level="warning",
                timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
            )
        )
        print(f"http://{host}:{port}/ serves {playground.run.storage.url()}; Ctrl-C ends it", flush=True)
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def build_app(playground: Playground, host: str) -> FastAPI:
    """Put the page and the report of a run together.

    Args:
        playground: the models.
        host: address at which it is served; at one of loopback, requests to other names are refused, so that no page of
            a stranger reaches it by a name of its own.
    """
    app = FastAPI(openapi_url=None)
    if ipaddress.ip_address(host).is_loopback:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", host])
    app.get("/report", response_class=HTMLResponse)(playground.report)
    return gr.mount_gradio_app(
        app,
        build_page(playground),
        path="/",
        server_name=host,
        theme=THEME,
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        max_file_size=_LARGEST_UPLOAD,
    )
