"""Batch scoring with registered models: on the command line and by its deployment, from S3 and back."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components import storage
from components.config import RegistryConfig
from components.registry import promotion
from components.registry.promotion import Approval
from components.serving import classifier
from tests.conftest import toy_rows, write_csv
from tests.flows.conftest import Command
from tests.flows.deployed import Prefect
from tests.registry.registered import Shelf, shelf

pytestmark = [pytest.mark.slow, pytest.mark.integration, pytest.mark.xdist_group("servers-of-commands")]

ROWS = toy_rows(500, seed=5)


@pytest.fixture(scope="module")
def shelved(servers: dict[str, str], tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """`mood` with a version in production, and one after it."""
    made = shelf(tmp_path_factory.mktemp("shelf"), tiny_base, RegistryConfig())
    made.version("mood")
    promotion.promote(made.registry, promotion.examine(made.registry, "mood", "1"), Approval("ada", "first"))
    made.version("mood", champion="1")
    return made


@pytest.fixture
def place(shelved: Shelf, request: pytest.FixtureRequest) -> str:
    """An S3 prefix with `in/rows.csv` below it."""
    made = storage.join(RegistryConfig().store, "scoring", request.node.name)
    local = write_csv(shelved.root / "rows.csv", ROWS)
    storage.upload(local, storage.join(made, "in", "rows.csv"))
    return made


def scored(place: str, folder: Path) -> pa.Table:
    return pq.read_table(storage.download(storage.join(place, "scored.parquet"), folder / "scored.parquet"))


def test_models_by_alias_number_and_folder(shelved: Shelf, place: str, command: Command, tmp_path: Path) -> None:
    chosen = ["mood@production", "models:/mood/2", str(shelved.trained)]
    words = [word for each in chosen for word in ("--model", each)]
    done = command(
        "flows.score", *words, "--source", f"{place}/in/", "--out", f"{place}/scored.parquet", "--id", "label"
    )
    assert done.returncode == 0, done.stderr
    assert "mood-1, mood-2, trained share one base" in done.stdout
    assert f"scored    {len(ROWS)} rows" in done.stdout
    found = scored(place, tmp_path)
    assert found["label"].to_pylist() == [label for _, label in ROWS]
    expected = classifier.load(shelved.trained).probabilities([text for text, _ in ROWS])
    for name in ("mood-1", "mood-2", "trained"):
        assert found[f"{name}_probability_good"].to_numpy() == pytest.approx(expected[:, 1], abs=1e-5)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("nobody@production", "a registered version nobody@production; found none"),
        ("models:/mood/77", "a registered version mood/77; found none"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    shelved: Shelf, place: str, command: Command, model: str, line: str
) -> None:
    done = command("flows.score", "--model", model, "--source", f"{place}/in/rows.csv", "--out", f"{place}/out.csv")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert line in done.stderr
    assert not storage.exists(f"{place}/out.csv")


def test_a_bundle_needs_no_server(shelved: Shelf, command: Command, tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:9"  # where nothing answers
    source, out = write_csv(tmp_path / "rows.csv", ROWS), tmp_path / "out.csv"
    done = command(
        "flows.score", "--model", str(shelved.trained), "--source", str(source), "--out", str(out),
        MLFLOW_TRACKING_URI=nobody, PREFECT_API_URL=f"{nobody}/api", AWS_ENDPOINT_URL_S3=nobody,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(out.read_text().splitlines()) == 1 + len(ROWS)


def test_deployed(shelved: Shelf, place: str, run: Prefect, tmp_path: Path) -> None:
    config = {"models": ["mood@production"], "source": f"{place}/in/rows.csv", "out": f"{place}/scored.parquet"}
    done = run("score/on-demand", f"config={json.dumps(config)}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert scored(place, tmp_path).num_rows == len(ROWS)
