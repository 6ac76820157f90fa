"""Does a part answer? Asked over HTTP on loopback, with the stack's own credentials, in milliseconds."""

from __future__ import annotations

import base64
import datetime
import http.client
import json
from collections.abc import Mapping
from typing import Any

PATIENCE_S = 3.0
# An answer from whatever else listens on the port counts as none.
NONE = (0, None)


def ask(port: int, path: str, login: str | None = None, body: object = None) -> tuple[int, Any]:
    """Status and JSON content of one request; status 0 when nothing answers. `login` is user:password.

    Without a proxy, whatever the environment says.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    headers = {"Content-Type": "application/json"}
    if login:
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    try:
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        content = answer.read()
    except (OSError, http.client.HTTPException):
        return NONE
    finally:
        connection.close()
    try:
        return answer.status, json.loads(content)
    except ValueError:
        return answer.status, None


def store(port: int) -> bool:
    return ask(port, "/healthz")[0] == 200


def mlflow(port: int, credentials: Mapping[str, str]) -> bool:
    """Up, and knows our user."""
    user = credentials["MLFLOW_TRACKING_USERNAME"]
    login = f"{user}:{credentials['MLFLOW_TRACKING_PASSWORD']}"
    return ask(port, "/health")[0] == 200 and ask(port, f"/api/2.0/mlflow/users/get?username={user}", login)[0] == 200


def prefect(port: int, credentials: Mapping[str, str]) -> bool:
    """Up, its database too, and knows our user."""
    login = credentials["PREFECT_API_AUTH_STRING"]
    return ask(port, "/api/health")[0] == 200 and ask(port, "/api/ready", login)[0] == 200 and (
        ask(port, "/api/admin/version", login)[0] == 200
    )  # fmt: skip


def worker(port: int, credentials: Mapping[str, str], pool: str, since: float) -> bool:
    """Has a worker of the pool reported to the Prefect server after a moment (s since 1970)?"""
    login = credentials["PREFECT_API_AUTH_STRING"]
    status, workers = ask(port, f"/api/work_pools/{pool}/workers/filter", login, {})
    if status != 200:
        return False
    return any(
        each["status"] == "ONLINE" and each["last_heartbeat_time"] and _seconds(each["last_heartbeat_time"]) >= since
        for each in workers
    )


def _seconds(moment: str) -> float:
    return datetime.datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()
