"""`deploy/`: the RayService has the fields that KubeRay knows, and what it deploys is what Ray Serve and the service
take."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"

#: Fields of ray.io/v1 (KubeRay 1.1 and newer), as far as the manifest goes; those with a * must be there. In a pod the
#: names are those of Kubernetes' core/v1. What is no mapping is a type. Compared with KubeRay's API types and with the
#: models of the Kubernetes client 37.
RESOURCES = {"requests": {"cpu": str, "memory": str}, "limits": {"cpu": str, "memory": str}}
CONTAINER = {
    "*name": str,
    "*image": str,
    "command": [str],
    "args": [str],
    "ports": [{"*containerPort": int, "name": str, "protocol": str}],
    "env": [{"*name": str, "value": str, "valueFrom": {"secretKeyRef": {"name": str, "*key": str, "optional": bool}}}],
    "resources": RESOURCES,
    "volumeMounts": [{"*name": str, "*mountPath": str, "readOnly": bool}],
}
POD = {
    "metadata": {"labels": dict, "annotations": dict},
    "*spec": {
        "*containers": [CONTAINER],
        "securityContext": {"runAsNonRoot": bool, "runAsUser": int, "runAsGroup": int, "fsGroup": int},
        "terminationGracePeriodSeconds": int,
        "volumes": [dict],
    },
}
RAY_SERVICE = {
    "*apiVersion": str,
    "*kind": str,
    "*metadata": {"*name": str, "namespace": str, "labels": dict, "annotations": dict},
    "*spec": {
        "serveConfigV2": str,
        "rayClusterConfig": {
            "rayVersion": str,
            "enableInTreeAutoscaling": bool,
            "autoscalerOptions": {"idleTimeoutSeconds": int, "upscalingMode": str},
            "*headGroupSpec": {"serviceType": str, "*rayStartParams": dict, "*template": POD},
            "workerGroupSpecs": [
                {
                    "*groupName": str,
                    "replicas": int,
                    "*minReplicas": int,
                    "*maxReplicas": int,
                    "numOfHosts": int,
                    "*rayStartParams": dict,
                    "*template": POD,
                }
            ],
        },
    },
}


def wrong(value: Any, schema: Any, place: str = "") -> list[str]:
    """What of `value` the schema does not know."""
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{place} is no list"]
        return [found for i, item in enumerate(value) for found in wrong(item, schema[0], f"{place}[{i}]")]
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{place} is no mapping"]
        names = {name.lstrip("*"): own for name, own in schema.items()}
        missing = [f"{place}.{name[1:]} is missing" for name in schema if name[0] == "*" and name[1:] not in value]
        unknown = [f"{place}.{name} is not known" for name in value if name not in names]
        known = [found for n, own in names.items() if n in value for found in wrong(value[n], own, f"{place}.{n}")]
        return missing + unknown + known
    return [] if type(value) is schema else [f"{place} is no {schema.__name__}"]


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "rayservice.yaml").read_text(encoding="utf-8"))


def test_kuberay_knows_every_field(manifest: dict[str, Any]) -> None:
    assert wrong(manifest, RAY_SERVICE) == []
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    cluster = manifest["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all(type(value) is str for group in groups for value in group["rayStartParams"].values())
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert wrong({**manifest, "spec": {**manifest["spec"], "serveConfig": ""}}, RAY_SERVICE) != []  # it can fail


def test_what_it_deploys_fits_in_its_machines(manifest: dict[str, Any]) -> None:
    (application,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    (deployment,) = application["deployments"]
    (workers,) = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    assert "BADGE_PEFT_TOKEN" in {variable["name"] for variable in container["env"]}  # where the replicas are
    cores = int(container["resources"]["limits"]["cpu"])
    assert application["args"]["threads"] == deployment["ray_actor_options"]["num_cpus"] <= cores
    most = deployment["autoscaling_config"]["max_replicas"] * deployment["ray_actor_options"]["num_cpus"]
    assert most <= cores * workers["maxReplicas"]


def test_ray_serve_takes_the_config_and_the_service_its_arguments(
    manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="the extra `serve` is not installed")
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    build = getattr(import_module(module), name)
    monkeypatch.setenv("BADGE_PEFT_TOKEN", "of the head")  # where `build` runs, and no replica
    made = build(application.args)
    assert made._bound_deployment.name == application.deployments[0].name
    settings, token = made._bound_deployment.init_args
    assert settings.adapter == application.args["adapter"] and token is None  # each replica reads its environment
    for args, message in (
        ({"adaptor": "x"}, "no field 'adaptor'; ServiceSettings has adapter"),
        ({"threads": 1}, "no adapter"),
        ({"adapter": "x", "limits": {"row": 1}}, "no field 'row'; Limits has rows"),
    ):
        with pytest.raises(ValueError, match=message):
            build(args)


def test_the_image_is_for_a_user_without_rights_and_says_how_it_is() -> None:
    lines = re.sub(r"\\\n\s*", "", (DEPLOY / "Dockerfile").read_text(encoding="utf-8")).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    kinds = [kind for kind, _ in steps]
    assert kinds[0] == "FROM" and kinds.index("USER") < kinds.index("ENTRYPOINT")
    (user,) = [rest for kind, rest in steps if kind == "USER"]
    assert user != "root" and any("useradd" in rest and rest.endswith(user) for kind, rest in steps if kind == "RUN")
    (health,) = [rest for kind, rest in steps if kind == "HEALTHCHECK"]
    assert "/healthz" in health and any(rest == "8000" for kind, rest in steps if kind == "EXPOSE")
    sources = [name for kind, rest in steps if kind == "COPY" for name in rest.split()[:-1]]
    assert all((DEPLOY.parent / name).exists() for name in sources)
