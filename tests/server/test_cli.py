"""server/cli.py: what the user types and what they are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine.async_engine
import engine.convert
import engine.hub
import server.app
import server.chat_terminal
import server.console
from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError
from server.settings import AppSettings
from tests.server.fake_engine import FakeEngine

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """The engine that commands get; `fake.config` and `fake.build` are what they asked for."""
    made = FakeEngine()

    def make(config: EngineConfig, *, progress: Any = None, build: Any = None, **_: Any) -> FakeEngine:
        made.config, made.build = config, build  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(engine.async_engine, "AsyncEngine", make)
    monkeypatch.setattr(server.chat_terminal, "AsyncEngine", make)
    return made


def test_an_interrupt_while_the_command_line_is_imported_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "server.cli", Interrupted("server.cli"))
    with pytest.raises(SystemExit) as ended:
        server.console.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == ""


def test_the_version_is_printed(foregate: Any) -> None:
    assert foregate("--version").out.startswith("foregate 0.")


@pytest.mark.parametrize(
    "args",
    [
        ("serve", "--kv-memory", "5Q"),
        ("serve", "--port", "99999"),
        ("serve", "--max-num-seqs", "0"),
        ("serve", "--log-level", "loud"),
        ("serve", "--layers", "2"),
        ("serve", "--metrics-compat", "other"),
        ("serve", ".", "--random", "olmoe"),
        ("bench", "offline", "--layers", "2"),
        ("serve", "--nonsense"),
        ("nonsense",),
    ],
)
def test_wrong_usage_is_exit_code_2(foregate: Any, args: tuple[str, ...]) -> None:
    result = foregate(*args)
    assert result.code == 2
    assert "Error:" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("serve", "/nowhere/at/all", "--port", "0"), "no model '/nowhere/at/all'"),
        (("serve", ".", "--port", "0", "--dtype", "float8"), "unknown dtype 'float8'; known: auto, float32, bfloat16"),
        (("serve", ".", "--port", "0", "--api-key-file", "/nowhere/keys"), "/nowhere/keys"),
        (("serve", ".", "--host", "192.0.2.1"), "choose another"),
        (("chat", "/nowhere/at/all", "--once", "hi"), "no model"),
        (("chat", "--url", "http://127.0.0.1:9", "--once", "hi"), "is a server running there?"),
        (("convert", "/nowhere/at/all"), "no model"),
        (("pull", "no such name"), "no model"),
    ],
)
def test_what_the_user_can_cure_is_one_line_and_exit_code_1(foregate: Any, args: tuple[str, ...], words: str) -> None:
    result = foregate(*args)
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert words in result.err


@pytest.mark.parametrize("error", [ConfigError("budget too small"), CheckpointError("no shard"), ValueError("corrupt")])
def test_a_model_that_does_not_load_is_one_line_and_exit_code_1(
    foregate: Any, fake: FakeEngine, error: Exception, tmp_path: Path
) -> None:
    fake.start_error = error
    for command in (("serve", str(tmp_path), "--port", "0"), ("chat", str(tmp_path), "--once", "hi")):
        result = foregate(*command)
        assert (result.code, result.err) == (1, f"error: {error}\n")


def test_the_options_reach_the_engine(foregate: Any, fake: FakeEngine, tmp_path: Path) -> None:
    fake.start_error = ConfigError("far enough")
    options = (
        "--dtype float32 --experts int8 --max-model-len 100 --max-num-seqs 3 --max-num-batched-tokens 64 "
        "--kv-memory 1GiB --expert-memory 2MiB --cache-policy lru --served-model-name a "
        "--served-model-name b --seed 5 --threads 2"
    )
    foregate("serve", str(tmp_path), "--port", "0", *options.split())
    config: EngineConfig = fake.config  # type: ignore[attr-defined]
    assert (config.model, config.served_name, config.dtype) == (tmp_path, "a", "float32")
    assert (config.max_model_len, config.kv_memory_nbytes, config.seed, config.num_threads) == (100, 1024**3, 5, 2)
    assert (config.cache.format, config.cache.memory_nbytes, config.cache.policy) == ("int8", 2 * 1024**2, "lru")
    assert (config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens) == (3, 64)


@pytest.mark.parametrize("compat", ["vllm", "none"])
def test_other_servers_names_of_metrics_can_be_left_out(
    foregate: Any, fake: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compat: str
) -> None:
    fake.start_error = ConfigError("far enough")
    made: list[AppSettings] = []
    create = server.app.create_app

    def keeping(engine: Any, settings: AppSettings, **more: Any) -> Any:
        made.append(settings)
        return create(engine, settings, **more)

    monkeypatch.setattr("server.app.create_app", keeping)
    foregate("serve", str(tmp_path), "--port", "0", "--metrics-compat", compat)
    assert [settings.metrics_compat for settings in made] == [compat]


def test_without_options_the_engine_decides(foregate: Any, fake: FakeEngine, tmp_path: Path) -> None:
    fake.start_error = ConfigError("far enough")
    foregate("serve", str(tmp_path), "--port", "0")
    config: EngineConfig = fake.config  # type: ignore[attr-defined]
    assert config == EngineConfig(model=tmp_path, served_name=tmp_path.name, share_memory=True)


def test_random_weights_take_the_place_of_a_checkpoint_and_leave_nothing_behind(
    foregate: Any, fake: FakeEngine
) -> None:
    fake.start_error = ConfigError("far enough")
    foregate("serve", "--random", "olmoe", "--layers", "2", "--port", "0")
    config: EngineConfig = fake.config  # type: ignore[attr-defined]
    assert fake.build.args == ("olmoe", 2)  # type: ignore[attr-defined]
    assert config.served_name == config.model.name == "random-olmoe-2"
    assert not config.model.parent.exists()


def test_chat_once_answers_with_the_engine_in_process(foregate: Any, fake: FakeEngine, tmp_path: Path) -> None:
    result = foregate("chat", str(tmp_path), "--once", "hi")
    assert (result.code, result.out) == (0, "Paris.\n")
    assert fake.seen[0][2].temperature == 0.0
    assert fake.stopped_with == 0.0


def test_the_demo_is_pulled_before_it_is_used(
    foregate: Any, fake: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled = []

    def pull(name: str, home: Path, progress: Any) -> Path:
        progress("download", 1, 1)
        pulled.append((name, home))
        return tmp_path

    monkeypatch.setattr(engine.hub, "pull", pull)
    assert foregate("chat", "--once", "hi").out == "Paris.\n"
    assert foregate("pull").out == f"{tmp_path}\n"
    assert pulled == [("demo", tmp_path / "home")] * 2


def test_convert_says_where_the_packed_file_is(foregate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(model: Path, format: str, packed_dir: Path | None, progress: Any) -> Path:
        return model / f"{format}.safetensors"

    monkeypatch.setattr(engine.convert, "convert", convert)
    assert foregate("convert", str(tmp_path), "--experts", "int4").out == f"{tmp_path}/int4.safetensors\n"


SERVE_FOREVER = """
import contextlib
from server.app import create_app
from server.context import Lifecycle
from server.serve import ShutdownTimes, listen, run
from server.settings import AppSettings
from tests.server.fake_engine import FakeEngine

class Ready(contextlib.nullcontext):
    def __exit__(self, *args):
        print("loaded", flush=True)

class Entered(contextlib.nullcontext):
    def __enter__(self):
        print("loading", flush=True)

engine, lifecycle = FakeEngine(), Lifecycle()
engine.start_s = {start_s}
app = create_app(engine, AppSettings(served_names=("fake",)), lifecycle=lifecycle)
run(engine, app, lifecycle, listen("127.0.0.1", 0), times=ShutdownTimes(linger_s=30.0), display={display}())
"""


@pytest.mark.parametrize(
    ("start_s", "display", "num_signals"), [(0.0, "Ready", 2), (60.0, "Entered", 1)], ids=["second signal", "loading"]
)
def test_a_second_signal_and_one_while_loading_end_the_process_at_once(
    start_s: float, display: str, num_signals: int
) -> None:
    code = SERVE_FOREVER.format(start_s=start_s, display=display)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(num_signals):
            time.sleep(0.1)
            os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=5.0) == 128 + signal.SIGTERM


def test_refactor_says_what_came_out(foregate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import engine.refactor.command as command
    from engine.refactor.perplexity import Perplexity

    asked: dict[str, Any] = {}

    def refactor(source: Path, out: Path, **options: Any) -> command.RefactorReport:
        asked.update(options, source=source, out=out)
        measured = [Perplexity("held-out text", 10.0, 11.5, [])]
        locality = command.Locality(srp=0.7, sch=0.81, specialisation=0.12, popularity=np.array([[0.1, 0.9]]))
        return command.RefactorReport(
            out=out, perplexities=measured, active_share=0.8333, locality=locality, seconds=61.2
        )

    monkeypatch.setattr(command, "refactor", refactor)
    result = foregate("refactor", "dense", "moe", "--num-experts", "8", "--calibration", "a.txt", "--calibration", "b",
                      "--dense-layers", "0-2,7", "--distil-tokens", "1000", "--state", "s")  # fmt: skip
    assert result.out.splitlines() == [
        "perplexity of held-out text: 10.00 dense, 11.50 refactored (1.15x)",
        "routing: SRP(16) 0.70, SCH(16, 2) 0.81; an expert serves 10% to 90% of the tokens; domains differ by 12%",
        "moe: 83% of the FFNs active, made in 61 s",
    ]
    assert (asked["source"], asked["out"], asked["num_experts"]) == (Path("dense"), Path("moe"), 8)
    assert (asked["calibration"], asked["plan"]) == ([Path("a.txt"), Path("b")], None)
    assert (asked["dense_layers"], asked["distil_tokens"], asked["state"]) == ([0, 1, 2, 7], 1000, Path("s"))
    result = foregate("refactor", "dense", "moe", "--dense-layers", "all")
    assert result.code == 1
    assert "cannot read layers 'all'; write them like 0-8,29" in result.err
