"""The service as an application that Ray Serve deploys from a config file: `serve deploy`, a RayService of KubeRay."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from badge_peft.serving.deployment import Service
from badge_peft.serving.run import replica_options
from badge_peft.serving.settings import Limits, ServiceSettings


def build(args: dict[str, Any]) -> Any:
    """What `import_path: badge_peft.serving.application:build` names, as an application of Ray Serve. How many
    replicas there are is said in the config file, of its deployment `Service`.

    Args:
        args: Fields of `ServiceSettings`, `adapter` among them; `limits` is a mapping of its own.

    Raises:
        ValueError: a field that is not there, or no adapter.
    """
    given = dict(args)
    _check_names(given, ServiceSettings)
    if not given.get("adapter"):
        raise ValueError("args has no adapter: name a repository, or a folder that all machines have.")
    limits = dict(given.pop("limits", None) or {})
    _check_names(limits, Limits)
    settings = ServiceSettings(**given, limits=Limits(**limits))
    made = Service.options(**replica_options(settings))  # type: ignore[attr-defined]  # Ray Serve's decorator adds it
    return made.bind(settings, None)  # this runs where the controller is: the token is in the replicas' environment


def _check_names(given: dict[str, Any], kind: type) -> None:
    known = [field.name for field in fields(kind)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"args has no field {unknown[0]!r}; {kind.__name__} has {', '.join(known)}.")
