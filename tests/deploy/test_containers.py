"""Dockerfile, .dockerignore, compose, the systemd unit and the pinned packages: all there, and nothing made up."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from tests.deploy.manifests import ROOT
from tests.deploy.serve_options import parsed_serve

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = ROOT / "deploy" / "docker-compose.yml"
TARGETS = ("cpu", "gpu")


def stages() -> dict[str, list[str]]:
    """Stage -> its instructions, each on one line."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[str]] = {"": []}
    stage = ""
    for line in text.splitlines():
        if match := re.match(r"FROM .* AS (\S+)", line):
            stage = match[1]
            found[stage] = []
        elif line.strip():
            found[stage].append(re.sub(r"\s+", " ", line.strip()))
    return found


def instructions(stage: str, name: str) -> Iterator[str]:
    return (line.removeprefix(name).strip() for line in stages()[stage] if line.split()[0] == name)


def pinned(name: str) -> dict[str, set[str]]:
    """Package -> versions (several, where they differ by Python) of one of the files of deploy/lock.py."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "deploy" / name).read_text().splitlines():
        if match := re.match(r"([a-z0-9.-]+)==([^\s;]+)", line):
            found.setdefault(match[1], set()).add(match[2])
    return found


def pyproject() -> dict[str, Any]:
    loaded: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return loaded


def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("hadolint")), "Dockerfile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("target", TARGETS)
def test_all_that_is_copied_is_there_and_not_ignored(target: str) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [source for line in instructions(f"{target}-build", "COPY") for source in line.split()[:-1]]
    assert set(copied) == set(allowed) - ({"deploy/requirements-gpu.txt"} if target == "cpu" else set())
    assert all((ROOT / source).exists() for source in copied)
    packages = {include.rstrip("*") for include in pyproject()["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= set(copied)


@pytest.mark.parametrize("target", TARGETS)
def test_a_library_that_was_not_built_stops_the_build(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    import setup

    install = next(line for line in instructions(f"{target}-build", "RUN") if "--no-build-isolation" in line)
    for library in setup.LIBRARIES:
        assert f"site-packages/{library.replace('.', '/')}.so" in install
    assert "setuptools" in pinned("requirements.txt")  # without isolation the pinned one builds


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_serves_as_somebody_without_rights(target: str) -> None:
    (user,) = instructions(target, "USER")
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)
    (command,) = instructions(target, "CMD")
    options = parsed_serve(yaml.safe_load(command))
    assert list(instructions(target, "EXPOSE")) == [str(options["port"])]
    (health,) = instructions(target, "HEALTHCHECK")
    assert f"127.0.0.1:{options['port']}/health" in health
    assert list(instructions(target, "ENTRYPOINT")) == ['["foregate"]']
    assert "foregate" in pyproject()["project"]["scripts"]


def test_the_images_differ_only_in_what_a_gpu_needs() -> None:
    cpu, gpu = stages()["cpu"], stages()["gpu"]
    same = [line.replace("cpu-build", "gpu-build") for line in cpu]
    assert [line.replace(" TRITON_CACHE_DIR=/models/triton", "") for line in gpu] == same
    assert list(stages())[-1] == "cpu"  # the default of `docker build`


def test_every_dependency_is_pinned_to_a_version_that_we_allow() -> None:
    common, gpu = pinned("requirements.txt"), pinned("requirements-gpu.txt")
    for text in pyproject()["project"]["dependencies"]:
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        versions = (gpu if name == "torch" else common)[name]
        assert all(requirement.specifier.contains(version) for version in versions), text
    assert "torch" not in common
    (default,) = (line for line in instructions("cpu-build", "ARG") if line.startswith("TORCH_VERSION="))
    assert gpu["torch"] == {default.partition("=")[2]}


def test_what_is_pinned_has_a_hash() -> None:
    for name in ("requirements.txt", "requirements-gpu.txt"):
        text = (ROOT / "deploy" / name).read_text()
        blocks = re.split(r"\n(?=[a-z0-9])", text.partition("\n")[2].strip())
        assert len(blocks) > 10
        assert all("--hash=sha256:" in block for block in blocks)


def test_the_base_image_has_the_python_of_the_tests_and_the_lock() -> None:
    lock = (ROOT / "deploy" / "lock.py").read_text()
    assert 'OLDEST_PYTHON = "3.11"' in lock
    assert "debian:bookworm" in DOCKERFILE  # whose Python is 3.11
    assert version("foregate")


def test_compose_is_valid_by_its_schema() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_compose_starts_what_there_is(target: str) -> None:
    services: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    service = services[f"foregate-{target}"]
    assert service["build"]["target"] == service["profiles"][0] == target
    assert (COMPOSE.parent / service["build"]["context"] / "Dockerfile").resolve() == ROOT / "Dockerfile"
    options = parsed_serve([re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in service["command"]])
    assert options["model"] == "demo"
    assert service["ports"] == [f"127.0.0.1:{options['port']}:{options['port']}"]
    assert float(service["stop_grace_period"].rstrip("s")) > options["shutdown_timeout"] + 2
    assert options["packed_dir"] == Path("/models/packed")
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    targets = [t for job in scraped for config in job["static_configs"] for t in config["targets"]]
    assert targets == [f"{service['networks']['default']['aliases'][0]}:{options['port']}"]


def test_what_compose_mounts_from_here_is_here() -> None:
    services: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    mounted = [volume.split(":")[0] for name in ("prometheus", "grafana") for volume in services[name]["volumes"]]
    folders = [path for path in mounted if path.startswith("./")]
    assert len(folders) == 3
    assert all((COMPOSE.parent / path).is_dir() for path in folders)
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (COMPOSE.parent / "grafana" / "dashboards" / Path(home).name).is_file()


def test_the_systemd_unit_serves_with_options_that_there_are() -> None:
    unit = (ROOT / "deploy" / "foregate.service").read_text()
    settings = dict(re.findall(r"^(\w+)=(.*)$", unit, flags=re.MULTILINE))
    environment = dict(
        word.split("=", 1) for line in re.findall(r"^Environment=(.*)$", unit, re.MULTILINE) for word in line.split()
    )
    words = [environment.get(word.strip("${}"), word) for word in settings["ExecStart"].split()]
    options = parsed_serve([word for word in words[1:] if word])
    assert options["model"] == "demo"
    assert float(settings["TimeoutStopSec"].rstrip("s")) > options["shutdown_timeout"] + 2
    assert settings["KillMode"] == "mixed"  # the engine's process must not be told to stop before the server is
    assert environment["FOREGATE_HOME"] == f"/var/lib/{settings['StateDirectory']}"


def test_a_wheel_has_every_file_that_the_repository_has(tmp_path: Path) -> None:
    """But for sources of native code, which it has compiled."""
    command = ["git", "ls-files", "--", "server", "engine", "cache", "kernels"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    source = tmp_path / "source"
    for name in [*tracked, "pyproject.toml", "setup.py", "README.md", "LICENSE"]:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    program = """
import setuptools.build_meta as backend, sys
sys.argv = ["setup.py", "--quiet", "build_py", "--build-lib", sys.argv[1]]
exec(open("setup.py").read())
"""
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(out)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    installed = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    needed = {name for name in tracked if "/src/" not in name and Path(name).suffix not in (".cpp", ".h", ".inl")}
    assert needed <= installed, sorted(needed - installed)
