"""Names of models -> local checkpoint directories. Reads no environment; imports nothing heavy until asked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from engine.errors import CheckpointError
from engine.refactor.demo import DemoModel

DEMO = "demo"

Progress = Callable[[str, int, int], None]  # what is done, steps done, steps in all

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt")


def resolve_model(name: str, home: Path) -> Path:
    """The checkpoint directory that `name` means: a directory, `demo` (under `home`), or org/name on the hub.

    Raises `CheckpointError` with the cure when there is none.
    """
    if name and Path(name).is_dir():  # an empty path would be the current directory
        return Path(name)
    if name == DEMO:
        path = _demo_path(home)
        if not (path / "config.json").is_file():
            raise CheckpointError("the demo model is not here yet; run `foregate pull demo`")
        return path
    if _HUB_NAME.fullmatch(name):
        return _from_hub(name)
    raise _unknown(name)


def pull(
    name: str,
    home: Path,
    progress: Progress = lambda what, done, total: None,
    *,
    demo: DemoModel | None = None,
) -> Path:
    """Make `name` (`demo` or org/name) available locally and return its directory; at once if it already is.

    An interrupted pull leaves no model behind. `demo` says what the demo is made from; None: the bundled one.
    Raises `CheckpointError`.
    """
    if name == DEMO:
        return _pull_demo(_demo_path(home), progress, demo or DemoModel())
    if _HUB_NAME.fullmatch(name):
        return _from_hub(name)
    raise _unknown(name)


def _demo_path(home: Path) -> Path:
    return home / "models" / DEMO


def _pull_demo(path: Path, progress: Progress, demo: DemoModel) -> Path:
    if _plan_of(path) == demo.plan_sha256():
        return path
    from engine.refactor.plan import RefactorPlan
    from engine.refactor.source import open_source
    from engine.refactor.write import write_checkpoint

    plan = RefactorPlan.load(demo.plan_path)
    progress("download", 0, 1)
    with demo.dense() as gguf:
        progress("download", 1, 1)
        write_checkpoint(open_source(gguf), plan, path, progress=progress, replace=True)
    return path


def _plan_of(path: Path) -> str | None:
    """Hash of the plan that a refactored checkpoint was made with; None: there is no such checkpoint."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return str(config["foregate_refactor"]["plan_sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{name!r} is not a directory here and could not be fetched from the hub ({reason}); "
            "check the name, the network and, for gated models, `hf auth login`"
        ) from error


def _unknown(name: str) -> CheckpointError:
    return CheckpointError(f"no model {name!r}: give a checkpoint directory, `{DEMO}`, or a hub name like org/name")
