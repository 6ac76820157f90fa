"""Where a job's checkpoints and bundle go when that is S3: any machine can go on from what lies there.

Below OUT lie checkpoint/best-N.safetensors and checkpoint/last.safetensors while the job runs, and the bundle alone
when it is done: whoever sees its manifest sees nothing else.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from components import storage
from components.errors import StorageError, StorageUnavailable
from components.registry import bundle
from components.training import checkpoint

# Copies take at most this share of the time: a checkpoint too soon after a copy is left to the next one.
COPY_SHARE = 0.1
# How long the bundle's upload waits for a server that went away: hours of training are at stake.
DELIVERY_S = 180.0
LONGEST_PAUSE_S = 15.0

log = logging.getLogger("adapterline")


class Mirror:
    """The checkpoints of one job, on this machine in `folder` and in S3 at `out`."""

    def __init__(self, job: str, folder: Path, out: str) -> None:
        self._job, self._folder, self._out = job, folder, out
        self._uri = storage.join(out, checkpoint.FOLDER)
        self._best = ""  # name of the best weights that are in S3
        self._rest_until = 0.0

    def fetch(self) -> None:
        """Take S3's checkpoint where it is further than the one here, of an earlier try on this machine.

        Raises ConfigError when it is that of another job, StorageUnavailable when S3 does not answer.
        """
        if checkpoint.LAST not in storage.names(self._uri):
            return
        here = self._folder / checkpoint.FOLDER
        here.mkdir(parents=True, exist_ok=True)
        last = here / checkpoint.LAST
        with tempfile.TemporaryDirectory(dir=here) as folder:
            theirs = storage.download(storage.join(self._uri, checkpoint.LAST), Path(folder) / checkpoint.LAST)
            state = checkpoint.state_of(theirs, self._job, self._out)
            if last.is_file() and checkpoint.state_of(last, self._job, str(here)).step >= state.step:
                return
            if state.best_epoch:
                self._best = checkpoint.best_name(state.best_epoch)
                storage.download(storage.join(self._uri, self._best), Path(folder) / self._best).replace(
                    here / self._best
                )
            theirs.replace(last)

    def copy(self, best_epoch: int) -> None:
        """Copy the newest checkpoint; one that cannot be copied now is left to the next. best_epoch: 0 for none yet."""
        begin = time.monotonic()
        if begin < self._rest_until:
            return
        try:
            self._copy(checkpoint.best_name(best_epoch) if best_epoch else "")
        except StorageError as error:
            log.warning("checkpoint not copied, the next one is tried again: %s", error)
        else:
            end = time.monotonic()
            self._rest_until = end + (end - begin) * (1 / COPY_SHARE - 1)

    def deliver(self) -> None:
        """Upload the bundle, its manifest last, and leave nothing else there.

        Raises StorageUnavailable when S3 stays away; the next try finds the bundle here.
        """
        _patiently(self._upload)

    def _copy(self, best: str) -> None:
        here = self._folder / checkpoint.FOLDER
        if best != self._best:
            storage.upload(here / best, storage.join(self._uri, best))
            self._best = best
        storage.upload(here / checkpoint.LAST, storage.join(self._uri, checkpoint.LAST))
        self._remove({best, checkpoint.LAST})

    def _upload(self) -> None:
        for path in sorted(self._folder.rglob("*")):
            if path.is_file() and path.name != bundle.MANIFEST:
                storage.upload(path, storage.join(self._out, path.relative_to(self._folder).as_posix()))
        self._remove(set())
        storage.upload(self._folder / bundle.MANIFEST, storage.join(self._out, bundle.MANIFEST))

    def _remove(self, but: set[str]) -> None:
        for name in storage.names(self._uri):
            if name not in but:
                storage.remove(storage.join(self._uri, name))


def _patiently(call: Callable[[], None]) -> None:
    deadline, pause = time.monotonic() + DELIVERY_S, 1.0
    while True:
        try:
            return call()
        except StorageUnavailable as error:
            if time.monotonic() + pause > deadline:
                raise
            log.warning("bundle not uploaded, trying again for %.0f s: %s", deadline - time.monotonic(), error)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
