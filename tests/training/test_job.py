"""Whole jobs on a tiny base: they learn, repeat exactly, stop early when done, and refuse what does not fit."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components import forks
from components.errors import AdapterlineError, BaseModelError, ConfigError, DataError
from components.registry import bundle
from components.training import job, progress
from components.training.spec import DataRef, JobSpec, Limits, parse
from tests.conftest import make_base
from tests.training.toy_jobs import RATES, finished, silent, toy_spec

# Of 100 test rows, chance alone gets 75 right less than once in a million times.
CLEARLY_ABOVE_CHANCE = 0.75


@pytest.fixture(scope="module")
def bundles(lively_base: Path, data: DataRef, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle of every method, long enough trained to have learned the task."""
    root = tmp_path_factory.mktemp("bundles")
    return {method: finished(lively_base, data, method, root / method, epochs=15) for method in RATES}


every_method = pytest.mark.parametrize("method", RATES)


@every_method
def test_learns(bundles: dict[str, Path], method: str) -> None:
    measured = json.loads((bundles[method] / "metrics.json").read_text())
    assert measured["test"]["accuracy"] > CLEARLY_ABOVE_CHANCE


@every_method
def test_the_bundle_holds_what_its_method_trains(bundles: dict[str, Path], method: str) -> None:
    model = {"config.json", "model.safetensors"}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    always = {"job.json", "metrics.json", bundle.PREDICTIONS}
    assert set(bundle.read_manifest(bundles[method]).files) == always | (model if method == "full" else adapter)


def test_the_manifest_counts_trained_and_all_parameters(bundles: dict[str, Path]) -> None:
    full, adapter = (bundle.read_manifest(bundles[method]) for method in ("full", "pfeiffer"))
    bottlenecks = 2 * (2 * 32 * 16 + 32 + 16)
    head = 32 * 2 + 2
    assert full.trained_parameters == full.total_parameters
    assert adapter.trained_parameters == bottlenecks + head
    assert adapter.total_parameters == full.total_parameters + bottlenecks


def test_predictions_are_of_the_test_part(bundles: dict[str, Path], data: DataRef) -> None:
    import pyarrow.parquet

    test = pyarrow.parquet.read_table(Path(data.uri) / "test.parquet")
    predictions = bundle.read_predictions(bundles["full"])
    assert predictions.rows == test["row"].to_pylist()
    assert predictions.labels.tolist() == test["label"].to_pylist()


@every_method
def test_probabilities_sum_to_one(bundles: dict[str, Path], method: str) -> None:
    assert bundle.read_predictions(bundles[method]).probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)


def test_the_spec_is_kept(bundles: dict[str, Path], lively_base: Path, data: DataRef) -> None:
    assert parse((bundles["full"] / "job.json").read_bytes()) == toy_spec(lively_base, data, "full", epochs=15)


@every_method
def test_the_same_spec_gives_the_same_predictions(
    lively_base: Path, data: DataRef, tmp_path: Path, method: str
) -> None:
    first, second = (
        bundle.read_predictions(finished(lively_base, data, method, tmp_path / name)) for name in ("first", "second")
    )
    assert np.array_equal(first.probabilities, second.probabilities)


def test_another_seed_gives_other_predictions(lively_base: Path, data: DataRef, tmp_path: Path) -> None:
    first, second = (
        bundle.read_predictions(finished(lively_base, data, "pfeiffer", tmp_path / str(seed), seed=seed))
        for seed in (1, 2)
    )
    assert not np.allclose(first.probabilities, second.probabilities)


def test_a_finished_job_is_not_run_again(bundles: dict[str, Path], lively_base: Path, data: DataRef) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundles["pfeiffer"].rglob("*")}
    job.run(toy_spec(lively_base, data, "pfeiffer", epochs=15), str(bundles["pfeiffer"]), silent)
    assert {path: path.stat().st_mtime_ns for path in bundles["pfeiffer"].rglob("*")} == before


def test_a_job_needs_no_cache_folder(
    lively_base: Path, data: DataRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADAPTERLINE_CACHE", "/proc/nobody/writes/here")
    limits = Limits(threads=1, device="cpu", trunk_cache_gb=1)
    out = finished(lively_base, data, "pfeiffer", tmp_path / "out", epochs=1, limits=limits)
    assert bundle.read_manifest(out).method == "pfeiffer"


def test_who_names_no_threads_leaves_them_to_the_job(lively_base: Path, data: DataRef, tmp_path: Path) -> None:
    """As a spec that a flow wrote for a place elsewhere, started there without a flow."""
    before = torch.get_num_threads()
    try:
        limits = Limits(threads=0, device="cpu", trunk_cache_gb=1)
        finished(lively_base, data, "pfeiffer", tmp_path / "out", epochs=1, limits=limits)
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    finally:
        torch.set_num_threads(before)


def test_where_the_data_lie_makes_no_other_job(lively_base: Path, data: DataRef) -> None:
    moved = DataRef(uri="s3://elsewhere", digest=data.digest)
    assert toy_spec(lively_base, moved, "full").digest == toy_spec(lively_base, data, "full").digest


OTHERS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 9},
    "settings": {"settings": {"reduction_factor": 4}},
    "training": {"training": {"max_tokens": 31, "precision": "fp32"}},
    "data": {"data": {"uri": "x", "digest": "y"}},
    "code": {"code": "0" * 64},
}


@pytest.mark.parametrize("change", OTHERS)
def test_whatever_changes_the_result_makes_another_job(lively_base: Path, data: DataRef, change: str) -> None:
    plain = toy_spec(lively_base, data, "pfeiffer")
    assert JobSpec.model_validate({**plain.model_dump(), **OTHERS[change]}).digest != plain.digest


def refused(spec: JobSpec, out: Path, error: type[AdapterlineError], message: str) -> None:
    with pytest.raises(error, match=message):
        job.run(spec, str(out), silent)


def test_the_folder_of_another_job_is_refused(bundles: dict[str, Path], lively_base: Path, data: DataRef) -> None:
    refused(toy_spec(lively_base, data, "pfeiffer", seed=9), bundles["pfeiffer"], ConfigError, "name another folder")


def test_a_spec_of_other_code_is_refused(lively_base: Path, data: DataRef, tmp_path: Path) -> None:
    refused(toy_spec(lively_base, data, "full", code="0" * 64), tmp_path, ConfigError, "code version 000000000000")


def test_a_base_that_is_not_the_pinned_one_is_refused(data: DataRef, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    spec = toy_spec(base, data, "full")
    make_base(base, initializer_range=0.05)
    refused(spec, tmp_path / "out", BaseModelError, spec.base.weights_sha256[:12])


def test_more_tokens_than_the_base_reads_are_refused(lively_base: Path, data: DataRef, tmp_path: Path) -> None:
    spec = toy_spec(lively_base, data, "full", training={"max_tokens": 71})
    refused(spec, tmp_path, ConfigError, "max_tokens of at most 70; found 71")


def test_changed_data_are_refused(lively_base: Path, data: DataRef, tmp_path: Path) -> None:
    spec = toy_spec(lively_base, DataRef(uri=data.uri, digest="0" * 64), "full")
    refused(spec, tmp_path, DataError, "split 000000000000")


def test_labels_in_another_order_are_refused(lively_base: Path, data: DataRef, tmp_path: Path) -> None:
    refused(toy_spec(lively_base, data, "full", labels=("good", "bad")), tmp_path, ConfigError, "good, bad; found bad")


def process(spec: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return forks.run(["-m", "components.training.job", str(spec), str(out), *options], os.environ)


def test_a_job_in_its_own_process_leaves_the_same_bundle(
    lively_base: Path, data: DataRef, tmp_path: Path, bundles: dict[str, Path]
) -> None:
    done = process(bundles["pfeiffer"] / "job.json", tmp_path / "out", "--progress", "json")
    assert done.returncode == 0, done.stderr
    found, wanted = (bundle.read_predictions(path) for path in (tmp_path / "out", bundles["pfeiffer"]))
    assert np.array_equal(found.probabilities, wanted.probabilities)
    events = [event for line in done.stdout.splitlines() if (event := progress.parse(line))]
    assert [event.epoch for event in events if event.metrics is not None] == list(range(1, 16))


def test_a_failing_process_says_why_in_one_line(lively_base: Path, data: DataRef, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(toy_spec(lively_base, data, "full", training={"max_tokens": 71}).model_dump_json())
    done = process(spec, tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["expected training.max_tokens of at most 70; found 71; the base reads no more"]


def test_a_file_that_is_no_spec_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text('{"method": "full"}')
    assert job.main([str(spec), str(tmp_path / "out"), "--progress", "json"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "expected a job spec; found wrong or missing: base, data" in error
