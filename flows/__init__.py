"""What happens, in which order: one file a flow."""

import gc
import logging
import os
from pathlib import Path

from infra import environment, parts
from infra.folder import FOLDER

# Modules are no garbage. To look for some among the five thousand that a retrain imports, each time that a few hundred
# objects were made, takes a second and a half; so it is done after many, as in the process that forks jobs.
gc.set_threshold(100_000, *gc.get_threshold()[1:])

# Before Prefect is imported: nothing is sent home, a slow machine may take its time to start the server, who holds a
# slot of a limit stands in a file of it, our own log lines reach the run's page, and a user without a Prefect profile
# keeps everything below `out/`.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
for name, value in parts.LEASES.items():
    os.environ.setdefault(name, value)
os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "adapterline")
os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
environment.adopt(os.environ)  # the stack of `make up`, if it is up
if "PREFECT_API_URL" not in os.environ and not (Path.home() / ".prefect" / "profiles.toml").exists():
    home = Path(os.environ.setdefault("PREFECT_HOME", str((FOLDER / "prefect").resolve())))
    home.mkdir(parents=True, exist_ok=True)
logging.getLogger("adapterline").setLevel(logging.INFO)
