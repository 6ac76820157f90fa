"""Tell the Prefect server of infra/compose.yaml its pools and limits: once, each time the project comes up.

    python -m infra.compose.setup        with the environment of the service `setup`

As on a machine without Docker Compose, except that jobs join the network of the project instead of the host's.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from infra import pools


def joined(template: dict[str, Any], network: str, image: str) -> dict[str, Any]:
    """The template of the docker pool, its containers in `network` and from `image` unless a run says otherwise."""
    found: dict[str, Any] = json.loads(json.dumps(template))
    variables = found["variables"]["properties"]
    host = network == "host"
    variables["network_mode"]["default"] = network if host else None
    variables["networks"]["default"] = [] if host else [network]
    variables["image"]["default"] = image
    return found


def main() -> int:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolUpdate

    template = json.loads(pools.templates()["docker"])
    network, image = os.environ["ADAPTERLINE_NETWORK"], os.environ["ADAPTERLINE_JOB_IMAGE"]
    with get_client(sync_client=True) as client:
        pools.configure(client, {"living": [], "settle": []})
        client.update_work_pool("docker", WorkPoolUpdate(base_job_template=joined(template, network, image)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
