"""What can go wrong, as one tree.

    AdapterlineError            exit code 1
    ├── ConfigError             a parameter is unknown, missing or out of range
    ├── DataError               rows cannot be read, or are not what was declared
    │   ├── ValidationFailed    rows were read and did not meet an expectation of severity `error`
    │   └── LedgerMoved         another run had its data accepted meanwhile  (a retry can help)
    ├── BaseModelError          the base model is missing, incomplete, or not the pinned one
    ├── BundleError             a bundle is incomplete, changed, or made for something else
    ├── StorageError            a file, bucket or object cannot be reached
    │   └── StorageUnavailable  the server did not answer          (a retry can help)
    ├── TrainingError           a job could not train
    │   ├── OutOfMemory         the memory of its device did not suffice
    │   ├── JobKilled           its process, container or pod was killed (a retry resumes it)
    │   ├── JobCancelled        someone cancelled it
    │   └── ComputeError        nothing is there to run it, or that refuses it
    ├── RegistryError           a version could not be registered, or is not what was registered
    │   ├── RegistryUnavailable MLflow did not answer              (a retry can help)
    │   ├── ProductionMoved     production changed since the evidence was looked at
    │   └── HistoryError        the history of production lacks a record, or one was changed
    ├── ModelBusy               another run retrains the same model
    └── GateRejected            the gate did not pass; everything was measured and logged
        ├── GateFailed          exit code 2
        └── GateInconclusive    exit code 3

Every message is one line that says what was expected, what was found and what to do.
"""

from __future__ import annotations

import re
from typing import ClassVar


class AdapterlineError(Exception):
    """Root of the tree. `str()` is the line a person reads; it never holds text of a user's rows."""

    exit_code: ClassVar[int] = 1
    retry_can_help: ClassVar[bool] = False

    def __init__(self, expected: str, found: str, todo: str) -> None:
        super().__init__(expected, found, todo)
        self.expected, self.found, self.todo = expected, found, todo

    def __str__(self) -> str:
        return " ".join(f"expected {self.expected}; found {self.found}; {self.todo}".split())


class ConfigError(AdapterlineError):
    """A parameter is unknown, missing or out of range."""


class DataError(AdapterlineError):
    """Rows cannot be read, or are not what was declared."""


class ValidationFailed(DataError):
    """Rows were read and did not meet an expectation of severity `error`."""


class LedgerMoved(DataError):
    """Another run had its data accepted for the same model meanwhile."""

    retry_can_help = True


class BaseModelError(AdapterlineError):
    """The base model is missing, incomplete, or not the pinned one."""


class BundleError(AdapterlineError):
    """A bundle is incomplete, changed, or made for something else."""


class StorageError(AdapterlineError):
    """A file, bucket or object cannot be reached."""


class StorageUnavailable(StorageError):
    """The server did not answer."""

    retry_can_help = True


class TrainingError(AdapterlineError):
    """A job could not train."""


class OutOfMemory(TrainingError):
    """The memory of the job's device did not suffice; it will not the next time either."""


class JobKilled(TrainingError):
    """The job's process was killed; its checkpoints are there."""

    retry_can_help = True


class JobCancelled(TrainingError):
    """Someone cancelled the job; its checkpoints are there."""


class ComputeError(TrainingError):
    """Nothing is there to run the job, or that refuses it: no deployment, worker, image, GPU."""


class RegistryError(AdapterlineError):
    """A version could not be registered, or is not what was registered."""


class RegistryUnavailable(RegistryError):
    """MLflow did not answer."""

    retry_can_help = True


class ProductionMoved(RegistryError):
    """Production changed since the evidence was looked at."""


class HistoryError(RegistryError):
    """The history of production lacks a record, or one was changed."""


class ModelBusy(AdapterlineError):
    """Another run retrains the same model."""


class GateRejected(AdapterlineError):
    """The gate did not pass. Nothing was registered, everything was measured and logged."""


class GateFailed(GateRejected):
    """At least one rule failed."""

    exit_code = 2


class GateInconclusive(GateRejected):
    """No rule failed, but at least one could not be decided on this test part."""

    exit_code = 3


def from_line(name: str, line: str, otherwise: type[AdapterlineError]) -> AdapterlineError:
    """The error of that name that gave this line, in another process; `otherwise` when it was none of the tree."""
    kind = globals().get(name)
    parts = re.fullmatch(r"expected (.*?); found (.*); (.*)", line, re.DOTALL)
    if parts and isinstance(kind, type) and issubclass(kind, AdapterlineError):
        return kind(*parts.groups())
    return otherwise("the job to finish", f"its message: {line}", "correct that and run again: it resumes")
