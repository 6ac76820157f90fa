"""The flow's parameters: one frozen model, from which the preset files, Prefect's form and the job specs come.

Everything is checked before the first training second, and all errors of a file are reported together.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from components import presets
from components.errors import ConfigError
from components.frozen import Frozen, Positive, Seed, Share
from components.methods import AdapterConfig, AdapterMethod, Bottleneck, LearningRates, Lora, Method, Prefix, Schedule
from components.presets import PRESETS, preset

# Also to be had from here, where all other parameters are.
__all__ = ["PRESETS", "AdapterConfig", "AdapterMethod", "Bottleneck", "Frozen", "LearningRates", "Lora", "Method",
           "Prefix", "Schedule", "preset"]  # fmt: skip


def _label_name(value: Any) -> Any:
    """Whole numbers by their names. YAML reads a bare yes, no, on or off as a truth value: those want quotes."""
    if isinstance(value, bool):
        raise ValueError("a label that YAML reads as true or false must stand in quotes")
    return str(value) if isinstance(value, int) else value


LabelName = Annotated[str, BeforeValidator(_label_name)]


class Columns(Frozen):
    """Which column of the source holds what."""

    text: str = "text"
    text_pair: str | None = Field(None, description="second text of a pair, e.g. a hypothesis")
    label: str = "label"
    id: str | None = Field(None, description="the source's own row id; checked to be unique")

    @model_validator(mode="after")
    def _columns_differ(self) -> Columns:
        names = [name for name in (self.text, self.text_pair, self.label, self.id) if name]
        if len(set(names)) != len(names):
            raise ValueError("text, text_pair, label and id must be different columns")
        return self


class DataConfig(Frozen):
    """Where labelled rows come from."""

    source: str = Field(
        description="CSV, TSV, JSON lines or Parquet on disk or s3://, a file or a folder of them; hub id; vader:DOMAIN"
    )
    revision: str | None = Field(None, description="commit of a hub data set")
    part: str = Field("train", description="part of a hub data set that is read; it is split anew here")
    columns: Columns = Columns()
    labels: tuple[LabelName, ...] | None = Field(None, description="the declared set, in order; else those found")

    @model_validator(mode="after")
    def _labels_differ(self) -> DataConfig:
        if self.labels is not None and (len(set(self.labels)) != len(self.labels) or len(self.labels) < 2):
            raise ValueError("labels must be two or more different names")
        return self


class ValidationConfig(Frozen):
    """Bounds that rows must keep. `warnings` names the expectations that are reported but do not stop the run."""

    min_characters: Positive = 1
    max_characters: Positive = 10_000
    min_rows: Positive = 100
    max_rows: Positive = 10_000_000
    min_rows_per_class: Positive = 20
    max_duplicate_share: Share = 0.2
    max_class_divergence: float = Field(0.1, ge=0, description="KL divergence from the previous accepted data, nats")
    warnings: tuple[Literal["duplicates", "class_balance", "row_count", "rows_per_class", "text_length"], ...] = (
        "duplicates",
        "class_balance",
    )


class SplitConfig(Frozen):
    """How rows are parted. Near duplicates (Jaccard similarity of word sets) stay together."""

    validation: float = Field(0.1, gt=0, lt=1)
    test: float = Field(0.2, gt=0, lt=1)
    near_duplicate_jaccard: float = Field(0.8, ge=0.05, le=1, description="lower ones cannot be found by hashing")
    seed: Seed = 0

    @model_validator(mode="after")
    def _train_remains(self) -> SplitConfig:
        if self.validation + self.test >= 0.95:
            raise ValueError("validation + test must leave at least 5 % for training")
        return self


class BaseConfig(Frozen):
    """The frozen pretrained transformer."""

    name: str = Field("minilm", description="embedded model, local folder, or hub id (then with a revision)")
    revision: str | None = Field(None, description="commit of a hub model")
    weights_sha256: str | None = Field(None, description="pin; another digest is refused")


class BaselineConfig(Frozen):
    """The full fine-tuning job that the adapter is compared with."""

    schedule: Schedule = Schedule(
        epochs=5, patience=2, learning_rates=LearningRates(body=5e-5, layer_norm=5e-5, head=5e-4)
    )


class TrainingConfig(Frozen):
    """What both jobs share, so that the comparison is fair."""

    batch_size: Positive = 16
    max_tokens: int = Field(128, ge=8, description="longer texts are cut; how many were is reported per class")
    weight_decay: float = Field(0.01, ge=0)
    warmup: Share = Field(0.1, description="share of the steps in which the learning rate rises")
    clip_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    class_weights: Literal["none", "balanced"] = "none"
    metric: Literal["accuracy", "macro_f1", "log_loss"] = Field(
        "accuracy", description="picks the best epoch; log loss among equals"
    )
    precision: Literal["auto", "fp32", "bf16"] = "auto"


class GateConfig(Frozen):
    """The rules. Scores are shares: a margin of 0.01 is one point of accuracy."""

    margin: float = Field(0.01, gt=0, lt=1, description="adapter may be this much worse than full fine-tuning")
    champion_margin: float = Field(0.01, gt=0, lt=1, description="and this much worse than what is in production")
    slice_margin: float = Field(0.05, gt=0, lt=1, description="and this much worse within one slice")
    length_buckets: Positive = 3
    slice_min_rows: int = Field(0, ge=0, description="smaller slices are shown, not judged; 0 judges all")
    max_trainable_share: Share = 0.05
    max_bundle_mb: float = Field(16, gt=0)
    must_beat_tfidf: bool = False
    confidence: float = Field(0.95, ge=0.5, lt=1, description="one-sided, of every comparison")
    resamples: int = Field(10_000, ge=1_000)
    seed: Seed = 0


class ReportConfig(Frozen):
    show_samples: bool = Field(False, description="let reports show text of rows; off, no report or log does")
    examples: tuple[str, ...] = Field(
        (), description="texts that the new version classifies at the end of a run by hand"
    )


class RegistryConfig(Frozen):
    """Where versions and their evidence live. Credentials come from the environment."""

    store: str = Field("s3://adapterline", description="s3://BUCKET[/PREFIX] or a folder")
    tracking_uri: str | None = Field(None, description="MLflow; by default $MLFLOW_TRACKING_URI")
    experiment: str = "adapterline"

    @model_validator(mode="after")
    def _no_password(self) -> RegistryConfig:
        if "@" in (self.tracking_uri or ""):
            raise ValueError("tracking_uri must hold no password: set MLFLOW_TRACKING_USERNAME and _PASSWORD instead")
        return self


def _none_if_empty(value: Any) -> Any:
    """prefect.yaml gives an empty text where an environment variable is not set."""
    return None if value == "" else value


class ComputeConfig(Frozen):
    """Where jobs run and what they may use. Nothing here changes what is learned, except how sums are rounded and, with
    several processes, threads or tokens_at_once, which dropout masks are drawn."""

    deployment: Annotated[Annotated[str, Field(pattern=r"^train/[\w.-]+$")] | None, BeforeValidator(_none_if_empty)] = (
        Field(None, description="train/local, train/cpu, train/gpu or train/k8s; by default subprocesses of this flow")
    )
    job_variables: dict[str, Any] = Field(
        {}, description="of the deployment's work pool, e.g. {memory: 8g}; see infra/work-pools"
    )
    processes: Positive = Field(1, description="of one job, one a GPU; more than one go through accelerate launch")
    workspace: str = Field("out/work", description="folder for bundles and reports of jobs")
    threads: Positive | None = Field(None, description="per job; by default the cores shared among the jobs")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trunk_cache_gb: float = Field(
        10, ge=0, description="of disk for what frozen layers make of texts, so that it is computed once; 0: never kept"
    )
    tokens_at_once: Positive | None = Field(
        None,
        description="at most so many, with padding, learn at once; default: a batch, above a trunk 1,024 a CPU thread",
    )
    compile: bool = Field(False, description="torch.compile full fine-tuning and what has no kernels of our own")
    job_memory_gb: float = Field(3.0, gt=0, description="jobs run side by side when this much is free for each")
    timeout_hours: float = Field(12, gt=0)


class SweepConfig(Frozen):
    """What `flows/sweep.py` tries: every combination. Where a list is empty, the parameters' own value counts."""

    methods: tuple[AdapterMethod, ...] = ()
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="peak rates of what the method adds to the base; those of layer norms and head stay"
    )
    reduction_factors: tuple[Annotated[float, Field(gt=0)], ...] = Field((), description="of methods that have one")
    seeds: tuple[Seed, ...] = ()
    groups: Positive | None = Field(
        None, description="processes that share the jobs; by default one here, and with ray one for each method"
    )
    task_runner: Literal["threads", "ray"] = Field("threads", description="ray: groups spread over a Ray cluster")
    ray_address: str | None = Field(
        None, description="of a cluster that shares the workspace's disk; by default a local Ray for the run"
    )

    @model_validator(mode="after")
    def _nothing_twice(self) -> SweepConfig:
        for name in ("methods", "learning_rates", "reduction_factors", "seeds"):
            if len(set(values := getattr(self, name))) < len(values):
                raise ValueError(f"{name} must be different")
        return self


class RetrainConfig(Frozen):
    """Parameters of `flows/retrain.py`."""

    model: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="name of the registered model")
    data: DataConfig
    validation: ValidationConfig = ValidationConfig()
    split: SplitConfig = SplitConfig()
    base: BaseConfig = BaseConfig()
    adapter: AdapterConfig = AdapterConfig()
    baseline: BaselineConfig = BaselineConfig()
    training: TrainingConfig = TrainingConfig()
    gate: GateConfig = GateConfig()
    report: ReportConfig = ReportConfig()
    registry: RegistryConfig = RegistryConfig()
    compute: ComputeConfig = ComputeConfig()
    sweep: SweepConfig | None = Field(None, description="read by flows/sweep.py alone")
    seed: Seed = 0


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> RetrainConfig:
    """Read a YAML file. `overrides` are dotted keys with values, or text in YAML: `{"gate.margin": "0.02"}`.

    Raises ConfigError naming every wrong key at once.
    """
    return parse(presets.content(path), str(path), overrides)


def load_preset(names: str, overrides: Mapping[str, Any] | None = None) -> RetrainConfig:
    """A preset, or several joined with `+`, of which later ones win: `tweets+lora` is lora on the tweets.

    Raises ConfigError that lists the ones there are, or names every wrong key at once.
    """
    content, origin = presets.joined(names)
    return parse(content, origin, overrides)


def settle(config: RetrainConfig | None, preset_name: str | None, overrides: Mapping[str, Any]) -> RetrainConfig:
    """The parameters that a flow was given: a whole configuration or the names of presets, with keys overridden.

    Raises ConfigError when there are both or none, or a key is wrong.
    """
    if config is not None and preset_name is None:
        return parse(config.model_dump(mode="json"), "the flow's parameters", overrides) if overrides else config
    if config is None and preset_name is not None:
        return load_preset(preset_name, overrides)
    raise ConfigError(
        "either config or preset",
        "both" if config else "neither",
        "pass one, e.g. -p preset=tweets, or -p preset=null with a config",
    )


def parse(content: dict[str, Any], origin: str, overrides: Mapping[str, Any] | None = None) -> RetrainConfig:
    """The validated parameters; `origin` is named in errors."""
    import yaml

    for dotted, value in (overrides or {}).items():
        try:
            _set(content, dotted, yaml.safe_load(value) if isinstance(value, str) else value)
        except yaml.YAMLError as error:
            raise ConfigError("a YAML value", f"{dotted}={value}", "check brackets and quotes") from error
    try:
        return RetrainConfig.model_validate(content)
    except ValidationError as error:
        by_place: dict[str, list[str]] = {}
        for detail in error.errors():
            place = "an override" if _overridden(detail["loc"], overrides or {}) else origin
            by_place.setdefault(place, []).append(_problem(detail))
        found = "; ".join(f"{'; '.join(problems)} (in {place})" for place, problems in by_place.items())
        raise ConfigError("valid parameters", found, "correct or remove these keys") from error


def _set(content: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        if content.get(parent) is None:  # a section that is not given, and keys are set in it none the less
            content[parent] = {}
        content = content[parent]
        if not isinstance(content, dict):
            raise ConfigError("a key inside a section", dotted, f"{parent!r} holds a value, not a section")
    content[last] = value


def _overridden(location: tuple[str | int, ...], overrides: Iterable[str]) -> bool:
    """Is what lies there, or around it, or in it, not from the file?"""
    place = [str(step) for step in location]
    return any(all(one == other for one, other in zip(place, key.split("."), strict=False)) for key in overrides)


def _problem(detail: Any) -> str:
    place = ".".join(str(step) for step in detail["loc"]) or "parameters"
    if detail["type"] == "extra_forbidden":
        return f"{place}: unknown key{_nearest(detail['loc'])}"
    if detail["type"] == "missing":
        return f"{place}: missing"
    found = detail["input"]
    shown = f", found {found!r}" if isinstance(found, str | int | float | bool) else ""
    return f"{place}: {detail['msg'].removeprefix('Value error, ')}{shown}"


def _nearest(location: tuple[str | int, ...]) -> str:
    model: Any = RetrainConfig
    for step in location[:-1]:
        kind = model.model_fields[step].annotation if step in getattr(model, "model_fields", {}) else None
        model = next((each for each in (kind, *get_args(kind)) if hasattr(each, "model_fields")), None)
    close = difflib.get_close_matches(str(location[-1]), list(getattr(model, "model_fields", {})), 1)
    return f" (did you mean {close[0]}?)" if close else ""
