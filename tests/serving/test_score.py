"""What a registered version's own process says of a failure, and whether to try again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import requests
from botocore.exceptions import ClientError
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


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ClientError({"ResponseMetadata": {"HTTPStatusCode": 503}}, "GetObject"), score.AWAY),
        (ClientError({"ResponseMetadata": {"HTTPStatusCode": 403}}, "GetObject"), 1),
        (requests.ConnectionError("http://ada:s3cret@127.0.0.1:9"), score.AWAY),
        (requests.HTTPError(response=SimpleNamespace(status_code=502)), score.AWAY),
        (requests.HTTPError(response=SimpleNamespace(status_code=404)), 1),
        (ValueError("a text of s3cret"), 1),
    ],
)
def test_what_a_store_answers_tells_whether_to_try_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def failing(*_: str) -> None:
        raise error

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(score, "load", failing)
    assert score.main([VERSION, "--text", "lovely"]) == code
    assert "s3cret" not in capsys.readouterr().err


def test_a_version_whose_code_cannot_be_imported_is_not_taken_for_a_server_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packed under libraries of another time."""
    code, version = tmp_path / "model.py", str(tmp_path / "version")
    code.write_text("from mlflow import models, pyfunc\nmodels.set_model(pyfunc.PythonModel())\n")
    mlflow.pyfunc.save_model(version, python_model=str(code))
    (tmp_path / "version" / "model.py").write_text("from json import gone_since\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert score.main([version, "--text", "lovely"]) == 1
    assert "found ImportError: cannot import name 'gone_since' from 'json'" in capsys.readouterr().err


def test_a_version_that_is_not_there_will_not_be_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: str) -> None:
        raise RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "No model mood.\n"})

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(score, "load", refused)
    assert score.main([VERSION, "--text", "lovely"]) == 1
    assert "found: RESOURCE_DOES_NOT_EXIST: No model mood. Check name and alias" in capsys.readouterr().err
