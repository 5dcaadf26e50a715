"""``ray_application``: the application in several processes, on one machine or more.

Each replica has the whole model and follows the same folder of adapters, so an adapter that is
added or removed by any of them, or in the folder, is so in all from their next request on.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from tfimm_lora.serving.app import create_app
from tfimm_lora.serving.opening import open_service
from tfimm_lora.serving.settings import ServingSettings
from tfimm_lora.utils.optional_imports import require


def ray_application(settings: ServingSettings, **options: Any) -> Any:
    """Create the application for ``ray.serve.run``.

    Args:
        settings: What is served. Every machine needs the base model and the folder of adapters
            at the same paths, for example on a shared file system. Relative paths are made
            absolute.
        **options: The options of ``ray.serve.deployment``: num_replicas, autoscaling_config,
            ray_actor_options, ... Default: as many requests at a time in each replica as it
            accepts in one process.

    Returns:
        An application of Ray Serve.

    Raises:
        ImportError: if Ray is not installed.
    """
    serve = require("ray.serve", extra="ray", why="Serving in several processes")
    settings = _with_absolute_paths(settings)

    def app_of_replica() -> Any:
        # In the process of the replica, which answers once its model is compiled.
        service = open_service(settings)
        service.warm_up()
        return create_app(service, settings)

    defaults = {"name": "tfimm_lora", "max_ongoing_requests": settings.max_waiting}
    deployment = serve.deployment(**{**defaults, **options})
    return deployment(serve.ingress(app_of_replica)()).bind()


def _with_absolute_paths(settings: ServingSettings) -> ServingSettings:
    """The settings for processes that work in another folder."""
    paths = {name: getattr(settings, name) for name in ("base", "adapters", "weights")}
    found = {k: os.path.abspath(p) for k, p in paths.items() if p and os.path.exists(p)}
    return replace(settings, **found)
