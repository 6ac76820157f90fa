"""Steps by the fast ways and by a plain loop over the same model, to be compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from components import base_model
from components.adapters.methods import peft_config
from components.adapters.parameters import training_mode
from components.adapters.step import reseed, steps_of
from components.config import BaseConfig, LearningRates, Schedule, TrainingConfig
from components.methods import settings_of
from components.training import loop, passes
from components.training.batching import Tokens, collate, tokenise, training_batches
from components.training.passes import Means, Whole
from components.training.precision import Precision
from tests.training.toy_jobs import SMALL, toy_split

T = TypeVar("T")
CPU = torch.device("cpu")
STEPS = 50
# Slow enough that rounding does not grow from step to step, as it does at the rates of other tests.
SCHEDULE = Schedule(epochs=9, learning_rates=LearningRates(body=2e-3, layer_norm=2e-3, head=2e-3))


def model_of(base: Path, method: str, **settings: Any) -> Any:
    from peft import get_peft_model

    torch.manual_seed(0)
    model, head = base_model.load_classifier(base_model.find(BaseConfig(name=str(base))), ("bad", "good"))
    own = settings_of(method, **{**SMALL.get(method, {}), **settings})
    return get_peft_model(model, peft_config(method, own, list(head), model))


def full_of(base: Path) -> Any:
    torch.manual_seed(0)
    return base_model.load_classifier(base_model.find(BaseConfig(name=str(base))), ("bad", "good"))[0]


def tokens_of(base: Path) -> Tokens:
    """Toy rows, every third one cut short, so that batches have padding."""
    tokenizer = base_model.load_tokenizer(base_model.find(BaseConfig(name=str(base))))
    made = tokenise(toy_split(300).parts["train"], tokenizer, 32)
    ids = [row if index % 3 else row[: 4 + index % 5] for index, row in enumerate(made.ids)]
    return Tokens(ids, None, made.labels, made.cut)


def losses(model: Any, tokens: Tokens, means: Means | None, threads: int = 1, whole: bool = False) -> list[float]:
    """Of the first steps. means: None for the plain loop, which pads every row to the longest of all.  whole: the model
    is to compute every layer by its own code.
    """
    training = TrainingConfig(precision="fp32", max_tokens=32)
    learner = loop.learner(model, SCHEDULE, training, len(tokens.ids), CPU)
    precision = Precision(CPU, low=False, plain_until=16)  # some batches attend so, some so
    batches = [rows for epoch in range(1, 9) for rows in training_batches(tokens.lengths, 16, 0, epoch)][:STEPS]
    training_mode(model)
    if means is None:
        return [_plain_step(learner, tokens, rows) for rows in _counted(model, batches)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with passes.passes(model, tokens, tokens, 0, CPU, precision, 16, means) as through:
            assert (type(through.learn) is Whole) is whole
            learn = loop.Learning(learner, None, 1.0)
            return [learn(tokens, rows, through) for rows in _counted(model, batches)]
    finally:
        torch.set_num_threads(before)


def _counted(model: Any, batches: Iterable[T]) -> Iterator[T]:
    """As the loop counts its steps."""
    for number, rows in enumerate(batches):
        reseed(steps_of(model), 0, number)
        yield rows


def _plain_step(learner: loop.Learner, tokens: Tokens, rows: Any) -> float:
    longest = int(np.argmax(tokens.lengths))
    inputs = {name: each[:-1] for name, each in collate(tokens, [*rows, longest], 0, CPU).items()}
    loss = nn.functional.cross_entropy(learner.model(**inputs).logits, torch.from_numpy(tokens.labels[rows]))
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(learner.trained.values(), 1.0)
    learner.optimizer.step()
    learner.scheduler.step()
    learner.optimizer.zero_grad()
    return loss.item()
