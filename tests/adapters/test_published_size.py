"""The sizes that are published for BERT-base with a Pfeiffer adapter and AdapterHub's head of two layers."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig

from components.adapters import METHODS
from components.adapters.adapterhub.heads import PLACES
from components.adapters.parameters import trainable_groups

CASED = BertConfig(vocab_size=28_996, num_labels=2)  # bert-base-cased; all else is BERT-base by default


def size(parameters: list[tuple[str, nn.Parameter]]) -> int:
    return sum(parameter.numel() for _, parameter in parameters)


def test_of_bert_base_with_a_pfeiffer_adapter() -> None:
    """In total it is the base with its pooler, and the adapter and head beside it."""
    place = PLACES["bert"]
    with torch.device("meta"):
        base = AutoModel.from_config(CASED)
        config = METHODS["pfeiffer"](reduction_factor=16, modules_to_save=[place.inner, place.outer])
        adapted = get_peft_model(AutoModelForSequenceClassification.from_config(CASED), config, "task")
    groups = trainable_groups(adapted)
    trained = sum(map(size, groups.values()))
    total = size(list(base.named_parameters())) + trained
    assert (size(groups["body"]), trained, total) == (894_528, 1_486_658, 109_796_930)
    assert f"{trained / total:.3%}" == "1.354%"
