"""Training in containers on a real engine, through the real stack: what goes well, and what may happen to it."""

from __future__ import annotations

import contextvars
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import psutil
import pytest
from prefect.client.schemas.sorting import FlowRunSort

from components import storage
from components.config import RegistryConfig
from components.errors import ComputeError, JobCancelled, OutOfMemory, StorageUnavailable, TrainingError
from components.registry import bundle, tracking, versions
from components.training.progress import Event
from flows import elsewhere
from tests.conftest import make_base
from tests.container.running import STORE, Running, running, until

# Epochs of a job that is still at work when it is heard of, something happens to it, and that is heard of, too.
LONG = 400

pytestmark = [pytest.mark.container, pytest.mark.slow, pytest.mark.xdist_group("container")]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, engine: docker.DockerClient, image: str) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("containers")
    base = make_base(tmp_path_factory.mktemp("base"))
    for path in (base, *base.iterdir()):  # the container's user is another
        path.chmod(path.stat().st_mode | 0o555)
    with running(folder, engine, base) as found:
        yield found


class Disturbed:
    """Does something once, when the job has finished an epoch. Remembers how the progress went."""

    def __init__(self, act: Any) -> None:
        self._act: Any = act
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if self._act and event.epoch > 1:
            act, self._act = self._act, None
            act()


def only_container(stack: Running) -> Any:
    (found,) = stack.containers()
    return found


def ended(stack: Running) -> bool:
    return not stack.containers(every=True)


def test_a_retrain_with_both_jobs_in_containers_registers_a_version(stack: Running) -> None:
    config = stack.config("nightly", seed=0)
    parameters = {"preset": None, "config": json.loads(config.model_dump_json()), "overrides": {}}
    words = [f"-p{name}={json.dumps(value)}" for name, value in parameters.items()]
    done = stack.command("prefect", "deployment", "run", "retrain/nightly", *words, "--watch")
    assert done.returncode == 0, _why(stack)
    there = tracking.connect(RegistryConfig())
    version = versions.with_alias(there, "nightly", versions.CANDIDATE)
    assert version is not None

    def told() -> bool:
        with stack.client() as client:
            logs = client.read_logs(None, limit=200)
        return any("pfeiffer |" in line.message and "validation accuracy" in line.message for line in logs)

    until(told, "what the job in its container told is in the log")
    until(lambda: ended(stack), "finished containers are removed")


def _why(stack: Running) -> str:
    """What the newest run that did not complete says."""
    with stack.client() as client:
        runs = client.read_flow_runs(limit=5, sort=FlowRunSort.EXPECTED_START_TIME_DESC)
    return "; ".join(f"{run.name}: {run.state.message}" for run in runs if run.state and run.state.is_final())


@pytest.mark.fault("kill -9 of a training container", "told as such; tried again, from the last checkpoint in S3")
def test_a_killed_container_is_told_apart_and_its_job_resumes(stack: Running) -> None:
    config = stack.config("killed")
    job = stack.spec(config, epochs=LONG)
    with pytest.raises(elsewhere.JobKilled, match="status 137"):
        stack.follow(config, job, Disturbed(lambda: only_container(stack).kill()))
    until(lambda: ended(stack), "the killed container is removed")
    assert not storage.exists(f"{STORE}/jobs/pfeiffer-{job.digest[:16]}/{bundle.MANIFEST}")
    resumed = Disturbed(None)
    out = stack.follow(config, job, resumed)
    assert resumed.events[0].epoch > 1, "it went on from the checkpoint in S3"
    assert bundle.read_manifest(out).job_digest == job.digest


@pytest.mark.fault("a container reaches its memory limit", "told as such, not tried again")
def test_reaching_the_memory_limit_is_no_mere_kill(stack: Running) -> None:
    config = stack.config("memory", memory="300m")
    with pytest.raises(OutOfMemory, match="memory"):
        stack.follow(config, stack.spec(config))
    until(lambda: ended(stack), "the container is removed")


def test_interrupting_the_flow_cancels_its_container(stack: Running) -> None:
    config = stack.config("interrupted")
    job = stack.spec(config, epochs=500)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stack.follow(config, job, Disturbed(interrupt))
    until(lambda: ended(stack), "the cancelled container is removed")
    assert [run.state_name for run in stack.runs(job)] == ["Cancelled"]


def test_cancelling_the_parent_run_cancels_both_containers(stack: Running) -> None:
    config = stack.config("parent")
    schedule = {"adapter.schedule.epochs": 500, "adapter.schedule.patience": 500, "baseline.schedule.epochs": 500,
                "baseline.schedule.patience": 500}  # fmt: skip
    with stack.client() as client:
        deployment = client.read_deployment_by_name("retrain/nightly")
        run = client.create_flow_run_from_deployment(
            deployment.id,
            parameters={"preset": None, "config": json.loads(config.model_dump_json()), "overrides": schedule},
        )
        until(lambda: len(stack.containers()) == 2, "both jobs run in containers", 240)
        cancelled = stack.command("prefect", "flow-run", "cancel", str(run.id))
        assert cancelled.returncode == 0, cancelled.stderr
        until(lambda: client.read_flow_run(run.id).state_name == "Cancelled", "the parent is cancelled", 180)
    until(lambda: ended(stack), "both containers are removed", 180)
    there = tracking.connect(RegistryConfig())
    assert versions.with_alias(there, "parent", versions.CANDIDATE) is None


def test_a_cancelled_job_is_not_tried_again(stack: Running) -> None:
    config = stack.config("cancelled")
    job = stack.spec(config, epochs=500)

    def cancel() -> None:
        stack.command("prefect", "flow-run", "cancel", str(stack.runs(job)[0].id))

    with pytest.raises(JobCancelled) as caught:
        stack.follow(config, job, Disturbed(cancel))
    assert not caught.value.retry_can_help


def test_a_missing_image_is_named(stack: Running) -> None:
    config = stack.config("image", image="adapterline:none", image_pull_policy="Never")
    with pytest.raises(ComputeError, match=r"no such image there.*adapterline:none"):
        stack.follow(config, stack.spec(config))


def _has_gpu(stack: Running) -> bool:
    gpu = docker.types.DeviceRequest(count=1, capabilities=[["gpu"]])
    container = stack.engine.containers.create("adapterline:cpu", "true", network_mode="none", device_requests=[gpu])
    try:
        container.start()
    except docker.errors.APIError:
        return False
    finally:
        container.remove(force=True)
    return True


def test_a_missing_gpu_is_told_in_words(stack: Running) -> None:
    if _has_gpu(stack):
        pytest.skip("this engine has a GPU")
    config = stack.config("gpu", image="adapterline:cpu")
    compute = config.compute.model_copy(update={"deployment": "train/gpu"})
    config = config.model_copy(update={"compute": compute})
    with pytest.raises(ComputeError, match="no GPU driver for containers"):
        stack.follow(config, stack.spec(config))
    until(lambda: ended(stack), "the container that could not start is removed")


@pytest.mark.fault("a container cannot reach S3", "one line that names the address")
def test_a_container_that_cannot_reach_the_store_says_so(stack: Running) -> None:
    config = stack.config("away", env={"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"})
    with pytest.raises(StorageUnavailable, match="an S3 server that answers"):
        stack.follow(config, stack.spec(config))


def test_a_wrong_spec_is_refused(stack: Running) -> None:
    config = stack.config("wrong")
    job = stack.spec(config).model_copy(update={"code": "0" * 64})
    with pytest.raises(TrainingError, match=r"code version") as caught:
        stack.follow(config, job)
    assert not caught.value.retry_can_help


def part(stack: Running, name: str) -> psutil.Process:
    """The process of one part of the stack."""
    from infra import processes

    (found,) = (
        each.process
        for each in processes.marked(stack.variables["ADAPTERLINE_STACK_ID"])
        if each.part == name and each.run is None and each.process.ppid() != 1 and _is_first(each.process)
    )
    return found


def _is_first(process: psutil.Process) -> bool:
    parent = process.parent()
    return parent is not None and "supervisord" in " ".join(parent.cmdline())


@pytest.mark.parametrize("name", ["worker-docker", "prefect"])
@pytest.mark.fault(
    "kill -9 of the Prefect server or the worker of a training container",
    "the container goes on, the retrain hears of its end",
)
def test_a_job_survives_the_death_of(stack: Running, name: str) -> None:
    config = stack.config(f"without-{name}")
    job = stack.spec(config, epochs=LONG)
    disturbed = Disturbed(lambda: part(stack, name).send_signal(signal.SIGKILL))
    out = stack.follow(config, job, disturbed)
    assert disturbed.events[-1].epoch >= 2
    assert bundle.read_manifest(out).job_digest == job.digest
    until(lambda: ended(stack), "its container is removed by the next worker")


@pytest.mark.fault("kill -9 of a container while no worker watches", "found when the worker is back")
def test_a_container_that_dies_while_no_worker_watches_is_found(stack: Running) -> None:
    config = stack.config("unwatched")
    job = stack.spec(config, epochs=500)

    def kill_both() -> None:
        part(stack, "worker-docker").send_signal(signal.SIGKILL)
        only_container(stack).kill()

    with pytest.raises(elsewhere.JobKilled):
        stack.follow(config, job, Disturbed(kill_both))
    until(lambda: ended(stack), "the next worker removes it")


def test_a_second_follower_goes_on_with_the_run_that_is_there(stack: Running) -> None:
    config = stack.config("shared")
    job = stack.spec(config, epochs=LONG)
    outs: list[Path] = []
    here = contextvars.copy_context()  # with the address of the server
    other = threading.Thread(target=here.run, args=(lambda: outs.append(stack.follow(config, job)),))
    first = Disturbed(other.start)
    outs.append(stack.follow(config, job, first))
    other.join()
    assert len(stack.runs(job)) == 1
    assert outs[0] == outs[1]
