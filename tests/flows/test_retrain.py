"""The whole flow on real servers: register, say up to date, keep the candidate when something is wrong."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
from pathlib import Path

import mlflow
import pytest
import yaml

from components.config import RegistryConfig, RetrainConfig
from components.data import ledger
from components.errors import AdapterlineError, GateRejected
from components.registry import bundle, registration, tracking, versions
from flows import command
from flows.retrain import retrain
from tests.conftest import toy_rows, write_csv
from tests.flows.conftest import Settings

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("servers"), pytest.mark.usefixtures("servers")]

STORE = "s3://adapterline"


def connect() -> tracking.Tracking:
    return tracking.connect(RegistryConfig())


def candidate(model: str) -> versions.Version | None:
    return versions.with_alias(connect(), model, versions.CANDIDATE)


def count(model: str) -> int:
    return len(connect().client.search_model_versions(f"name = '{model}'"))


def jobs(workspace: Path) -> set[str]:
    return {path.parent.name for path in workspace.glob("jobs/*/manifest.json")}


@pytest.fixture
def standing(settings: Settings) -> versions.Version:
    """The candidate of model `first`, registered by the first test that asks."""
    if candidate("first") is None:
        retrain(settings("first"))
    found = candidate("first")
    assert found is not None
    return found


def attempt(config: RetrainConfig) -> None:
    """A run whose verdict does not matter."""
    with contextlib.suppress(GateRejected):
        retrain(config)


@pytest.mark.slow
def test_a_run_registers_a_candidate_and_the_same_run_again_trains_nothing(settings: Settings, workspace: Path) -> None:
    config = settings("first")
    address = retrain(config)
    version = candidate("first")
    assert version is not None
    assert version.address == address
    assert version.tags["verdict"] == "pass"
    assert version.tags["state"] == "proven"
    before = jobs(workspace)

    assert retrain(config) == address
    assert jobs(workspace) == before
    assert count("first") == 1


@pytest.mark.slow
def test_the_parent_run_holds_the_evidence_and_two_nested_runs(standing: versions.Version) -> None:
    there = connect()
    parent = there.client.get_run(standing.tags["gate_run"])
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["verdict"] == "pass"
    assert {"adapter/accuracy", "full_fine-tuning/accuracy", "TF-IDF/accuracy"} <= set(parent.data.metrics)
    nested = there.client.search_runs([there.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert sorted(run.data.tags["role"] for run in nested) == ["adapter", "baseline"]
    epochs = there.client.get_metric_history(nested[0].info.run_id, "validation_accuracy")
    assert len(epochs) >= 2, "one value an epoch"
    found = {
        item.path for folder in ("data", "gate") for item in there.client.list_artifacts(parent.info.run_id, folder)
    }
    assert {"data/report.html", "data/validation.json", "data/split.json", "gate/gate.json", "gate/rules.json"} <= found


@pytest.mark.slow
def test_an_unchanged_baseline_is_reused_when_only_the_adapter_changes(settings: Settings, workspace: Path) -> None:
    retrain(settings("reuse"))
    before = {name for name in jobs(workspace) if name.startswith("full-")}
    retrain(settings("reuse", adapter__bottleneck__reduction_factor=4))
    assert {name for name in jobs(workspace) if name.startswith("full-")} == before
    assert count("reuse") == 2


@pytest.mark.slow
def test_later_data_never_train_on_what_was_held_out(settings: Settings, tmp_path: Path) -> None:
    attempt(settings("nightly", rows=400))
    attempt(settings("nightly", rows=600))
    first, second = ledger.records(STORE, "nightly")
    held_out, _ = ledger.load_parts(first.split_uri, first.split_digest, tmp_path / "first")
    assert not set(held_out["test"]["row"]) & ledger.learned_rows(second.split_uri)
    assert second.rows_per_part["test"] > first.rows_per_part["test"]


@pytest.mark.slow
def test_data_that_come_back_are_split_anew_around_what_was_held_out_since(settings: Settings, tmp_path: Path) -> None:
    old, new = settings("returning", rows=400), settings("returning", rows=600)
    attempt(old)
    attempt(new)
    attempt(old.model_copy(update={"seed": 1}))
    _, second, third = ledger.records(STORE, "returning")
    held_out, _ = ledger.load_parts(second.split_uri, second.split_digest, tmp_path / "second")
    assert not set(held_out["test"]["row"]) & ledger.learned_rows(third.split_uri)


@pytest.mark.slow
def test_production_is_compared_on_rows_it_never_saw(settings: Settings) -> None:
    retrain(settings("champion"))
    there = connect()
    there.client.set_registered_model_alias("champion", versions.PRODUCTION, "1")
    attempt(settings("champion", rows=700))
    (newest, _) = there.client.search_runs(
        [there.experiment_id], "tags.model = 'champion'", order_by=["start_time DESC"]
    )
    report = json.loads(Path(there.client.download_artifacts(newest.info.run_id, "gate/gate.json")).read_text())
    (rule,) = [rule for rule in report["rules"] if rule["rule"].startswith("vs champion")]
    assert rule["rule"] == "vs champion (version 1)"
    assert 0 < rule["rows"] <= report_rows(report)


def report_rows(report: dict[str, list[dict[str, int]]]) -> int:
    return report["rules"][0]["rows"]


@pytest.mark.slow
@pytest.mark.usefixtures("own_logging")
def test_a_gate_that_fails_or_cannot_tell_is_an_exit_code_and_a_line_and_leaves_the_candidate(
    settings: Settings, standing: versions.Version, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def by_hand(**changes: object) -> tuple[int, str, str]:
        path = tmp_path / "configuration.yaml"
        path.write_text(yaml.safe_dump(settings("first", **changes).model_dump(mode="json")))
        code = command.main(retrain, ["--config", str(path)])
        said, errors = capsys.readouterr()
        # Beside bars of `datasets`, which was imported long ago, nothing but the one line.
        [line] = [each for each in errors.splitlines() if each and "%|" not in each]
        return code, said, line

    untrained = {"body": 1e-9, "layer_norm": 1e-9, "head": 1e-9}
    code, said, line = by_hand(adapter__schedule={"epochs": 1, "learning_rates": untrained})
    assert (code, "verdict: FAIL" in said) == (2, True), line
    assert "vs full fine-tuning" in line
    code, said, line = by_hand(gate__margin=0.0001, gate__confidence=0.9999)
    assert (code, "verdict: INCONCLUSIVE" in said) == (3, True), line
    assert re.search(r"about [\d,]+ would", line)
    assert candidate("first") == standing
    assert count("first") == 1


@pytest.mark.slow
def test_the_registered_artifact_is_small_and_holds_no_base_weights(
    standing: versions.Version, tiny_base: Path, tmp_path: Path
) -> None:
    folder = Path(mlflow.artifacts.download_artifacts(standing.uri, dst_path=str(tmp_path / "artifact")))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) == standing.size < 1_000_000
    bundle.read_manifest(next(path.parent for path in files if path.name == bundle.MANIFEST))
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert {path.name for path in weights} == {"adapter_model.safetensors", "predictions.safetensors"}
    base = (tiny_base / "model.safetensors").stat().st_size
    assert sum(path.stat().st_size for path in weights) < base / 2


ROWS = b"text,label\n"
# what is wrong: (content of the file, overrides, what the message says)
BAD_INPUT: dict[str, tuple[bytes | None, dict[str, object], str]] = {
    "missing file": (None, {"data__source": "no/such.csv"}, "nothing there"),
    "empty file": (b"", {}, "an empty file"),
    "header only": (ROWS, {}, "expected rows; found none"),
    "missing column": (b"text,mark\nhello there,good\n", {}, "label is not there"),
    "one class only": (ROWS + b"".join(b"text %d,good\n" % n for n in range(200)), {}, "one class only"),
    "not UTF-8": ("text,label\ncafé olé,good\n".encode("latin-1") * 200, {}, "UTF-8"),
    "labels outside the set": (None, {"data__labels": ["good", "excellent"]}, "labels among good, excellent"),
    "20,000 characters": (ROWS + b"x" * 20_000 + b",good\n" + b"short,bad\n" * 200, {}, "20,000 characters"),
    "labels missing": (ROWS + b"hello,NaN\nthere,good\n" * 100, {}, "a label in every row"),
    "duplicate ids": (b"text,label,id\nhi,bad,7\nho,good,7\n", {"data__columns": {"id": "id"}}, "repeated ids"),
    "gzip cut short": (gzip.compress(ROWS + os.urandom(9_000).hex(",").encode())[:-2_000], {}, "damaged or cut short"),
    "reduction factor": (None, {"adapter__bottleneck__reduction_factor": 4000}, "at most the hidden size, 32"),
    "leave out": (None, {"adapter__bottleneck__leave_out": [7]}, "some of the layers 0 to 1"),
    "too many tokens": (None, {"training__max_tokens": 5000}, "at most the base's 70 positions"),
    "base without weights": (None, {"base__name": "EMPTY"}, "an empty folder"),
    "hub base while offline": (None, {"base": {"name": "nobody/none", "revision": "0" * 40}}, "cannot be reached"),
    "hub base without revision": (None, {"base": {"name": "nobody/none"}}, "a pin must not move"),
    "base with another digest": (None, {"base__weights_sha256": "0" * 64}, "with weights digest 000000000000"),
    "hub data while offline": (None, {"data__source": "nobody/none"}, "cannot be reached"),
    "wrong S3 key": (None, {"data__source": f"{STORE}/no/such.csv"}, "no such key"),
    "no bucket for data": (None, {"data__source": "s3://no-such-bucket/rows.csv"}, "no such bucket"),
    "no bucket for the store": (None, {"registry__store": "s3://no-such-bucket"}, "no such bucket"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_in_one_line_and_the_candidate_stays(
    case: str, standing: versions.Version, settings: Settings, tmp_path: Path, workspace: Path
) -> None:
    content, overrides, message = BAD_INPUT[case]
    if content is not None:
        path = tmp_path / ("rows.csv.gz" if "gzip" in case else "rows.csv")
        path.write_bytes(content)
        overrides = {**overrides, "data__source": str(path)}
    if "EMPTY" in overrides.values():
        (tmp_path / "empty-base").mkdir()
        overrides = {"base__name": str(tmp_path / "empty-base")}
    before, accepted = jobs(workspace), len(ledger.records(STORE, "first"))
    with pytest.raises(AdapterlineError) as caught:
        retrain(settings("first", rows=200, **overrides))
    line = str(caught.value)
    assert re.fullmatch(r"expected .+; found .+; .+", line), "one line of three parts"
    assert message in line
    assert candidate("first") == standing
    assert count("first") == 1
    assert jobs(workspace) == before, "nothing was trained"
    assert len(ledger.records(STORE, "first")) == accepted, "no data were accepted"


@pytest.mark.slow
def test_a_version_whose_predictions_are_not_reproduced_is_taken_back(
    standing: versions.Version, tmp_path: Path, workspace: Path
) -> None:
    there = connect()
    name = next(name for name in jobs(workspace) if name.startswith("pfeiffer-"))
    folder = tmp_path / "forged"
    shutil.copytree(workspace / "jobs" / name, folder)
    manifest = bundle.read_manifest(folder)
    honest = bundle.read_predictions(folder)
    forged = bundle.Predictions(honest.rows, honest.labels, honest.probabilities[:, ::-1].copy())
    bundle.write_predictions(folder, forged)
    (folder / bundle.MANIFEST).unlink()
    about = manifest.model_dump(exclude={"files", "libraries"})
    bundle.write_manifest(folder, **about)
    parts, _ = ledger.load_parts(manifest.data_uri, manifest.data_digest, tmp_path / "split")
    run = tracking.start(there, "forged", {})
    with pytest.raises(AdapterlineError, match="test probabilities"):
        registration.register(there, run, "first", folder, parts["test"], {}, "forged")
    assert candidate("first") == standing
    assert count("first") == 1


def test_toy_rows_are_all_different(tmp_path: Path) -> None:
    """The flow tests stand on rows that no cleaning drops."""
    texts = [text for text, _ in toy_rows(600)]
    assert len(set(texts)) == len(texts)
    assert write_csv(tmp_path / "x.csv", toy_rows(3)).read_text().count("\n") == 4
