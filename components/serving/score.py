"""A registered version in a process of its own: score saved rows, or classify texts from the command line.

    python -m components.serving.score models:/tweets-sentiment@candidate --text "What a day!" "Never again."
    python -m components.serving.score models:/tweets-sentiment/3 --rows test.parquet --out probabilities.safetensors

Imports nothing of this checkout: what runs is the code that the version brings with it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

PREFIX = "probability_"
# The exit code where a server did not answer: later it may. Any other failure is 1.
AWAY = 75
# Answers of MLflow that a second try will not change.
REFUSALS = (
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "PERMISSION_DENIED",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
    "UNAUTHENTICATED",
)
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m components.serving.score", description="Use a registered version.")
    parser.add_argument("version", help="models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("--text", nargs="+", help="texts to classify")
    parser.add_argument("--rows", type=Path, help="Parquet file with column text and, for pairs, text_pair")
    parser.add_argument("--out", type=Path, help="with --rows: where probabilities go (safetensors)")
    parser.add_argument("--threads", type=int, help="threads to compute with (default: as torch chooses)")
    options = parser.parse_args(arguments)
    if not (options.text or options.rows):
        parser.error("--text or --rows is needed")
    if options.rows and not options.out:
        parser.error("--rows needs --out")
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return _refuse("expected MLFLOW_TRACKING_URI; found none; set it, or run under `python -m infra.local run --`")
    try:
        with tempfile.TemporaryDirectory() as folder:
            _use(load(options.version, folder), options)
    except Exception as error:  # noqa: BLE001  # the version's errors say all in a line; others may quote a text
        if hasattr(error, "todo"):
            return _refuse(str(error))
        if getattr(error, "error_code", None) in REFUSALS:
            found = str(error).splitlines()[0]
            return _refuse(f"expected a registered version {options.version}; found: {found} Check name and alias")
        # MLflow wraps what a version's own code raises.
        reason = (type(error).__module__.startswith("mlflow") and error.__cause__) or error
        found = type(reason).__name__  # not its words: they may hold the server's address, and a password in it
        if isinstance(reason, ImportError):  # which names what is not installed, or another version of it
            found = " ".join(f"{found}: {reason}".split())
        line = f"expected {options.version} to predict; found {found}; see the MLflow server's log"
        return _refuse(line, AWAY if _is_away(reason) else 1)
    return 0


def load(version: str, folder: str) -> Any:
    """The version as an MLflow pyfunc model. folder: for what is fetched of it, which MLflow would leave behind."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.captureWarnings(True)  # libraries put filters of their own before any of ours
    import mlflow

    for name in ("mlflow", "alembic", "py.warnings"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # What it would warn of stays unseen, and takes half a second to look for in all that is installed.
    return mlflow.pyfunc.load_model(version, suppress_warnings=True, dst_path=folder)


def _use(model: Any, options: argparse.Namespace) -> None:
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    if options.text:
        print(model.predict(options.text).to_string(index=False, float_format="{:.3f}".format))
    if options.rows:
        _score(model, options.rows, options.out)


def _score(model: Any, rows: Path, out: Path) -> None:
    import numpy as np
    import pyarrow.parquet
    from safetensors.numpy import save_file

    table = pyarrow.parquet.read_table(rows)
    frame = table.select([name for name in ("text", "text_pair") if name in table.column_names]).to_pandas()
    answer = model.predict(frame)
    columns = [name for name in answer.columns if name.startswith(PREFIX)]
    about = {
        "labels": json.dumps([name.removeprefix(PREFIX) for name in columns]),
        "code": str(sys.modules["components"].__file__),
    }
    save_file({"probabilities": np.ascontiguousarray(answer[columns].to_numpy(np.float32))}, out, about)


def _is_away(error: BaseException) -> bool:
    """Is it MLflow or its store that does not answer, or says that it cannot?"""
    from botocore import exceptions
    from requests import RequestException

    answer: Any = getattr(error, "response", None)
    if isinstance(error, exceptions.ClientError):
        return int(answer["ResponseMetadata"]["HTTPStatusCode"]) >= 500
    if isinstance(error, RequestException):
        return answer is None or answer.status_code >= 500
    unreached = isinstance(error, exceptions.ConnectionError | exceptions.HTTPClientError)
    return unreached or type(error).__module__.startswith(("mlflow", "sqlalchemy"))


def _refuse(line: str, code: int = 1) -> int:
    print(line, file=sys.stderr)
    return code


if __name__ == "__main__":
    if __package__:  # started with -m: once more as a file, so that the version's own code is found first
        os.execv(sys.executable, [sys.executable, "-P", __file__, *sys.argv[1:]])  # noqa: S606  # ourselves
    sys.exit(main())
