"""The best variant is chosen on the validation part, by the mean over seeds."""

from __future__ import annotations

import pytest

from components.errors import TrainingError
from components.evaluation import choice
from components.evaluation.choice import Choice, Tried


def tried(name: str, *accuracy: float, loss: float = 0.5, failure: str | None = None) -> Tried:
    scores = {"accuracy": accuracy, "log_loss": tuple(loss for _ in accuracy)} if accuracy else {}
    return Tried(name=name, changes={}, scores=scores, failure=failure)


def test_the_highest_mean_wins_not_the_luckiest_seed() -> None:
    made = choice.choose([tried("lucky", 0.99, 0.5), tried("steady", 0.8, 0.8)], "accuracy", [0, 1])
    assert [each.name for each in made.tried] == ["steady", "lucky"]


def test_of_log_loss_the_lowest_wins() -> None:
    made = choice.choose([tried("a", 0.9, loss=0.4), tried("b", 0.8, loss=0.3)], "log_loss", [0])
    assert made.best.name == "b"


def test_among_equals_log_loss_decides() -> None:
    made = choice.choose([tried("a", 0.9, loss=0.4), tried("b", 0.9, loss=0.3)], "accuracy", [0])
    assert made.best.name == "b"


def test_one_that_failed_is_last() -> None:
    made = choice.choose([tried("wild", failure="no finite loss"), tried("a", 0.1)], "accuracy", [0])
    assert [each.name for each in made.tried] == ["a", "wild"]


def test_when_all_failed_the_first_reason_is_given() -> None:
    with pytest.raises(TrainingError, match="no finite loss"):
        choice.choose([tried("wild", failure="no finite loss")], "accuracy", [0])


def test_spread_is_that_of_the_seeds() -> None:
    assert tried("a", 0.8, 0.9).spreads["accuracy"] == pytest.approx(0.0707, abs=1e-4)
    assert tried("a", 0.8).spreads == {}


def test_scores_are_those_of_the_best_epoch_on_the_validation_part() -> None:
    history = [
        {"epoch": epoch, "step": epoch, "validation_accuracy": epoch / 10, "train_loss": 1} for epoch in (1, 2, 3)
    ]
    measured = {"history": history, "best_epoch": 2, "test": {"accuracy": 1.0}}
    assert choice.validation(measured) == {"accuracy": 0.2}


def test_a_choice_survives_json() -> None:
    made = choice.choose([tried("a", 0.9), tried("wild", failure="why")], "accuracy", [0])
    assert Choice.model_validate_json(made.model_dump_json()) == made
