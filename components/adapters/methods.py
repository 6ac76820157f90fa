"""From a method's name and settings to its PEFT config: the one place that knows how."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import constants

from components.adapters import bitfit
from components.adapters.config import METHODS, BottleneckConfig
from components.errors import BundleError, ConfigError
from components.methods import Bottleneck, Fusion, Lora, Prefix, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Modules by family: PEFT's tables, with what they lack. Where query, key and value are one module, it is taken.
LORA = {
    "albert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "marian": ["q_proj", "v_proj"],
    "modernbert": ["attn.Wqkv"],
    "mpnet": ["attn.q", "attn.v"],
    "vit": ["q_proj", "v_proj"],
    **constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
}
IA3_FEEDFORWARD = {
    "albert": ["ffn_output"],
    "distilbert": ["ffn.lin2"],
    "electra": ["output.dense"],
    "marian": ["fc2"],
    "modernbert": ["mlp.Wo"],
    "mpnet": ["output.dense"],
    "vit": ["mlp.fc2"],
    "xlm-roberta": ["output.dense"],
    **constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
}
IA3 = {
    "albert": ["key", "value", "ffn_output"],
    "distilbert": ["k_lin", "v_lin", "ffn.lin2"],
    "electra": ["key", "value", "output.dense"],
    "marian": ["k_proj", "v_proj", "fc2"],
    "modernbert": ["attn.Wqkv", "mlp.Wo"],
    "mpnet": ["attn.k", "attn.v", "output.dense"],
    "vit": ["k_proj", "v_proj", "mlp.fc2"],
    "xlm-roberta": ["key", "value", "output.dense"],
    **constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
}
# PEFT's prefix tuning hands its prefixes over as a cache of keys and values, which other families do not take.
PREFIX = ("bert", "roberta", "xlm-roberta", "electra", "gpt2", "llama", "qwen2", "qwen3")
# PEFT trains and saves these as they are when it tunes prefixes for classification.
PREFIX_HEADS = ("classifier", "score")


def peft_config(method: str, settings: Settings | None, head: list[str], model: PreTrainedModel) -> PeftConfig:
    """What PEFT needs to know to add an adapter of this method to `model`.

    settings: the section of the method, None where it has none.  head: names of the modules trained as a whole.

    Raises ConfigError when the method does not know the model's family.
    """
    if isinstance(settings, Bottleneck):
        return METHODS[method](modules_to_save=head, **given(settings))
    return OTHERS[method](settings, head, model.config.model_type)


def given(settings: Bottleneck) -> dict[str, Any]:
    """The settings that are not left to the method, as BottleneckConfig takes them."""
    return settings.model_dump(mode="json", exclude_none=True, exclude={"drop_margin"})


def _lora(settings: Lora, head: list[str], family: str) -> PeftConfig:
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_modules("lora", LORA, family),
        fan_in_fan_out=family == "gpt2",  # its Conv1D keep their weights transposed
        modules_to_save=head,
    )


def _ia3(settings: None, head: list[str], family: str) -> PeftConfig:
    return IA3Config(
        target_modules=_modules("ia3", IA3, family),
        feedforward_modules=_modules("ia3", IA3_FEEDFORWARD, family),
        fan_in_fan_out=family == "gpt2",
        modules_to_save=head,
    )


def _prefix(settings: Prefix, head: list[str], family: str) -> PeftConfig:
    if family not in PREFIX:
        raise ConfigError(
            f"a base model of a family among {', '.join(PREFIX)} for PEFT's prefix tuning",
            f"family {family!r}",
            "choose another method or base; the prefixes of mam need no cache",
        )
    further = [name for name in head if name.split(".")[0] not in PREFIX_HEADS]
    return PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=settings.length, modules_to_save=further or None)


def _bitfit(settings: None, head: list[str], family: str) -> PeftConfig:
    return bitfit.BitFitConfig(modules_to_save=head)


def _head(settings: None, head: list[str], family: str) -> PeftConfig:
    return bitfit.head_only(head)


def _fusion(settings: Fusion, head: list[str], family: str) -> PeftConfig:
    """Its members are adapters that are named by the digests of their bundles."""
    return BottleneckConfig(
        fuse=[member.digest for member in settings.members], fusion=settings.kind, modules_to_save=head
    )


OTHERS: dict[str, Callable[[Any, list[str], str], PeftConfig]] = {
    "lora": _lora,
    "ia3": _ia3,
    "prefix": _prefix,
    "bitfit": _bitfit,
    "head": _head,
    "fusion": _fusion,
}


def _modules(method: str, table: dict[str, Any], family: str) -> Any:
    if family not in table:
        raise ConfigError(
            f"a base model of a family that method {method} knows",
            f"family {family!r}",
            "choose another base, or method bitfit or head, or add a row to components/adapters/methods.py",
        )
    return table[family]


def misfits(base: Path, method: str, settings: Settings | None, max_tokens: int) -> list[str]:
    """What of the settings the base in this folder does not allow, a phrase each, from its config.json alone."""
    from transformers import AutoConfig

    from components.adapters import places

    config = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    if isinstance(settings, Bottleneck):
        problems = places.misfits(base, settings, max_tokens)
    else:
        length = settings.length if isinstance(settings, Prefix) else 0
        longest = places.positions(config)
        beside = f" beside {length} of the prefix" if length else ""
        problem = f"training.max_tokens: {max_tokens}{beside}, at most the base's {longest} positions"
        problems = [problem] if max_tokens + length > longest else []
    if method == "fusion":  # built of bundles, which are looked at where they are found
        return problems
    return problems or _unbuildable(config, method, settings)


def _unbuildable(config: Any, method: str, settings: Settings | None) -> list[str]:
    """Why no adapter can be added, seen by adding it to a model without weights."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification

    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
            get_peft_model(model, peft_config(method, settings, [], model))
    except ConfigError as error:
        return [f"adapter.method: {method} expected {error.expected}, found {error.found}: {error.todo}"]
    return []


# What a bundle may hold: for each PEFT type of ours the settings that may differ from PEFT's defaults. Others could
# name modules to import, or change what is computed in ways that nothing here writes or tests.
# fmt: off
COMMON = frozenset({"peft_type", "task_type", "peft_version", "base_model_name_or_path", "inference_mode",
                    "modules_to_save", "auto_mapping"})  # the last for PEFT's auto classes, which nothing here uses
TARGETED = COMMON | {"target_modules", "fan_in_fan_out"}
KNOWN: dict[str, frozenset[str]] = {
    "BOTTLENECK": frozenset(field.name for field in fields(BottleneckConfig)),
    "BITFIT": TARGETED,
    "LORA": TARGETED | {"r", "lora_alpha", "lora_dropout"},
    "IA3": TARGETED | {"feedforward_modules"},
    "PREFIX_TUNING": COMMON | {"num_virtual_tokens", "token_dim", "num_transformer_submodules",
                               "num_attention_heads", "num_layers", "encoder_hidden_size"},
}
# fmt: on


def load_config(folder: Path) -> PeftConfig:
    """The PEFT config of a bundle, ready for use. Raises BundleError when it is of no method of ours."""
    content = json.loads((folder / constants.CONFIG_NAME).read_bytes())
    kind = content.get("peft_type")
    if kind not in KNOWN:
        raise BundleError(f"an adapter of type {', '.join(KNOWN)}", f"{kind}", "do not use this bundle")
    usual = {field.name: _default(field) for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    strange = [name for name, value in content.items()
               if name not in KNOWN[kind] and (name not in usual or usual[name] != value)]  # fmt: skip
    if strange:
        raise BundleError(f"settings of {kind} that jobs write", f"also {', '.join(strange)}", "do not use this bundle")
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = True
    return config


def _default(field: Any) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default
