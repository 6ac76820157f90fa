"""Parameters of batch scoring."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from components import storage
from components.errors import ConfigError
from components.frozen import Frozen

ENDINGS = (".parquet", ".csv")


class ScoreConfig(Frozen):
    """Parameters of `flows/score.py`."""

    models: tuple[str, ...] = Field(
        min_length=1, description="NAME@ALIAS, NAME/3 or a bundle's folder; several share the layers they can"
    )
    source: str = Field(description="CSV, TSV, JSON lines or Parquet on disk or s3://, a file or a folder of them")
    out: str = Field(description="a .parquet or .csv file, on disk or s3://")
    text: str = Field("text", description="column of the texts")
    text_pair: str | None = Field(None, description="column of the second texts, for a task on pairs")
    id: str | None = Field(None, description="column that goes into the answers as it is")
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _is_possible(self) -> ScoreConfig:
        if not self.out.endswith(ENDINGS):
            raise ValueError(f"out must end in {' or '.join(ENDINGS)}")
        columns = [name for name in (self.text, self.text_pair, self.id) if name]
        if len(set(columns)) != len(columns):
            raise ValueError("text, text_pair and id must be different columns")
        if storage.join(self.source) == storage.join(self.out):
            raise ValueError("out must not be the source")
        return self


def parsed(**content: Any) -> ScoreConfig:
    """The parameters. Raises ConfigError with all that is wrong."""
    try:
        return ScoreConfig(**content)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, each['loc'])) or 'parameters'}: {each['msg'].removeprefix('Value error, ')}"
            for each in error.errors()
        )
        raise ConfigError("valid parameters of scoring", problems, "correct these") from error
