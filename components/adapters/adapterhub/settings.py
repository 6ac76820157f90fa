"""AdapterHub's configurations and ours: the same words, but for a few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from components.adapters.config import BottleneckConfig
from components.errors import ConfigError

# AdapterHub's defaults (`BnConfig`): files of older releases lack the younger words.
BOTTLENECK: dict[str, Any] = {
    "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True,
    "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert",
    "init_weights_seed": None, "inv_adapter": None, "inv_adapter_reduction_factor": None, "is_parallel": False,
    "learn_phm": True, "leave_out": [], "ln_after": False, "ln_before": False, "mh_adapter": None,
    "non_linearity": None, "original_ln_after": True, "original_ln_before": False, "output_adapter": None,
    "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False,
    "phm_rank": 1, "reduction_factor": None, "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False,
    "shared_phm_rule": True, "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip
PREFIX: dict[str, Any] = {
    "architecture": "prefix_tuning", "bottleneck_size": 512, "cross_prefix": True, "dropout": 0.0,
    "encoder_prefix": True, "flat": False, "init_weights_seed": None, "leave_out": [], "non_linearity": "tanh",
    "prefix_length": 30, "shared_gating": True, "use_gating": False,
}  # fmt: skip
FUSION: dict[str, Any] = {
    "dropout_prob": None, "key": True, "query": True, "query_before_ln": False, "regularization": True,
    "residual_before": False, "temperature": False, "value": True, "value_before_softmax": True,
    "value_initialized": True,
}  # fmt: skip

# Words with one value that we have. The others of theirs alone say how training starts or drops out:
# what was trained computes the same without them.
ONLY: dict[str, dict[str, Any]] = {
    "bottleneck": {"inv_adapter": None, "phm_bias": True},
    "prefix_tuning": {"non_linearity": "tanh", "use_gating": False},
    "fusion": {"key": True, "query": True, "residual_before": False, "temperature": False},
}
OURS = frozenset(BottleneckConfig.__dataclass_fields__)
SAME_OF_PREFIX = ("prefix_length", "encoder_prefix", "cross_prefix", "leave_out")
NOWHERE: dict[str, Any] = {"mh_adapter": False, "output_adapter": False, "cross_adapter": False}
# What GELU was called before AdapterHub 3, whose files name no version.
UNVERSIONED = {"gelu": "gelu_new", "gelu_orig": "gelu"}
INITIALISATIONS = {"mam_adapter": "mam"}


def read(about: Mapping[str, Any]) -> BottleneckConfig:
    """Ours from the content of an adapter_config.json. Raises ConfigError for what we do not have."""
    found = about.get("config") or {}
    parts = found.get("configs", []) if found.get("architecture") == "union" else [found]
    kinds = [part.get("architecture") or "bottleneck" for part in parts]
    if sorted(kinds) not in (["bottleneck"], ["prefix_tuning"], ["bottleneck", "prefix_tuning"]):
        raise ConfigError(
            "bottleneck adapters, prefixes, or one of each",
            ", ".join(kinds) or "nothing",
            "train it here instead",
        )
    settings: dict[str, Any] = {} if "bottleneck" in kinds else dict(NOWHERE)
    for kind, part in zip(kinds, parts, strict=True):
        own = _bottleneck(part, "version" in about) if kind == "bottleneck" else _prefix(part)
        if settings.get("leave_out", own["leave_out"]) != own["leave_out"]:
            raise ConfigError("the same layers left out by adapters and prefixes", f"{part}", "train it here instead")
        settings.update(own)
    if settings.get("prefix_length") and about.get("model_type") == "t5":
        if settings["leave_out"]:  # AdapterHub drops T5's relative positions in layers after one that is left out
            raise ConfigError(
                "prefixes in all layers of T5", f"leave_out {settings['leave_out']}", "train it here instead"
            )
        settings["prefix_positions"] = True
    return BottleneckConfig(**settings)


def read_fusion(about: Mapping[str, Any], fuse: list[str]) -> BottleneckConfig:
    """Ours from the content of an adapter_fusion_config.json. fuse: our names of the adapters."""
    found = _known(about.get("config") or {}, FUSION, "fusion")
    return BottleneckConfig(
        fuse=fuse, fusion="dynamic" if found["value"] else "static", query_before_ln=bool(found["query_before_ln"])
    )


def written(config: BottleneckConfig, family: str) -> dict[str, Any]:
    """AdapterHub's, from ours. Raises ConfigError for what it does not have."""
    problems = [word for word, strange in (
        ("masked neurons", config.mask_rate), ("trained layer norms", config.train_layer_norm),
        ("dropped layers", config.drop_layers or config.drop_range), ("places of one's own", config.places),
        ("T5 prefixes without positions", config.prefix_length and family == "t5" and not config.prefix_positions),
    ) if strange]  # fmt: skip
    if problems:
        raise ConfigError("an adapter of a kind that AdapterHub has", ", ".join(problems), "use it with this library")
    parts = []
    if config.prefix_length:
        parts.append(PREFIX | {
            **{word: getattr(config, word) for word in SAME_OF_PREFIX},
            "flat": config.prefix_bottleneck is None,
            "bottleneck_size": config.prefix_bottleneck or PREFIX["bottleneck_size"],
        })  # fmt: skip
    if config.mh_adapter or config.output_adapter or config.cross_adapter:
        own = {word: getattr(config, word) for word in BOTTLENECK if word in OURS}
        scaling = own["scaling"] if isinstance(own["scaling"], str) else float(own["scaling"])  # no int for AdapterHub
        starts = {ours: theirs for theirs, ours in INITIALISATIONS.items()}
        init = starts.get(config.init_weights, config.init_weights)
        parts.append(BOTTLENECK | own | {"scaling": scaling, "init_weights": init})
    return parts[0] if len(parts) == 1 else {"architecture": "union", "configs": parts}


def written_fusion(config: BottleneckConfig) -> dict[str, Any]:
    if config.fusion not in ("dynamic", "static"):
        raise ConfigError(
            "a fusion by attention, dynamic or static",
            config.fusion,
            "use it with this library alone",
        )
    value = config.fusion == "dynamic"
    return FUSION | {
        "value": value, "regularization": value, "value_initialized": value, "query_before_ln": config.query_before_ln
    }  # fmt: skip


def _bottleneck(part: Mapping[str, Any], versioned: bool) -> dict[str, Any]:
    found = _known(part, BOTTLENECK, "bottleneck")
    if not versioned:
        found["non_linearity"] = UNVERSIONED.get(found["non_linearity"], found["non_linearity"])
    found["init_weights"] = INITIALISATIONS.get(found["init_weights"], found["init_weights"])
    return {word: value for word, value in found.items() if word in OURS}


def _prefix(part: Mapping[str, Any]) -> dict[str, Any]:
    if part.get("flat"):
        part = {**part, "non_linearity": "tanh"}  # nobody uses it
    found = _known(part, PREFIX, "prefix_tuning")
    same = {word: found[word] for word in SAME_OF_PREFIX}
    return {**same, "prefix_bottleneck": None if found["flat"] else found["bottleneck_size"]}


def _known(part: Mapping[str, Any], usual: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """All words of a configuration. Raises ConfigError with those that are strange, missing or not to be had."""
    if part.get("invertible_adapter", 0) is None:  # of AdapterHub 1 and 2
        part = {word: value for word, value in part.items() if word != "invertible_adapter"}
    found = {**usual, **part}
    problems = [f"{word} {value!r}" for word, value in found.items()
                if word not in (*usual, "architecture") or value != ONLY[kind].get(word, value)]  # fmt: skip
    problems += [f"no {word}" for word in ("mh_adapter", "output_adapter", "non_linearity", "reduction_factor")
                 if kind == "bottleneck" and found[word] is None]  # fmt: skip
    if problems:
        raise ConfigError(
            f"settings of AdapterHub 1.3 that have their like here ({kind})", ", ".join(problems),
            "train such an adapter here without them",
        )  # fmt: skip
    return found
