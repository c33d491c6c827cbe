"""Settings of the server, and the only place that reads the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Environment(BaseSettings):
    """FOREGATE_HOME, FOREGATE_API_KEY (several, separated by commas), XDG_CACHE_HOME."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True, env_ignore_empty=True)

    foregate_home: Path | None = None
    xdg_cache_home: Path | None = None
    foregate_api_key: SecretStr | None = None

    @property
    def home(self) -> Path:
        """Where models are kept: FOREGATE_HOME, else foregate in XDG_CACHE_HOME, else ~/.cache/foregate."""
        if self.foregate_home is not None:
            return self.foregate_home.expanduser()
        cache = self.xdg_cache_home or Path("~/.cache")
        return cache.expanduser() / "foregate"

    @property
    def api_keys(self) -> list[str]:
        if self.foregate_api_key is None:
            return []
        return [key.strip() for key in self.foregate_api_key.get_secret_value().split(",") if key.strip()]


class AppSettings(BaseModel):
    """How the HTTP application behaves. The first of `served_names` is the model's name in answers and metrics."""

    model_config = ConfigDict(frozen=True)

    served_names: tuple[str, ...] = Field(min_length=1)
    accept_any_model_name: bool = False
    strict_requests: bool = False  # unknown fields are 400 instead of a warning
    api_key_hashes: tuple[bytes, ...] = Field(default=(), repr=False)  # see server.auth.hash_key; none: open
    open_metrics: bool = False  # /metrics needs no key
    metrics_compat: Literal["vllm", "none"] = "vllm"
    max_body_nbytes: int = 16 * 1024**2
    max_body_values: int = 1024**2  # in its JSON, told by their commas: more tokens than any prompts may have together
    max_body_members: int = 64 * 1024  # of the objects in it
    max_prompts: int = 256
    max_choices: int = 1024  # of one request: n times its prompts
    max_parallel_prompts: int = 32  # of these at once
    max_stop_strings: int = 4
    stall_timeout_s: float = 300.0  # without a step while there is work: then the engine is not alive
    send_timeout_s: float = 60.0  # a client that reads nothing for so long is given up
    heartbeat_s: float = 15.0  # silence in a stream before a comment is sent
