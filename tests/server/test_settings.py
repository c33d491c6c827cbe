"""server/settings.py and server/errors.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from server.errors import ApiError, without_paths
from server.settings import Environment

ROOT = Path(__file__).parents[2]


def test_home_is_foregate_home_then_xdg_then_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FOREGATE_HOME", raising=False)
    assert Environment().home == Path("/h/.cache/foregate")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert Environment().home == Path("/x/foregate")
    monkeypatch.setenv("FOREGATE_HOME", "~/f")
    assert Environment().home == Path("/h/f")
    monkeypatch.setenv("FOREGATE_HOME", "")
    assert Environment().home == Path("/x/foregate")


def test_keys_come_from_the_environment_and_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOREGATE_API_KEY", raising=False)
    assert Environment().api_keys == []
    monkeypatch.setenv("FOREGATE_API_KEY", "secret-1, secret-2,")
    assert Environment().api_keys == ["secret-1", "secret-2"]
    assert "secret" not in repr(Environment())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot read /home/a/b.bin: input/output error", "cannot read <path>: input/output error"),
        ("use http://localhost:8000/v1/models", "use http://localhost:8000/v1/models"),
        ("layers.3.experts.5 of 1/2", "layers.3.experts.5 of 1/2"),
    ],
)
def test_paths_do_not_leave_the_house(text: str, shown: str) -> None:
    assert without_paths(text) == shown


def test_an_error_is_at_most_2000_characters() -> None:
    assert len(ApiError(400, "x" * 10_000).message) == 2000


def test_only_the_settings_read_the_environment() -> None:
    readers = {
        str(path.relative_to(ROOT))
        for floor in ("server", "engine", "cache", "kernels")
        for path in (ROOT / floor).rglob("*.py")
        if re.search(r"os\.environ|getenv|BaseSettings\)", path.read_text())
    }
    # the first for OpenMP, the others for the processes that they start; none takes a setting from there
    hand_on = {"engine/threads.py", "engine/process_link.py", "engine/grammar_trial.py", "engine/expert_group.py"}
    assert readers <= {"server/settings.py"} | hand_on
