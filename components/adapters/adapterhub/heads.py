"""Heads: AdapterHub's two layers for classification, on the layers that a transformers model has for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper

from components.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """The two linear layers that make logits of a row's first token, and what is between them.

    flexible: AdapterHub's class of models whose heads come and go, for which its two layers are.
    """

    inner: str
    outer: str
    activation: str
    flexible: str


# BERT's two are its pooler and its classifier: a linear layer, tanh and a linear layer on the first token, as in the
# head that AdapterHub puts beside a pooler it does not use. So no module is new, and the logits are the same.
PLACES = {
    "bert": Place("bert.pooler.dense", "classifier", "tanh", "BertAdapterModel"),
    "roberta": Place("classifier.dense", "classifier.out_proj", "tanh", "RobertaAdapterModel"),
    "xlm-roberta": Place("classifier.dense", "classifier.out_proj", "tanh", "XLMRobertaAdapterModel"),
    "electra": Place("classifier.dense", "classifier.out_proj", "gelu", "ElectraAdapterModel"),
    "distilbert": Place("pre_classifier", "classifier", "relu", "DistilBertAdapterModel"),
}
LAYERS = {"1": "inner", "4": "outer"}  # AdapterHub's are dropout, linear, activation, dropout, linear


def has_head(base: Any) -> bool:
    return base.base_model is not base


def modules(about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], base: Any) -> list[str]:
    """Names of the modules of `base` that the head's weights belong to. Raises ConfigError when they belong nowhere.

    about, tensors: of a head as AdapterHub saved it: one that comes and goes, or a transformers model's own.
    """
    found = about.get("config")
    if found is None:
        _require("a model of class", about.get("model_class"), type(base).__name__, "load it onto such a model")
        _require("labels:", about.get("num_labels"), base.config.num_labels, "create the model with num_labels")
        return sorted({name.rpartition(".")[0] for name in tensors})
    place = _place(base)
    bare = "load it onto a bare model (AutoModel) and train a head for it"
    _require("a head for", found.get("head_type"), "classification", bare)
    _require("linear layers:", found.get("layers"), 2, bare)
    _require("use_pooler", found.get("use_pooler", False), False, bare)
    _require("bias", found.get("bias", True), True, bare)
    _require(f"in {base.config.model_type}, activation", found.get("activation_function"), place.activation, bare)
    _require("labels:", found.get("num_labels"), base.config.num_labels, "create the model with num_labels")
    return [place.inner, place.outer]


def weights(about: Mapping[str, Any], base: Any, adapter: str) -> dict[str, torch.Tensor]:
    """The model's own tensors of this adapter's head, by AdapterHub's names."""
    if about.get("config") is None:
        return {f"{path}.{part}": tensor
                for path, module in base.named_modules()
                if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
                for part, tensor in module.modules_to_save[adapter].named_parameters()}  # fmt: skip
    place = _place(base)
    return {
        f"heads.{about['name']}.{index}.{part}": tensor
        for index, layer in LAYERS.items()
        for part, tensor in base.get_submodule(getattr(place, layer)).modules_to_save[adapter].named_parameters()
    }


def model_class(base: Any) -> str:
    """What AdapterHub's class of such a model is called: one for which heads come and go, if there is one."""
    place = PLACES.get(base.config.model_type)
    return place.flexible if place is not None and _classifies(base) else type(base).__name__


def describe(base: Any, trained: list[str]) -> dict[str, Any]:
    """What a head_config.json says of the head; of one that comes and goes, without its name.

    trained: names of the modules that make it.

    Raises ConfigError when AdapterHub has no such head.
    """
    labels = {"label2id": dict(base.config.label2id), "num_labels": base.config.num_labels}
    place = PLACES.get(base.config.model_type)
    if place is not None and _classifies(base) and set(trained) == {place.inner, place.outer}:
        config = {
            "activation_function": place.activation, "bias": True, "dropout_prob": None, "head_type": "classification",
            "layers": 2, "use_pooler": False, **labels,
        }  # fmt: skip
        return {"config": config, "model_class": place.flexible}
    inside = [name for name in trained if name.startswith(f"{base.base_model_prefix}.")]
    if inside:
        raise ConfigError(
            "a head on top of the transformer", f"trained modules {', '.join(inside)}", "save it with save_pretrained"
        )
    return {"config": None, "model_class": type(base).__name__, "name": None, **labels}


def label(base: Any, about: Mapping[str, Any]) -> None:
    """Give the model the labels that the head was trained for."""
    labels = (about.get("config") or about).get("label2id")
    if labels:
        base.config.label2id = {name: int(number) for name, number in labels.items()}
        base.config.id2label = {int(number): name for name, number in labels.items()}


def _place(base: Any) -> Place:
    place = PLACES.get(base.config.model_type)
    if place is None or not _classifies(base):
        raise ConfigError(
            f"a model for sequence classification of a family among {', '.join(PLACES)}, for AdapterHub's head",
            type(base).__name__,
            "load it onto a bare model (AutoModel) and train a head for it",
        )
    return place


def _classifies(base: Any) -> bool:
    return type(base).__name__.endswith("ForSequenceClassification")


def _require(what: str, found: Any, expected: Any, todo: str) -> None:
    if found != expected:
        raise ConfigError(f"{what} {expected}", f"{found}", todo)
