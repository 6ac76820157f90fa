"""What a registered version's own process says of a failure, and whether to try again."""

from __future__ import annotations

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import RestException

from components.serving import score

VERSION = "models:/mood@production"


def test_a_server_that_is_away_may_answer_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = "http://ada:s3cret@127.0.0.1:9"  # where nothing answers
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(score, "load", lambda *_: MlflowClient(server).get_model_version_by_alias("mood", "production"))
    assert score.main([VERSION, "--text", "lovely"]) == score.AWAY
    line = capsys.readouterr().err
    assert line.startswith(f"expected {VERSION} to predict; found MlflowException; ")
    assert line.count("\n") == 1
    assert "s3cret" not in line


def test_a_version_that_is_not_there_will_not_be_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: str) -> None:
        raise RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "No model mood.\n"})

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(score, "load", refused)
    assert score.main([VERSION, "--text", "lovely"]) == 1
    assert "found: RESOURCE_DOES_NOT_EXIST: No model mood. Check name and alias" in capsys.readouterr().err
