"""``serve``: run the application in this process, with uvicorn."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from tfimm_lora.serving.app import create_app
from tfimm_lora.serving.service import Service
from tfimm_lora.serving.settings import ServingSettings


def listen(host: str, port: int) -> socket.socket:
    """Open the socket of a server, before the model is opened.

    Args:
        host: The address to listen on.
        port: The port; 0 for a free one.

    Raises:
        OSError: if the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise OSError(
            f"Received --host {host} --port {port}, where the server cannot listen: "
            f"{error.strerror or error}; expected an address of this machine and a free port."
        ) from error


def serve(
    service: Service,
    settings: ServingSettings,
    opened: socket.socket,
    say: Callable[[str], None],
) -> None:
    """Answer requests until the process is interrupted.

    Requests that are in progress then are answered.

    Args:
        service: The model with its adapters.
        settings: The limits and the token.
        opened: The socket of ``listen``.
        say: A function that is called with a message about the server.
    """
    host, port = opened.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    say(f"{service.count} adapters on {service.base.name}")
    say(f"serving on {address}, documentation on {address}/docs")
    config = uvicorn.Config(
        create_app(service, settings),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(settings.timeout) + 1,
    )
    uvicorn.Server(config).run(sockets=[opened])
