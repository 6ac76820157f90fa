"""One training, from a job spec to a bundle: the same entry point in a subprocess, a container or a pod.

    python -m components.training.job SPEC OUT [--progress json] [--debug]
    accelerate launch --multi_gpu --num_processes 2 -m components.training.job SPEC OUT
    torchrun --nproc-per-node 2 -m components.training.job SPEC OUT

SPEC is a JSON file or s3:// object, OUT a folder or s3:// prefix. Run again with the same spec it resumes, or finds
the finished bundle and returns at once. Exit code 0, or 1 with one line on standard error. Several processes train the
same bundle together, and the first one writes it.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import cache, digest, disk, storage
from components.errors import AdapterlineError, ConfigError, StorageError
from components.methods import members_of
from components.registry import bundle
from components.training import distributed, memory, progress
from components.training.distributed import ALONE, Group
from components.training.material import Shelf
from components.training.spec import JobSpec, code_version, parse

if TYPE_CHECKING:
    import torch
    from torch import nn

    from components.base_model import BaseModel
    from components.training.mirror import Mirror
    from components.training.passes import Means


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m components.training.job", description="Train one bundle.")
    parser.add_argument("spec", help="JSON job spec: file or s3:// object")
    parser.add_argument("out", help="where the bundle goes: folder or s3:// prefix")
    parser.add_argument("--progress", choices=("bar", "json"), default="bar")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    memory.collect_rarely()
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # of libraries to one another
    group, bar = distributed.ALONE, None
    try:
        group = distributed.from_environment()
        spec = parse(storage.read(options.spec))
        bar = progress.Bar() if options.progress == "bar" and group.is_main else None
        told = progress.notes() if options.progress == "json" and group.is_main else nullcontext()
        with group.joined(spec.limits.device, spec.digest), told:
            manifest = run(spec, options.out, bar or progress.json_lines, group)
    except AdapterlineError as error:
        if options.debug:
            raise
        group.say(error, str(error))
        return error.exit_code
    except Exception as error:  # of a library: its message might quote a row, its name does not
        if options.debug:
            raise
        known = disk.full(error)
        group.say(
            error, str(known or f"unexpected {type(error).__name__}; run the job again with --debug to see where")
        )
        return 1
    finally:
        if bar:
            bar.close()
    if group.is_main:
        print(f"{options.out}: {manifest.bytes / 1e6:.2f} MB, {manifest.trained_share:.2%} trained", file=sys.stderr)
    return 0


def run(
    spec: JobSpec, out: str, report: progress.Progress, group: Group = ALONE, shelf: Shelf | None = None
) -> bundle.Manifest:
    """Train `spec` and leave its bundle at `out`; returns at once when it is there.

    shelf: of several jobs of this process, with what they have read so far.
    """
    shelf = shelf or Shelf()
    folder = cache.folder() / "jobs" / spec.digest if storage.is_s3(out) else Path(out)
    with memory.watched(spec.training, spec.limits.device), _alone_in(folder, group):
        if manifest := group.from_main(lambda: _found(spec, out)):
            return manifest
        device = distributed.find_device(spec.limits.device, group)  # before anything is fetched or imported
        if not storage.is_s3(out):
            return _learn(spec, folder, report, group, device, shelf)
        from components.training.mirror import Mirror

        mirror = Mirror(spec.digest, folder, out) if group.is_main else None
        manifest = group.from_main(lambda: _found(spec, str(folder)))  # of a try that could not deliver it
        manifest = manifest or _learn(spec, folder, report, group, device, shelf, mirror)
        if mirror:
            mirror.deliver()
            shutil.rmtree(folder)
        return manifest


def _found(spec: JobSpec, out: str) -> bundle.Manifest | None:
    """The manifest of the bundle at `out`, None when there is none. Raises ConfigError when it is another job's."""
    if not storage.exists(storage.join(out, bundle.MANIFEST)):
        return None
    with tempfile.TemporaryDirectory() as folder:
        there = storage.download_folder(out, Path(folder))
        shutil.rmtree(there / bundle.CHECKPOINT, ignore_errors=True)  # of this job, killed when it had just finished
        manifest = bundle.read_manifest(there)
    if manifest.job_digest != spec.digest:
        raise ConfigError(
            f"the bundle of job {spec.digest[:12]} at {out}",
            f"that of {manifest.job_digest[:12]}",
            "name another folder",
        )
    return manifest


@contextmanager
def _alone_in(folder: Path, group: Group) -> Iterator[None]:
    """A second job with this spec on this machine waits, and then finds the bundle."""
    if not group.is_main:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _learn(
    spec: JobSpec,
    out: Path,
    report: progress.Progress,
    group: Group,
    device: torch.device,
    shelf: Shelf,
    mirror: Mirror | None = None,
) -> bundle.Manifest:
    if spec.code != code_version():
        raise ConfigError(
            f"code version {spec.code[:12]}", code_version()[:12], "run the job with the code that wrote its spec"
        )
    memory.spare()
    memory.forget_peak(device)
    import torch

    from components.training import checkpoint, finishing, loop

    if group.is_main:
        out.mkdir(parents=True, exist_ok=True)
    if mirror:
        mirror.fetch()
    torch.set_num_threads(spec.limits.threads or max(1, len(os.sched_getaffinity(0)) // group.local_size))
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Each new tensor would be filled before it is written: 5 to 10 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch hides it
    material = shelf.material(spec, group)
    parts, tokens, padding = material.parts, material.tokens, material.padding
    torch.manual_seed(spec.seed)  # before head and adapter are drawn
    model, frozen = _model(spec, material.base, device)
    learner = loop.learner(model, spec.schedule, spec.training, len(parts["train"]), device, group)

    def keep(state: loop.State, best: bool) -> None:
        if group.is_main:
            checkpoint.save(out, spec.digest, learner, state, best)
        if mirror:
            mirror.copy(state.best_epoch)

    state = loop.fit(
        learner,
        tokens["train"],
        tokens["validation"],
        spec.schedule,
        spec.training,
        spec.seed,
        padding,
        checkpoint.resume(out, spec.digest, learner),
        _logging(report) if group.is_main else progress.nowhere,
        keep,
        _means(spec),
    )
    checkpoint.load_best(out, learner, state.best_epoch)
    trained = sum(parameter.numel() for parameter in learner.trained.values())
    beside = finishing.finish(spec, model, tokens, padding, device)
    probabilities = loop.predict(model, tokens["test"], padding, device, group)
    predictions = bundle.Predictions(parts["test"]["row"][:], tokens["test"].labels, probabilities)

    def finish() -> bundle.Manifest:
        measured = {**_metrics(spec, state, tokens, predictions, trained, device), **beside}
        _write(out, spec, model, predictions, measured)
        manifest = bundle.write_manifest(
            out,
            method=spec.method,
            job_digest=spec.digest,
            data_uri=spec.data.uri,
            data_digest=spec.data.digest,
            code=spec.code,
            seed=spec.seed,
            base=spec.base,
            members=members_of(spec.settings),
            labels=spec.labels,
            max_tokens=spec.training.max_tokens,
            trained_parameters=trained,
            total_parameters=frozen + trained,
        )
        checkpoint.clear(out)  # last: killed before, the job is trained, or its training is there to go on from
        return manifest

    return group.from_main(finish)


def _means(spec: JobSpec) -> Means:
    from components.training.passes import Means
    from components.training.trunk_cache import TrunkCache

    limit = int(spec.limits.trunk_cache_gb * 1e9)
    try:
        kept = TrunkCache(cache.folder(), limit) if limit else None
    except StorageError:  # in a container without one, say
        kept = None
    frozen = [spec.base.weights_sha256, *(member.digest for member in members_of(spec.settings))]
    return Means(kept, digest.of_json(frozen), spec.limits.compile, spec.limits.tokens_at_once)


def _model(spec: JobSpec, base: BaseModel, device: torch.device) -> tuple[nn.Module, int]:
    """The model to train, and how many parameters stay frozen beside the trained ones."""
    from components import base_model
    from components.adapters.methods import peft_config
    from components.adapters.parameters import own_modules
    from components.adapters.places import positions
    from components.registry.members import adapted

    model, head = base_model.load_classifier(base, spec.labels)
    longest = positions(model.config)
    if spec.training.max_tokens > longest:
        raise ConfigError(
            f"training.max_tokens of at most {longest}", f"{spec.training.max_tokens}", "the base reads no more"
        )
    frozen = sum(parameter.numel() for parameter in model.base_model.parameters())
    if spec.method == "full":
        return model.to(device), 0
    members = members_of(spec.settings)
    config = peft_config(spec.method, spec.settings, list(head), model)
    model = adapted(model, config, members, spec.base).to(device)
    if members:
        parameters = [each for module in own_modules(model) for each in module.parameters()]
        frozen += sum(parameter.numel() for parameter in parameters if not parameter.requires_grad)
    return model, frozen


def _metrics(
    spec: JobSpec,
    state: Any,
    tokens: dict[str, Any],
    predictions: bundle.Predictions,
    trained: int,
    device: torch.device,
) -> dict[str, Any]:
    from components.evaluation import metrics

    train = tokens["train"]
    return {
        "test": metrics.measure(predictions.labels, predictions.probabilities),
        "history": state.history,
        "best_epoch": state.best_epoch,
        "epochs": state.epoch,
        "trained_parameters": trained,
        "training_seconds": round(state.seconds, 3),
        "tokens_per_second": round(state.tokens / state.seconds, 1),
        "cpu_seconds": round(state.cpu_seconds, 3),
        "cache_seconds": round(state.cache_seconds, 3),
        "peak_memory_bytes": memory.peak(device),
        **_cut(train, spec.labels),
        "device": device.type,
    }


def _cut(train: Any, labels: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """What truncation did to each class: the share of its texts that were cut, and of its tokens that this took."""
    shares: dict[str, dict[str, float]] = {"cut_share_per_class": {}, "cut_token_share_per_class": {}}
    for code, name in enumerate(labels):
        mine = train.labels == code
        gone = train.cut[mine]
        shares["cut_share_per_class"][name] = float((gone > 0).mean())
        shares["cut_token_share_per_class"][name] = float(gone.sum() / (gone.sum() + train.lengths[mine].sum()))
    return shares


def _write(
    out: Path, spec: JobSpec, model: nn.Module, predictions: bundle.Predictions, measured: dict[str, Any]
) -> None:
    import json

    bundle.save_model(out, model, spec.base)
    bundle.write_predictions(out, predictions)
    (out / "job.json").write_text(spec.model_dump_json(indent=2))
    (out / "metrics.json").write_text(json.dumps(measured, indent=2))


def _logging(report: progress.Progress) -> progress.Progress:
    """Also send the metrics of each epoch to the MLflow run named by the environment, if one is."""
    from components.registry.tracking import EpochLog

    log = EpochLog.from_environment()
    if log is None:
        return report

    def both(event: progress.Event) -> None:
        report(event)
        if event.metrics is not None:
            log(event.step, event.metrics)

    return both


if __name__ == "__main__":
    sys.exit(main())
