"""The operations that a training owes are those that torch counts, where nothing can be saved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification

from components.adapters import METHODS
from tests.benchmarks.work import Shape, owed

HIDDEN, FEED_FORWARD, LABELS, HEADS, BOTTLENECK = 32, 96, 3, 2, 8
LENGTHS = (5, 17)


def counted(layers: int, first: int | None) -> int:
    """Operations of torch's matrix products in one step over each row; first: the first layer with an adapter."""
    config = BertConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=FEED_FORWARD,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=LABELS,
        attn_implementation="eager",  # its products are seen one by one
    )
    model: Any = BertForSequenceClassification(config)
    if first is not None:
        left_out = list(range(first))
        kind = METHODS["pfeiffer"](
            reduction_factor=HIDDEN // BOTTLENECK, leave_out=left_out, modules_to_save=["classifier"]
        )
        model = get_peft_model(model, kind)
    with FlopCounterMode(display=False) as counter:
        for length in LENGTHS:
            model(input_ids=torch.ones(1, length, dtype=torch.long)).logits.sum().backward()
    return int(counter.get_total_flops())


def debt(layers: int, first: int | None, epochs: int = 1) -> float:
    bottleneck = 0 if first is None else BOTTLENECK
    shape = Shape(layers, HIDDEN, FEED_FORWARD, LABELS, HEADS, bottleneck, first or 0)
    return owed(shape, np.array(LENGTHS), epochs)


@pytest.mark.parametrize("first", [None, 0, 1])
def test_one_more_layer_owes_what_torch_counts_for_it(first: int | None) -> None:
    """The last layer and the head are alike in both, and so is what may be saved there."""
    assert debt(4, first) - debt(3, first) == counted(4, first) - counted(3, first)


def test_a_frozen_layer_below_the_first_adapter_owes_a_forward_pass_once() -> None:
    deeper = debt(4, 2) - debt(3, 1)
    assert deeper == counted(4, 2) - counted(3, 1)
    assert debt(4, 2, epochs=5) - debt(3, 1, epochs=5) == deeper


@pytest.mark.parametrize("first", [None, 0, 2])
def test_nobody_owes_more_than_is_done_without_saving_anything(first: int | None) -> None:
    assert 0 < debt(3, first) < counted(3, first)
