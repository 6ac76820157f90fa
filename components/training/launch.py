"""Starts a job on this machine, in as many processes as its spec wants.

    python -m components.training.launch ARGUMENTS OF accelerate launch

is `accelerate launch` for the processes of one machine, which meet on the loopback interface, at a port that the
system chooses. A failure leaves the job's own line, not pages of the launcher's; a process that a signal ended gives
the exit code 128 + its number, as in a shell.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from components.training.spec import JobSpec

JOB = "components.training.job"


def command(spec: JobSpec, spec_uri: str, out: str) -> list[str]:
    """What to run for a job whose progress is followed; `spec` is what lies at `spec_uri`."""
    job = [JOB, spec_uri, out, "--progress", "json"]
    if spec.limits.processes == 1:
        return [sys.executable, "-m", *job]
    settings = {
        "num_processes": spec.limits.processes,
        "num_machines": 1,
        "num_cpu_threads_per_process": spec.limits.threads,
        "main_process_port": 0,
        "mixed_precision": "no",  # the job's own setting decides
        "dynamo_backend": "no",
    }
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    # Without --multi_gpu accelerate starts one process where it sees no GPU; with it, as many as told.
    return [sys.executable, "-m", "components.training.launch", "--multi_gpu", *options, "--module", *job]


def main(arguments: list[str] | None = None) -> int:
    from accelerate.commands.launch import (  # type: ignore[import-untyped]
        launch_command,
        launch_command_parser,
    )
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = launch_command_parser().parse_args(arguments)
    options.standalone = True  # torchrun's word for one machine and a free port
    options.local_addr = "127.0.0.1"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    logging.getLogger("torch").setLevel(logging.CRITICAL + 1)
    try:
        launch_command(options)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return _code(failure.exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _code(code: int) -> int:
    """The exit code of the process that failed first; one that was killed could not say so."""
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    sys.stderr.write(f"expected every process of the job to finish; found one ended by {name}; run again: it resumes\n")
    return 128 - code


if __name__ == "__main__":
    sys.exit(main())
