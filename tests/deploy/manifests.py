"""Kustomize, as far as our manifests use it: resources, components, JSON patches, images, a namespace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(path.parent.name for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))
COMPONENTS = sorted(path.parent.name for path in KUBERNETES.glob("components/*/kustomization.yaml"))

_KNOWN = {"apiVersion", "kind", "namespace", "resources", "components", "images", "patches"}

Manifest = dict[str, Any]


def documents(path: Path) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def built(folder: Path) -> list[Manifest]:
    """What `kubectl kustomize` makes of it, but for the order."""
    (kustomization,) = documents(folder / "kustomization.yaml")
    assert set(kustomization) <= _KNOWN, f"{folder}: this test does not know {set(kustomization) - _KNOWN}"
    manifests: list[Manifest] = []
    for name in [*kustomization.get("resources", []), *kustomization.get("components", [])]:
        path = folder / name
        manifests += built(path) if path.is_dir() else documents(path)
    manifests = copy.deepcopy(manifests)
    for patch in kustomization.get("patches", []):
        (target,) = (m for m in manifests if _is_target(m, patch["target"]))
        for operation in yaml.safe_load(patch["patch"]):
            _apply(target, operation)
    for manifest in manifests:
        if "namespace" in kustomization:
            manifest["metadata"]["namespace"] = kustomization["namespace"]
        for image in kustomization.get("images", []):
            for container in containers(manifest):
                if container["image"].partition(":")[0] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    return manifests


def containers(manifest: Manifest) -> list[dict[str, Any]]:
    if manifest["kind"] != "StatefulSet":
        return []
    found: list[dict[str, Any]] = manifest["spec"]["template"]["spec"]["containers"]
    return found


def _is_target(manifest: Manifest, target: dict[str, str]) -> bool:
    return manifest["kind"] == target["kind"] and manifest["metadata"]["name"] == target["name"]


def _apply(document: Any, operation: dict[str, Any]) -> None:
    """One operation of RFC 6902; `replace` wants something that is there."""
    *parents, last = operation["path"].strip("/").split("/")
    for name in parents:
        document = document[int(name)] if isinstance(document, list) else document[name]
    assert isinstance(document, dict)
    assert operation["op"] in ("add", "replace")
    assert operation["op"] == "add" or last in document, f"nothing to replace at {operation['path']}"
    document[last] = operation["value"]
