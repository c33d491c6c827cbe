"""server/cli_engine.py: options in groups, and the configuration that they make."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from engine.config import CacheConfig, EngineConfig
from engine.errors import ConfigError
from server.cli_engine import Arithmetic, Formats, Memory, Tiers, Weights, engine_config, grouped


def outcome(*arguments: str) -> tuple[int, list[object]]:
    """What a command got for these arguments."""
    got: list[object] = []
    app = typer.Typer()

    @app.command()
    @grouped
    def command(*, weights: Weights, first: int = 1, memory: Memory, last: int = 2) -> None:
        """Says what it got."""
        got.extend((weights, first, memory, last))

    return CliRunner().invoke(app, list(arguments)).exit_code, got


def test_a_command_gets_its_groups_with_what_was_given_and_with_defaults():
    assert outcome() == (0, [Weights("demo", None, None), 1, Memory(None, None), 2])
    given = ("here", "--layers", "3", "--first", "5", "--expert-memory", "1MiB")
    assert outcome(*given) == (0, [Weights("here", None, 3), 5, Memory(None, 1024**2), 2])
    assert outcome("--kv-memory", "a lot")[0] == outcome("--memory", "1MiB")[0] == 2


def test_the_options_of_a_group_stand_where_the_group_stood():
    app = typer.Typer()

    @app.command()
    @grouped
    def command(*, first: int = 1, memory: Memory, last: int = 2) -> None:
        """Of no interest."""

    text = CliRunner().invoke(app, ["--help"]).stdout
    places = [text.index(option) for option in ("--first", "--kv-memory", "--expert-memory", "--last")]
    assert places == sorted(places)


def test_groups_change_their_own_settings_and_leave_the_others():
    tiers = Tiers("lru", "off", 5, True, 1e9)
    config = engine_config(
        Path("m"), Formats("float32", "int4"), Memory(7, 8), tiers, Arithmetic(2, "reference", "pregated")
    )
    cache = CacheConfig(
        format="int4",
        memory_nbytes=8,
        policy="lru",
        predictor="off",
        host_memory_nbytes=5,
        exclusive_tiers=True,
        link_bandwidth=1e9,
    )
    assert config == EngineConfig(
        model=Path("m"),
        dtype="float32",
        kv_memory_nbytes=7,
        num_threads=2,
        kernels="reference",
        router="pregated",
        cache=cache,
    )
    assert engine_config(Path("m"), packed_dir=Path("p")).cache == CacheConfig(packed_dir=Path("p"))


def test_no_group_at_its_defaults_changes_a_setting():
    memory = Memory(512 * 1024**2)  # typer's parser makes it of the text
    assert engine_config(Path("m"), Formats(), memory, Tiers(), Arithmetic()) == EngineConfig(model=Path("m"))


def test_what_a_configuration_refuses_a_group_does_not_hide():
    with pytest.raises(ConfigError, match="unknown dtype 'int3'"):
        engine_config(Path("m"), Formats("int3"))
