"""Turns: one run a model at a time, one job a GPU, wherever they were started."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
from collections.abc import Iterator

import httpx
from prefect import get_client
from prefect.client.base import ServerType
from prefect.client.orchestration import SyncPrefectClient
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import get_current_settings

from components.errors import ModelBusy

# Who was killed holds a slot for no longer than this, s.
LEASE_S = 60

log = logging.getLogger("adapterline")


@contextlib.contextmanager
def turn(limit: str, max_retries: int | None = None) -> Iterator[None]:
    """One slot of a global concurrency limit, for the length of the block; waits for it unless told otherwise.

    A server that restarts meanwhile does not end the block, nor does one that is away at its end make a failure of it.
    """
    slot = concurrency(
        limit, max_retries=max_retries, lease_duration=LEASE_S, strict=True, raise_on_lease_renewal_failure=False
    )
    held = contextlib.ExitStack()
    held.enter_context(slot)
    try:
        yield
    finally:
        try:
            held.close()
        except httpx.TransportError:
            log.warning("warning   %s could not be given back to Prefect: it is free in %d s", limit, LEASE_S)


@contextlib.contextmanager
def alone(model: str) -> Iterator[None]:
    """Hold the model for the length of the block. Raises ModelBusy at once when another run holds it."""
    name = f"retrain-{model}"
    with get_client(sync_client=True) as client:
        with contextlib.suppress(ObjectAlreadyExists):  # another was first
            client.upsert_global_concurrency_limit_by_name(name, 1)
        if client.server_type is ServerType.EPHEMERAL:
            _free_expired(client)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(turn(name, max_retries=0))
        except ConcurrencySlotAcquisitionError:
            found = "another that has not ended, or was killed within the last minute"
            raise ModelBusy(f"no other run for model {model}", found, "wait for it, or cancel it") from None
        yield


def _free_expired(client: SyncPrefectClient) -> None:
    """Free what was held by those who were killed. A server that ends with its run does not do it by itself."""
    from prefect.server.concurrency.lease_storage import get_concurrency_lease_storage

    home = get_current_settings().home
    home.mkdir(parents=True, exist_ok=True)
    # One at a time, or two would free the same lease, and the second what somebody holds by then.
    with (home / "leases.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for lease in asyncio.run(get_concurrency_lease_storage().read_expired_lease_ids()):
            client.release_concurrency_slots_with_lease(lease)
