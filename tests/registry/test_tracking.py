"""Runs in a real MLflow without a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.config import RegistryConfig
from components.errors import RegistryError
from components.registry import tracking


def test_a_run_is_refused_whose_artifacts_go_through_a_server_that_is_down(tmp_path: Path) -> None:
    config = RegistryConfig(store=str(tmp_path / "store"), tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    tracking.load_mlflow(config.tracking_uri or "").MlflowClient().create_experiment(
        config.experiment, "mlflow-artifacts:/1"
    )
    there = tracking.connect(config)  # what is registered can still be asked about
    with pytest.raises(RegistryError, match=r"expected the MLflow server .* found its database alone.*make up") as told:
        tracking.start(there, "run", {})
    assert not told.value.retry_can_help
    assert there.client.search_runs([there.experiment_id]) == []


@pytest.mark.parametrize("server", ["https://ml.example:5000", "https://ml.example:5000/mlflow/"])
def test_the_page_of_an_artifact_shows_no_password(server: str) -> None:
    place = tracking.Tracking(None, server.replace("//", "//ada:s3cret@"), "1").page("abc", "data/report.html")
    assert place == f"{server.rstrip('/')}/#/experiments/1/runs/abc/artifacts/data/report.html"
