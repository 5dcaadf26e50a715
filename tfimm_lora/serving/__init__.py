"""Serve one base model with many adapters over HTTP.

``app.py`` is the application, ``server.py`` runs it in this process, ``ray_serve.py`` in
several. Needs the extra "serve".
"""

from tfimm_lora.utils.optional_imports import require

_MODULES = ("fastapi", "fastapi_offline", "prometheus_client", "python_multipart", "uvicorn")

for _module in _MODULES:
    require(_module, extra="serve", why="Serving over HTTP")
