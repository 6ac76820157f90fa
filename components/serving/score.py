"""A registered version in a process of its own: score saved rows, or classify texts from the command line.

python -m components.serving.score models:/tweets-sentiment@candidate --text "What a day!" "Never again."
python -m components.serving.score models:/tweets-sentiment/3 --rows test.parquet --out probabilities.safetensors
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from components.errors import AdapterlineError, RegistryError

PREFIX = "probability_"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m components.serving.score", description="Use a registered version.")
    parser.add_argument("version", help="models:/NAME@ALIAS or models:/NAME/VERSION")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", nargs="+", help="texts to classify")
    what.add_argument("--rows", type=Path, help="Parquet file with column text and, for pairs, text_pair")
    parser.add_argument("--out", type=Path, help="with --rows: where probabilities go (safetensors)")
    options = parser.parse_args(arguments)
    if options.rows and not options.out:
        parser.error("--rows needs --out")
    try:
        model = load(options.version)
        if options.text:
            print(model.predict(options.text).to_string(index=False, float_format="{:.3f}".format))
        else:
            _score(model, options.rows, options.out)
    except AdapterlineError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def load(version: str) -> Any:
    """The version as an MLflow pyfunc model. Raises RegistryError when there is no such version."""
    import os

    from components.registry.tracking import PATIENCE, load_mlflow

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise RegistryError("an MLflow tracking URI", "none", "set MLFLOW_TRACKING_URI, or run under `infra.local`")
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    mlflow = load_mlflow(uri)
    try:
        return mlflow.pyfunc.load_model(version)
    except mlflow.MlflowException as error:
        raise RegistryError(
            f"a registered version {version}", str(error).splitlines()[0], "check name and alias"
        ) from error


def _score(model: Any, rows: Path, out: Path) -> None:
    import numpy as np
    import pyarrow.parquet
    from safetensors.numpy import save_file

    table = pyarrow.parquet.read_table(rows)
    frame = table.select([name for name in ("text", "text_pair") if name in table.column_names]).to_pandas()
    answer = model.predict(frame)
    columns = [name for name in answer.columns if name.startswith(PREFIX)]
    labels = json.dumps([name.removeprefix(PREFIX) for name in columns])
    save_file({"probabilities": np.ascontiguousarray(answer[columns].to_numpy(np.float32))}, out, {"labels": labels})


if __name__ == "__main__":
    sys.exit(main())
