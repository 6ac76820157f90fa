"""The training loop: what it moves, how fast, when it stops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from components import base_model
from components.adapters.parameters import training_mode
from components.config import BaseConfig, LearningRates, Schedule, TrainingConfig
from components.errors import TrainingError
from components.training import loop
from components.training.batching import Tokens, tokenise
from components.training.loop import Learner, State
from tests.adapters.adapted import adapted, classifier, logits
from tests.training.toy_jobs import silent, toy_split

CPU = torch.device("cpu")
RATES = LearningRates(body=0.01, layer_norm=0.002, head=0.03)
PLAIN = TrainingConfig(precision="fp32", max_tokens=32)
METHODS = ("pfeiffer", "houlsby", "full")
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def parts(tiny_base: Path) -> dict[str, Tokens]:
    tokenizer = base_model.load_tokenizer(base_model.find(BaseConfig(name=str(tiny_base))))
    return {name: tokenise(table, tokenizer, 32) for name, table in toy_split(100).parts.items()}


def model_of(base: Path, method: str, **settings: Any) -> nn.Module:
    model: nn.Module = classifier(base)[0] if method == "full" else adapted(base, method, **settings)
    return model


def schedule_of(epochs: int = 2, patience: int = 9, rates: LearningRates = RATES) -> Schedule:
    return Schedule(epochs=epochs, patience=patience, learning_rates=rates)


def learner_of(base: Path, method: str, schedule: Schedule, rows: int, training: TrainingConfig = PLAIN) -> Learner:
    return loop.learner(model_of(base, method), schedule, training, rows, CPU)


def fitted(learner: Learner, parts: dict[str, Tokens], schedule: Schedule, training: TrainingConfig = PLAIN) -> State:
    return loop.fit(
        learner, parts["train"], parts["validation"], schedule, training, 0, 0, State(), silent, lambda *_: None
    )


def test_what_diverges_in_the_last_step_of_an_epoch_is_told(tiny_base: Path, parts: dict[str, Tokens]) -> None:
    """No loss is computed after it."""
    much, whole = schedule_of(rates=LearningRates(body=1e38, layer_norm=1e38, head=1e38)), len(parts["train"].ids)
    training = PLAIN.model_copy(update={"batch_size": whole})
    with pytest.raises(TrainingError, match="a finite loss; found probabilities that are no numbers at step 1"):
        fitted(learner_of(tiny_base, "pfeiffer", much, whole, training), parts, much, training)


@pytest.mark.parametrize("method", ["pfeiffer", "houlsby"])
def test_training_leaves_every_tensor_of_the_base_untouched(
    tiny_base: Path, parts: dict[str, Tokens], method: str
) -> None:
    schedule = schedule_of()
    learner = learner_of(tiny_base, method, schedule, len(parts["train"].ids))
    frozen = {name: t.clone() for name, t in learner.model.state_dict().items() if ".task." not in name}
    fitted(learner, parts, schedule)
    after = learner.model.state_dict()
    assert frozen
    assert [name for name, tensor in frozen.items() if not torch.equal(tensor, after[name])] == []


@pytest.mark.parametrize("method", ["pfeiffer", "houlsby"])
def test_training_with_the_adapter_disabled_is_the_base(tiny_base: Path, parts: dict[str, Tokens], method: str) -> None:
    schedule = schedule_of()
    learner = learner_of(tiny_base, method, schedule, len(parts["train"].ids))
    fitted(learner, parts, schedule)
    with learner.model.disable_adapter():
        assert torch.equal(logits(learner.model), logits(classifier(tiny_base)[0]))


@every_method
def test_training_moves_all_that_is_to_be_trained(tiny_base: Path, parts: dict[str, Tokens], method: str) -> None:
    schedule = schedule_of()
    learner = learner_of(tiny_base, method, schedule, len(parts["train"].ids))
    before = {name: parameter.detach().clone() for name, parameter in learner.trained.items()}
    fitted(learner, parts, schedule)
    still = [name for name, parameter in learner.trained.items() if torch.equal(before[name], parameter)]
    assert still == []


def kind_of(name: str, method: str) -> str:
    """Which learning rate a parameter's name asks for."""
    if "LayerNorm" in name and "bottleneck_" not in name:
        return "layer_norm"
    return "body" if "bottleneck_" in name or (method == "full" and name.startswith("bert.")) else "head"


@every_method
def test_every_trained_parameter_is_in_one_group_with_its_rate(tiny_base: Path, method: str) -> None:
    learner = learner_of(tiny_base, method, schedule_of(), 100)
    names = {id(parameter): name for name, parameter in learner.trained.items()}
    grouped = sorted((names[id(p)], g["initial_lr"]) for g in learner.optimizer.param_groups for p in g["params"])
    assert grouped == sorted((name, getattr(RATES, kind_of(name, method))) for name in names.values())


@every_method
def test_only_matrices_outside_layer_norms_decay(tiny_base: Path, method: str) -> None:
    learner = learner_of(tiny_base, method, schedule_of(), 100)
    names = {id(parameter): name for name, parameter in learner.trained.items()}
    decayed = {names[id(p)] for g in learner.optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    assert decayed == {
        name for name, p in learner.trained.items() if p.ndim > 1 and kind_of(name, method) != "layer_norm"
    }


def test_rates_rise_to_their_peak_and_fall_to_zero(tiny_base: Path) -> None:
    training = TrainingConfig(batch_size=10, warmup=0.2)
    learner = learner_of(tiny_base, "pfeiffer", schedule_of(epochs=5), 100, training)
    shares = []
    for _ in range(51):
        shares.append(learner.optimizer.param_groups[0]["lr"] / RATES.body)
        learner.optimizer.step()
        learner.scheduler.step()
    assert shares[:10] == pytest.approx([number / 10 for number in range(1, 11)])
    assert np.all(np.diff(shares[10:]) < 0)
    assert shares[50] == 0


@pytest.mark.parametrize("patience", [1, 3])
def test_stops_when_validation_no_longer_improves(tiny_base: Path, parts: dict[str, Tokens], patience: int) -> None:
    crawling = LearningRates(body=1e-30, layer_norm=1e-30, head=1e-30)
    schedule = schedule_of(epochs=8, patience=patience, rates=crawling)
    state = fitted(learner_of(tiny_base, "pfeiffer", schedule, len(parts["train"].ids)), parts, schedule)
    assert (state.best_epoch, state.epoch) == (1, 1 + patience)


def test_uses_up_the_epochs_while_patience_lasts(tiny_base: Path, parts: dict[str, Tokens]) -> None:
    schedule = schedule_of(epochs=3, patience=3)
    state = fitted(learner_of(tiny_base, "pfeiffer", schedule, len(parts["train"].ids)), parts, schedule)
    assert [entry["epoch"] for entry in state.history] == [1, 2, 3]


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "log_loss"])
def test_the_best_epoch_is_that_of_the_chosen_metric(tiny_base: Path, parts: dict[str, Tokens], metric: str) -> None:
    schedule = schedule_of(epochs=4)
    training = TrainingConfig.model_validate({"precision": "fp32", "max_tokens": 32, "metric": metric})
    state = fitted(learner_of(tiny_base, "full", schedule, len(parts["train"].ids)), parts, schedule, training)
    sign = -1 if metric == "log_loss" else 1
    scores = [(sign * entry[f"validation_{metric}"], -entry["validation_log_loss"]) for entry in state.history]
    assert state.best_epoch == 1 + scores.index(max(scores))


def test_a_loss_that_is_no_number_stops_training(tiny_base: Path, parts: dict[str, Tokens]) -> None:
    schedule = schedule_of()
    learner = learner_of(tiny_base, "pfeiffer", schedule, len(parts["train"].ids))
    with torch.no_grad():
        next(iter(learner.trained.values())).fill_(math.nan)
    with pytest.raises(TrainingError, match="nan at step 1"):
        fitted(learner, parts, schedule)


def test_balanced_class_weights_are_those_of_scikit_learn() -> None:
    labels = np.array([0] * 7 + [1] * 2 + [2] * 11)
    weights = loop._class_weights(labels, "balanced", 3, CPU)
    assert weights is not None
    assert weights.numpy() == pytest.approx(compute_class_weight("balanced", classes=np.arange(3), y=labels))


def test_a_frozen_base_computes_without_dropout_while_its_adapter_trains(tiny_base: Path) -> None:
    model = model_of(tiny_base, "houlsby")
    training_mode(model)
    assert torch.equal(logits(model), logits(model))


def test_the_adapters_own_dropout_acts_while_it_trains(tiny_base: Path) -> None:
    model = model_of(tiny_base, "houlsby", dropout=0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".up." in name:
                parameter.normal_()
    training_mode(model)
    assert not torch.equal(logits(model), logits(model))


def test_full_fine_tuning_trains_with_dropout(tiny_base: Path) -> None:
    model = model_of(tiny_base, "full")
    training_mode(model)
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize(("method", "settings"), [
    ("full", {}), ("pfeiffer", {"use_gating": True, "init_weights": "bert"}),
])  # fmt: skip
def test_a_prediction_does_not_depend_on_the_rows_beside_it(
    tiny_base: Path, parts: dict[str, Tokens], method: str, settings: dict[str, Any]
) -> None:
    lengths = [3, 9, 5, 12, 4]
    rows = [parts["test"].ids[index][:length] for index, length in enumerate(lengths)]
    zeros = np.zeros(len(rows), dtype=np.int64)
    model = model_of(tiny_base, method, **settings)
    together = loop.predict(model, Tokens(rows, None, zeros, zeros.astype(bool)), 0, CPU)
    alone = [loop.predict(model, Tokens([row], None, zeros[:1], zeros[:1].astype(bool)), 0, CPU)[0] for row in rows]
    assert together == pytest.approx(np.array(alone), abs=1e-6)
