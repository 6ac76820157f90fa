"""What one training is to do. Equal specs give the same bundle, and the digest of a spec names its folder."""

from __future__ import annotations

from pydantic import ValidationError, model_validator

from components import digest
from components.base_model import BasePin
from components.config import TrainingConfig
from components.errors import ConfigError
from components.frozen import Frozen
from components.methods import Method, Schedule, Settings, kind_of

# What a training's result depends on; changing any of it makes another code version.
CODE = ("adapters", "training", "base_model", "evaluation/metrics", "registry/bundle", "registry/members")


class DataRef(Frozen):
    """A saved split, by place and content."""

    uri: str
    digest: str


class Limits(Frozen):
    """What the job may use. Nothing here but the device changes more than how sums are rounded.

    processes: data-parallel, each with its share of every batch; batch size and number of steps stay what they are.
    Where there is dropout, they and tokens_at_once draw other masks of the same kind.  trunk_cache_gb, tokens_at_once,
    compile: as in ComputeConfig.
    """

    threads: int
    device: str
    processes: int = 1
    trunk_cache_gb: float = 0
    tokens_at_once: int | None = None
    compile: bool = False


class JobSpec(Frozen):
    """One training. `settings` are those of the method; None where it has none, as `full` and `bitfit`."""

    method: Method
    base: BasePin
    data: DataRef
    labels: tuple[str, ...]
    settings: Settings | None
    schedule: Schedule
    training: TrainingConfig
    limits: Limits
    seed: int
    code: str

    @model_validator(mode="after")
    def _settings_are_the_methods(self) -> JobSpec:
        wanted, found = kind_of(self.method) or type(None), type(self.settings)
        if wanted is not found:
            raise ValueError(f"method {self.method} has settings of type {wanted.__name__}, found {found.__name__}")
        return self

    @property
    def digest(self) -> str:
        """What is learned counts; where the data lies and how many threads work on them does not."""
        free = {name for name in Limits.model_fields if name != "device"}
        settings = self.model_dump(mode="json", exclude={"data": {"uri"}, "limits": free})
        return digest.of_json(settings)


def code_version() -> str:
    return digest.of_code(*CODE)


def parse(content: bytes) -> JobSpec:
    """Raises ConfigError when it is no job spec."""
    try:
        return JobSpec.model_validate_json(content)
    except ValidationError as error:
        places = ", ".join(".".join(map(str, detail["loc"])) or "the file" for detail in error.errors())
        raise ConfigError("a job spec", f"wrong or missing: {places}", "let flows/retrain.py write it") from error
