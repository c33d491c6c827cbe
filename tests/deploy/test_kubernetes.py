"""deploy/kubernetes: valid by the real schemas, and true to our command line, paths, ports and metrics."""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
import pytest

from tests.deploy.manifests import COMPONENTS, KUBERNETES, OVERLAYS, Manifest, built, containers, documents
from tests.deploy.serve_options import parsed_serve

CUSTOM = {"ServiceMonitor", "ScaledObject"}  # their definitions are not Kubernetes' own
LATEST = "1.33"


def overlay(name: str) -> list[Manifest]:
    return built(KUBERNETES / "overlays" / name)


def stateful_set(name: str) -> Manifest:
    (found,) = (m for m in overlay(name) if m["kind"] == "StatefulSet")
    return found


@pytest.mark.parametrize("version", ["1.29", LATEST])
@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_are_valid_by_the_schemas_of_kubernetes(name: str, version: str) -> None:
    kinds = [manifest["kind"] for manifest in overlay(name)]
    for manifest in overlay(name):
        assert manifest["metadata"]["namespace"] == "foregate"
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, version, strict=True)
    assert {"StatefulSet", "Service", "NetworkPolicy", "PodDisruptionBudget", "ServiceAccount"} <= set(kinds)


def test_a_mistake_in_a_manifest_is_found() -> None:
    (good,) = documents(KUBERNETES / "base" / "statefulset.yaml")
    good["spec"]["template"]["spec"]["terminationGracePeriod"] = 75
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(good, LATEST, strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_are_restricted_by_the_pod_security_standard(name: str) -> None:
    pod = stateful_set(name)["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"requests", "limits"} <= set(container["resources"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_server_is_told_what_the_pod_gives_it(name: str) -> None:
    manifest = stateful_set(name)
    pod = manifest["spec"]["template"]["spec"]
    (container,) = containers(manifest)
    options = parsed_serve(container["args"])
    assert options["host"] == "0.0.0.0"
    assert [port["containerPort"] for port in container["ports"]] == [options["port"]]
    assert pod["terminationGracePeriodSeconds"] > options["shutdown_timeout"] + 2
    assert options["shutdown_linger"] < options["shutdown_timeout"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert mounts[str(options["api_key_file"].parent)] == "keys"
    volumes = {volume["name"] for volume in pod["volumes"]}
    claims = {claim["metadata"]["name"] for claim in manifest["spec"]["volumeClaimTemplates"]}
    assert mounts["/models"] in claims
    assert set(mounts.values()) == volumes | claims


@pytest.mark.parametrize("name", OVERLAYS)
async def test_probes_ask_for_paths_that_need_no_key(name: str, paths_without_key: set[str]) -> None:
    (container,) = containers(stateful_set(name))
    ports = {port["name"] for port in container["ports"]}
    for probe, path in (("startupProbe", "/health"), ("readinessProbe", "/ready"), ("livenessProbe", "/live")):
        asked = container[probe]["httpGet"]
        assert asked["path"] == path
        assert asked["path"] in paths_without_key
        assert asked["port"] in ports


@pytest.mark.parametrize("name", OVERLAYS)
def test_names_that_refer_to_each_other_do(name: str) -> None:
    manifests = overlay(name)
    labels = stateful_set(name)["spec"]["template"]["metadata"]["labels"]
    services = {m["metadata"]["name"]: m for m in manifests if m["kind"] == "Service"}
    assert services[stateful_set(name)["spec"]["serviceName"]]["spec"]["clusterIP"] == "None"
    selectors: list[dict[str, Any]] = [m["spec"]["selector"] for m in services.values()]
    selectors += [m["spec"]["selector"]["matchLabels"] for m in manifests if m["kind"] == "PodDisruptionBudget"]
    selectors += [m["spec"]["podSelector"]["matchLabels"] for m in manifests if m["kind"] == "NetworkPolicy"]
    selectors += [m["spec"]["selector"]["matchLabels"] for m in manifests if m["kind"] == "StatefulSet"]
    assert all(selector.items() <= labels.items() for selector in selectors)


def test_the_gpu_overlay_asks_for_a_gpu_and_the_other_does_not() -> None:
    (gpu,), (cpu,) = containers(stateful_set("gpu")), containers(stateful_set("cpu"))
    assert (gpu["image"], cpu["image"]) == ("foregate:gpu", "foregate:cpu")
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in cpu["resources"]["limits"]


def test_the_service_monitor_scrapes_a_service_and_a_port_that_there_are() -> None:
    manifests = overlay("gpu-autoscaled")
    (monitor,) = (m for m in manifests if m["kind"] == "ServiceMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    (endpoint,) = monitor["spec"]["endpoints"]
    kept = re.compile(endpoint["relabelings"][0]["regex"])
    scraped = [
        m
        for m in manifests
        if m["kind"] == "Service"
        and monitor["spec"]["selector"]["matchLabels"].items() <= m["metadata"]["labels"].items()
        and kept.fullmatch(m["metadata"]["name"])
    ]
    assert [port["name"] for m in scraped for port in m["spec"]["ports"]] == [endpoint["port"]]
    assert endpoint["path"] == "/metrics"


def test_what_scales_asks_for_a_metric_that_there_is_and_scales_the_stateful_set(served_metrics: set[str]) -> None:
    name = "foregate_num_requests_waiting"
    assert name in served_metrics
    (hpa,) = documents(KUBERNETES / "components/autoscaling/horizontalpodautoscaler.yaml")
    assert hpa["spec"]["metrics"][0]["pods"]["metric"]["name"] == name
    (adapter,) = documents(KUBERNETES / "components/autoscaling/prometheus-adapter-values.yaml")
    (rule,) = adapter["rules"]["custom"]
    assert rule["seriesQuery"].startswith(name + "{")
    assert re.fullmatch(rule["name"]["matches"], name)
    (scaled,) = documents(KUBERNETES / "components/keda/scaledobject.yaml")
    assert scaled["apiVersion"] == "keda.sh/v1alpha1"
    assert name in scaled["spec"]["triggers"][0]["metadata"]["query"]
    manifest = stateful_set("cpu")
    for target in (hpa["spec"]["scaleTargetRef"], scaled["spec"]["scaleTargetRef"]):
        found = (manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"])
        assert (target["apiVersion"], target["kind"], target["name"]) == found


@pytest.mark.parametrize("name", COMPONENTS)
def test_components_are_in_the_namespace_of_the_overlays(name: str) -> None:
    assert {m["metadata"]["namespace"] for m in built(KUBERNETES / "components" / name)} == {"foregate"}
