"""Keys and passwords of a stack: made on first use, kept in a file of mode 600, never a default."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from infra.folder import write_private

USER = "admin"
STORE = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
# Names whose values are never shown.
SECRET = (*STORE, "MLFLOW_TRACKING_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY", "PREFECT_API_AUTH_STRING")


def path(folder: Path) -> Path:
    return folder / "credentials.json"


def read(folder: Path) -> dict[str, str]:
    """All credentials; whatever is missing is made. Call it first under the folder's lock."""
    file = path(folder)
    found: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {}
    fresh = {
        "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
        "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(30),
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": secrets.token_urlsafe(24),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(32),
        "PREFECT_API_AUTH_STRING": f"{USER}:{secrets.token_urlsafe(24)}",
    }
    if fresh.keys() - found.keys():
        found = {**fresh, **found}
        write_private(file, json.dumps(found, indent=1) + "\n")
    return found
