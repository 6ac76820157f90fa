"""The benchmark of training runs from rows to ratios; and what its numbers say follows from the samples."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components import forks
from tests.benchmarks import standings, train


def sample(seconds: float, accuracies: list[float], seed: int = 0) -> dict[str, Any]:
    epochs = [{"seconds": seconds, "cpu_seconds": 2 * seconds, "accuracy": a, "macro_f1": a} for a in accuracies]
    process = {"seconds": seconds * len(accuracies) + 4, "cpu_seconds": 1.0, "peak_rss_bytes": 100}
    return {"seed": seed, "epochs": epochs, "trained_parameters": 7, "process": process}


def test_ratios_are_of_medians() -> None:
    found = {
        "peer": standings.standing([sample(s, [0.9]) for s in (30.0, 40.0, 90.0)], 1e9, None),
        "ours": standings.standing([sample(s, [0.9]) for s in (2.0, 1.0, 8.0)], 1e9, 1e9),
    }
    assert standings.ratios(found, 0) == {"all_layers_vs_peer": 20.0}
    assert found["ours"].share == 0.5
    assert found["ours"].setup == 4


def test_the_interval_is_students_over_seeds() -> None:
    repeated = [sample(1, [0.5, each], seed) for seed, each in enumerate((0.8, 0.9, 1.0)) for _ in range(2)]
    mean, half = standings.standing(repeated, 1, None).accuracy
    assert (mean, half) == (pytest.approx(0.9), pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3))
    assert standings.interval([0.7]) == (0.7, None)


def test_time_to_99_counts_to_the_end_of_the_first_epoch_that_is_good_enough() -> None:
    by_rival = {
        "full_hf": [sample(100, [0.5, 1.0]), sample(100, [0.99, 1.0])],
        "ours": [sample(2, [0.98, 0.99, 1.0])],
        "ours_half": [sample(1, [0.98, 0.98])],
    }
    assert standings.to_99(by_rival) == {"full_hf": 150, "ours": 4, "ours_half": None}


def test_wrong_data_are_told_in_one_line(tmp_path: Path) -> None:
    done = forks.run(["-m", "tests.benchmarks.train", "--data", "no.csv", "--out", str(tmp_path)], os.environ)
    assert done.returncode == 1
    assert done.stderr.startswith("error: expected a preset among ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_from_rows_to_ratios(
    toy_csv: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--rows", "200", "--test-rows", "40", "--epochs", "2", "--max-tokens", "32", "--threads", "1"]
    places = ["--data", str(toy_csv), "--base", str(tiny_base), "--out", str(tmp_path)]
    arguments = [*sizes, *places, "--variants", "full_hf", "ours", "--only-seed", "full_hf=0"]
    train.main([*arguments, "--seeds", "0"])
    first = json.loads((tmp_path / "train.json").read_bytes())["samples"]
    train.main([*arguments, "--seeds", "0", "1"])
    content = json.loads((tmp_path / "train.json").read_bytes())
    samples = content["samples"]
    assert samples[:2] == first  # what was measured is not measured again
    assert [each["name"] for each in samples] == ["full_hf", "ours", "ours"]
    assert all(len(each["epochs"]) == 2 and each["process"]["peak_rss_bytes"] > 1e8 for each in samples)
    own = content["standings"]["ours"]
    assert own["seeds"] == 2 and own["share"] > 0
    (tokens,) = (tmp_path / "data").glob("*/tokens.npz")
    assert len(np.load(tokens)["train_labels"]) == 200
    assert (tmp_path / "train.png").stat().st_size > 10_000
    assert "share of matmul peak, ours" in capsys.readouterr().out
