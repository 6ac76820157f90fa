"""Random populations of versions, history, accepted data and jobs: exactly what nothing refers to is left over."""

from __future__ import annotations

import fcntl
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.config import RegistryConfig
from components.errors import HistoryError
from components.methods import Member
from components.registry import garbage, inventory, references
from components.registry.references import Registry, Run, Version
from components.registry.tracking import PARENT, connect, finish, start
from flows import sweeping
from tests.registry import populations as made
from tests.registry.populations import GRACE, NOW, OLD, sha

HOUR = 3600.0


def registry(versions: list[Version] = [], runs: list[Run] = [], models: dict[str, str] = {}) -> Registry:  # noqa: B006
    return Registry([], versions, {run.id: run for run in runs}, models)


def left_over(root: Path, known: Registry, running: set[str] = frozenset()) -> set[str]:  # type: ignore[assignment]
    """Places below `root`, which holds a store, a workspace and a cache."""
    store = str(root / "store")
    things = [
        *inventory.of_store(store),
        *inventory.of_workspace(root / "work"),
        *inventory.of_cache(root / "cache"),
    ]
    data, history = references.accepted(store), references.promotions(store)
    roots = references.roots(known, data.values(), history.values(), NOW) | running
    return {str(Path(each.place).relative_to(root)) for each in garbage.leftovers(things, roots, NOW - GRACE)}


class Population:
    """Builds things at random, and notes of each whether it must go or must stay."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.rng = root, random.Random(seed)  # noqa: S311  # not for secrets
        self.store, self.work, self.cache = root / "store", root / "work", root / "cache"
        self.versions: list[Version] = []
        self.runs: list[Run] = []
        self.running: set[str] = set()
        self.gone: set[str] = set()
        self.folders: dict[str, str] = {}
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"n{self.count}"

    def note(self, place: Path, goes: bool) -> None:
        if goes:
            self.gone.add(str(place.relative_to(self.root)))

    def when(self) -> float:
        """Mostly old."""
        return OLD if self.rng.random() < 0.8 else NOW - GRACE / 2

    def data(self, model: str) -> list[str]:
        """Splits of accepted data, and some that no record has."""
        splits = []
        for number in range(self.rng.randint(1, 3)):
            split, frozen = sha(self.name()), sha(self.name())
            made.make_split(self.store, split)
            made.write(self.store / "frozen" / f"{frozen}.parquet")
            made.accept(self.store, model, number + 1, split, frozen, sha(self.name()))
            splits.append(split)
        when, lost, frozen = self.when(), sha(self.name()), sha(self.name())
        self.note(made.make_split(self.store, lost, self.rng.random() < 0.5, when), when == OLD)
        self.note(made.write(self.store / "frozen" / f"{frozen}.parquet", when=when), when == OLD)
        return splits

    def baselines(self, splits: list[str]) -> None:
        """Of each split some; the newest on the newest split stays, in the workspace and in the store."""
        for area in (self.work, self.store):
            for split in splits:
                times = sorted(self.rng.sample(range(100), self.rng.randint(0, 3)))
                for time in times:
                    folder = area / "jobs" / made.job_name(self.name(), "full")
                    made.make_bundle(folder, folder.name, split, "full", when=OLD - time)
                    self.note(folder, split != splits[-1] or time != times[0])

    def adapter(self, model: str, split: str) -> Member:
        """A trained job, of which there may be a version or a record of one; a member of fusions, then."""
        name, fate = self.name(), self.rng.choice(("version", "recorded", "running", "on Prefect", "nothing"))
        folder = self.rng.choice((self.work, self.store)) / "jobs" / made.job_name(name)
        when = self.when()
        digest = made.make_bundle(folder, name, split, when=when)
        made.make_spec(folder.with_name(f"{folder.name}.spec.json"), name, split, when=when)
        if fate == "version":
            self.register(model, digest)
        elif fate == "recorded":
            made.promote(self.store, model, digest, sha(name)[:32])
        elif fate == "running":
            self.run(sha(name, "job"))
        elif fate == "on Prefect":
            self.running.add(f"job:{sha(name, 'job')[:16]}")
        self.note(folder, fate == "nothing" and when == OLD)
        self.folders[digest] = str(folder.relative_to(self.root))
        return Member(name=model, version="1", uri=f"{self.store}/bundles/{digest}", digest=digest)

    def fusion(self, model: str, split: str, members: list[Member]) -> None:
        """Its members' bundles stay as long as it does, or they are versions themselves, wherever they lie."""
        name, fate = self.name(), self.rng.choice(("version", "running", "training", "nothing"))
        folder = self.work / "jobs" / made.job_name(name, "fusion")
        if fate == "training":
            made.make_spec(folder.with_name(f"{folder.name}.spec.json"), name, split, members)
            made.write(folder / "checkpoint" / "last.safetensors")
            self.run(sha(name, "job"))
        else:
            digest = made.make_bundle(folder, name, split, "fusion", members)
            if fate == "version":
                self.register(model, digest)
            elif fate == "running":
                self.run(sha(name, "job"))
        self.note(folder, fate == "nothing")
        named = {version.tags["bundle_digest"] for version in self.versions}
        history = {json.loads(path.read_text())["bundle_digest"] for path in self.store.glob("history/*/*.json")}
        for member in members:
            if fate != "nothing":
                self.gone.discard(self.folders[member.digest])
            for place in (self.store / "bundles", self.cache / "bundles"):
                made.make_bundle(place / member.digest, f"copy of {member.digest}", split)
                self.note(place / member.digest, fate == "nothing" and member.digest not in named | history)

    def broken_off(self) -> None:
        """Checkpoints of jobs that were killed, in all three places; one process still has its lock."""
        for area in (self.work, self.store, self.cache):
            name, when = self.name(), self.when()
            folder = area / "jobs" / (sha(name, "job") if area == self.cache else made.job_name(name))
            made.write(folder / "checkpoint" / "last.safetensors", when=when)
            if self.rng.random() < 0.3:
                self.run(sha(name, "job"))
            else:
                self.note(folder, when == OLD)

    def copies(self) -> None:
        """Rows and reports, of runs that live, of versions, and of nobody."""
        for fate in ("version", "running", "nothing"):
            rows, run = sha(self.name()), sha(self.name())
            paths = made.write(self.work / "rows" / f"{rows}.parquet"), self.work / "reports" / run[:16]
            made.write(paths[1] / "data.html")
            if fate == "version":
                self.register("copies", sha(self.name()), data_digest=rows, run_digest=run)
            elif fate == "running":
                self.runs.append(
                    Run(sha(run)[:32], False, "RUNNING", NOW, {"data_digest": rows, "run_digest": run}, 12)
                )
            for path in paths:
                self.note(path, fate == "nothing")

    def run(self, job: str) -> None:
        """A job of a retrain that has not ended; the job itself may have."""
        parent = Run(sha(job, "parent")[:32], False, "RUNNING", NOW - HOUR, {}, 12)
        status = self.rng.choice(("RUNNING", "FINISHED"))
        tags = {"job_digest": job, PARENT: parent.id}
        self.runs += [parent, Run(sha(job, "run")[:32], False, status, NOW - HOUR, tags)]

    def register(self, model: str, digest: str, **tags: str) -> None:
        number = str(len(self.versions) + 1)
        self.versions.append(
            Version(model, number, "models:/m-" + sha(digest)[:32], "", {"bundle_digest": digest, **tags})
        )


@pytest.mark.parametrize("seed", range(25))
def test_exactly_what_nothing_refers_to_is_left_over(seed: int, tmp_path: Path) -> None:
    there = Population(tmp_path, seed)
    for model in ("tickets", "tweets"):
        splits = there.data(model)
        there.baselines(splits)
        members = [there.adapter(model, there.rng.choice(splits)) for _ in range(5)]
        there.fusion(f"{model}-fused", splits[-1], members[:2])
    there.broken_off()
    there.copies()
    assert there.gone
    assert left_over(tmp_path, registry(there.versions, there.runs), there.running) == there.gone


def test_members_stay_while_a_version_of_the_fusion_stands(tmp_path: Path) -> None:
    """Though the members' own versions are deleted."""
    member = Member(name="one", version="1", uri="", digest=sha("one"))
    made.make_bundle(tmp_path / "store" / "bundles" / member.digest, "one", sha("split"))
    digest = made.make_bundle(
        tmp_path / "work/jobs" / made.job_name("f", "fusion"), "f", sha("split"), "fusion", [member]
    )
    assert left_over(tmp_path, registry([Version("f", "1", "", "", {"bundle_digest": digest})])) == set()
    assert f"store/bundles/{member.digest}" in left_over(tmp_path, registry())


def test_a_run_that_was_killed_does_not_hold_its_jobs_for_ever(tmp_path: Path) -> None:
    """MLflow says of it for ever that it is running."""
    made.write(tmp_path / "work/jobs" / made.job_name("a") / "checkpoint/last.safetensors")

    def runs(started: float) -> list[Run]:
        parent = Run("1" * 32, False, "RUNNING", started, {}, timeout_hours=1)
        return [parent, Run("2" * 32, False, "RUNNING", started, {"job_digest": sha("a", "job"), PARENT: parent.id})]

    assert left_over(tmp_path, registry(runs=runs(NOW - 29 * HOUR))) == set()
    assert left_over(tmp_path, registry(runs=runs(NOW - 31 * HOUR))) == {f"work/jobs/{made.job_name('a')}"}


def test_a_sweep_holds_all_its_jobs_until_it_ends(tmp_path: Path) -> None:
    """In MLflow as a sweep leaves them there; more than one tag can list."""
    there = connect(RegistryConfig(store=str(tmp_path), tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"))
    specs = {seed: SimpleNamespace(digest=sha(str(seed))) for seed in range(1000)}
    run = start(there, "sweep", {})
    sweeping.hold({"variant": specs}, SimpleNamespace(tracking=there, id=run))  # type: ignore[dict-item, arg-type]

    def held() -> int:
        roots = references.roots(references.ask(there.uri), [], [], NOW)
        return len({f"job:{spec.digest[:16]}" for spec in specs.values()} & roots)

    assert held() == 1000
    finish(there, run)
    assert held() == 0


@pytest.mark.parametrize("area", ["work", "cache"])
def test_a_job_whose_lock_is_held_stays(area: str, tmp_path: Path) -> None:
    name = sha("a", "job") if area == "cache" else made.job_name("a")
    made.write(tmp_path / area / "jobs" / name / "checkpoint/last.safetensors")
    with made.write(tmp_path / area / "jobs" / f"{name}.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert left_over(tmp_path, registry()) == set()
    assert left_over(tmp_path, registry()) == {f"{area}/jobs/{name}"}


def test_a_bundle_that_cannot_be_read_stays(tmp_path: Path) -> None:
    made.write(tmp_path / "work/jobs" / made.job_name("a") / "manifest.json", '{"format": 2}')
    assert left_over(tmp_path, registry()) == set()


def test_each_base_keeps_its_newest_baseline(tmp_path: Path) -> None:
    split = sha("split")
    made.accept(tmp_path / "store", "model", 1, split, sha("frozen"), sha("rows"))
    for number, base in enumerate(("minilm", "minilm", "mpnet")):
        folder = tmp_path / "work/jobs" / made.job_name(str(number), "full")
        made.make_bundle(folder, str(number), split, "full", base=base, when=OLD + number)
    assert left_over(tmp_path, registry()) == {f"work/jobs/{made.job_name('0', 'full')}"}


def test_names_that_the_flows_do_not_give_are_never_listed(tmp_path: Path) -> None:
    for name in ("jobs/mine/manifest.json", "jobs/notes.txt", "rows/mine.parquet", "reports/mine/a.html", "model.bin"):
        made.write(tmp_path / "work" / name)
        made.write(tmp_path / "store" / name)
    made.write(tmp_path / "store/data/tickets.csv")
    made.write(tmp_path / "cache/models/mine/model.safetensors")
    assert left_over(tmp_path, registry()) == set()


def test_ledger_history_and_claims_are_never_listed(tmp_path: Path) -> None:
    made.accept(tmp_path / "store", "model", 1, sha("split"), sha("frozen"), sha("rows"))
    made.promote(tmp_path / "store", "model")
    made.write(tmp_path / "store/registries/0123456789abcdef.json")
    assert left_over(tmp_path, registry()) == set()


def test_bases_stay_that_the_code_or_a_version_names(tmp_path: Path) -> None:
    from components import base_model, digest

    archive, _ = base_model.EMBEDDED["minilm"]
    for name in (f"minilm-{archive.sha256[:12]}", "older-0123456789ab", "oldest-0123456789ab"):
        for file in ("config.json", "model.safetensors"):
            made.write(tmp_path / "cache/models" / name / file, name)
    older = tmp_path / "cache/models/older-0123456789ab"
    weights = digest.of_files([older / "config.json", older / "model.safetensors"])
    known = registry([Version("a", "1", "", "", {"base_weights_sha256": weights})])
    made.write(tmp_path / "cache/pypi" / archive.filename)
    made.write(tmp_path / "cache/pypi/older-0.1.whl")
    assert left_over(tmp_path, known) == {"cache/models/oldest-0123456789ab", "cache/pypi/older-0.1.whl"}


def test_what_killed_writers_left_is_listed(tmp_path: Path) -> None:
    places = ("store/splits/.unfinished-abc", "cache/models/tmpab12cd34")
    for place in places:
        made.write(tmp_path / place / "part")
        made.aged(tmp_path / place)
    made.write(tmp_path / "store/splits/.unfinished-new/part", when=NOW)
    made.write(tmp_path / "cache/trunk/tmpab12cd34.new")
    assert left_over(tmp_path, registry()) == {*places, "cache/trunk/tmpab12cd34.new"}


def test_tokens_that_nobody_read_of_late_are_listed(tmp_path: Path) -> None:
    made.write(tmp_path / f"cache/tokens/{sha('old')}.arrow")
    made.write(tmp_path / f"cache/tokens/{sha('new')}.arrow", when=NOW)
    assert left_over(tmp_path, registry()) == {f"cache/tokens/{sha('old')}.arrow"}


def test_trunks_that_nobody_read_of_late_are_listed(tmp_path: Path) -> None:
    made.write(tmp_path / f"cache/trunk/{sha('old')}.states")
    made.write(tmp_path / f"cache/trunk/{sha('old')}.lock")
    made.write(tmp_path / f"cache/trunk/{sha('new')}.states", when=NOW)
    assert left_over(tmp_path, registry()) == {f"cache/trunk/{sha('old')}.states"}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"run": null}'])
def test_a_history_that_cannot_be_read_stops_everything(content: str, tmp_path: Path) -> None:
    made.write(tmp_path / "store/history/model/000001.json", content)
    with pytest.raises(HistoryError, match="history"):
        left_over(tmp_path, registry())


def test_the_keys_of_a_version_name_all_that_it_was_made_of() -> None:
    tags: dict[str, Any] = {
        "bundle_digest": "b", "split_digest": "s", "split_uri": "s3://x/splits/t", "data_digest": "d",
        "gate_run": "g", "run_digest": "0123456789abcdef0123", "base_weights_sha256": "w",
    }  # fmt: skip
    model = "m-" + "a" * 32
    found = references.roots(registry([Version("n", "1", f"models:/{model}", "r", tags)]), [], [], NOW)
    wanted = {"bundle:b", "split:s", "split:t", "rows:d", "run:g", "run:r", "report:0123456789abcdef", "base:w"}
    assert wanted | {f"logged model:{model}"} <= found
