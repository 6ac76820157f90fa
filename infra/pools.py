"""What the Prefect server has to know: pools and the limit of GPUs; and runs that nobody works on.

    python -m infra.pools        with the environment of the stack; the standard input is a JSON object, see `Wanted`

A process of its own, because importing Prefect takes seconds. Everything is made or updated; nothing is deleted, and
what people set by hand (a pool's limit, its pause) stays.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict
from uuid import UUID

from infra import parts

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

TEMPLATES = Path(__file__).parent / "work-pools"
TYPES = {"local": "process", "docker": "docker", "k8s": "kubernetes"}
GPU_LIMIT = "gpu"
ALONE = "retrain-"  # and the model: flows/turns.py
PAGE = 200


class Wanted(TypedDict):
    """Flow runs that are being worked on; pools whose other runs are not."""

    living: list[str]
    settle: list[str]


def templates() -> dict[str, str]:
    """By pool the text of its base job template, for those that have one."""
    files = {pool: TEMPLATES / f"{pool}.json" for pool in TYPES}
    return {pool: file.read_text() for pool, file in files.items() if file.is_file()}


def configure(client: SyncPrefectClient, wanted: Wanted) -> None:
    """Make or update everything."""
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    for pool, text in templates().items():
        template = json.loads(text)
        try:
            client.read_work_pool(pool)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=pool, type=TYPES[pool], base_job_template=template))
        else:
            client.update_work_pool(pool, WorkPoolUpdate(base_job_template=template))
    # Docker gives every container that asks for one GPU the first: infra/README.md tells what to do with several.
    client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, 1)
    settle(client, wanted)


def settle(client: SyncPrefectClient, wanted: Wanted) -> None:
    """Runs that were being worked on when the stack went down are crashed: else they would look alive for ever."""
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
    from prefect.client.schemas.objects import State, StateType
    from prefect.states import Cancelled, Crashed

    if not wanted["settle"]:
        return
    unfinished = [StateType.RUNNING.value, StateType.PENDING.value, StateType.CANCELLING.value]
    page: list[object] | None = None
    while page is None or len(page) == PAGE:
        found = client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate(
                {"state": {"type": {"any_": unfinished}}, "id": {"not_any_": wanted["living"]}}
            ),
            work_pool_filter=WorkPoolFilter.model_validate({"name": {"any_": wanted["settle"]}}),
            limit=PAGE,
        )
        for run in found:
            cancelled = run.state is not None and run.state.is_cancelling()
            crashed: State[None] = Crashed(
                message="the stack went down while this ran: start it again, it resumes what it can"
            )
            client.set_flow_run_state(run.id, Cancelled() if cancelled else crashed, force=True)
        page = list(found)
    if not wanted["living"]:
        release(client, Path(os.environ["PREFECT_HOME"]) / parts.LEASES_FOLDER)


def release(client: SyncPrefectClient, leases: Path) -> None:
    """Free the slots that no lease holds: a killed server left them taken. Those with a lease are free once it ends."""
    from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate

    held = Counter[UUID]()
    for file in leases.glob("*.json"):
        lease = json.loads(file.read_text())
        if "resource_ids" in lease:  # else the index of their ends
            held.update({UUID(limit): lease["metadata"]["slots"] for limit in lease["resource_ids"]})
    offset = 0
    while page := client.read_global_concurrency_limits(limit=PAGE, offset=offset):
        for limit in page:
            ours = limit.name == GPU_LIMIT or limit.name.startswith(ALONE)
            if ours and limit.active_slots > held[limit.id]:
                free = GlobalConcurrencyLimitUpdate(active_slots=held[limit.id])
                client.update_global_concurrency_limit(limit.name, free)
        offset += PAGE


def main() -> int:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        configure(client, json.load(sys.stdin))
    return 0


if __name__ == "__main__":
    sys.exit(main())
