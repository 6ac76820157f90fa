"""Many trainings in one process: the same bundles as apart, what they share read once, failures their own."""

from __future__ import annotations

import os
import subprocess
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from components import forks
from components.config import LearningRates, Schedule
from components.errors import ConfigError
from components.methods import settings_of
from components.registry import bundle
from components.training import job, material, progress, sweep
from components.training.progress import Event
from components.training.spec import DataRef, JobSpec, Limits
from components.training.sweep import Errand, News
from components.training.trunk import Trunk
from tests.training.toy_jobs import silent, toy_spec

LIMITS = Limits(threads=1, device="cpu", trunk_cache_gb=1)
LATE = settings_of("pfeiffer", reduction_factor=2, leave_out=(0,))
WIDE = settings_of("pfeiffer", reduction_factor=4)
# Three cuts for four jobs of bottlenecks, one for LoRA; prefixes and full fine-tuning go through the whole model.
TRIED: dict[str, dict[str, Any]] = {
    "pfeiffer": {"method": "pfeiffer"},
    "pfeiffer-wide": {"method": "pfeiffer", "settings": WIDE, "seed": 2},
    "pfeiffer-late": {"method": "pfeiffer", "settings": LATE},
    "parallel": {"method": "parallel"},
    "masked": {"method": "masked"},
    "lora": {"method": "lora"},
    "prefix": {"method": "prefix"},
    "bitfit": {"method": "bitfit"},
    "full": {"method": "full"},
}


def unheard(news: News) -> None:
    """For a sweep whose news do not matter."""


def specs(base: Path, data: DataRef, epochs: int = 2) -> dict[str, JobSpec]:
    made = {}
    for name, changes in TRIED.items():
        rest = {key: value for key, value in changes.items() if key != "method"}
        made[name] = toy_spec(base, data, changes["method"], epochs, limits=LIMITS, **rest)
    return made


def errands(some: dict[str, JobSpec], out: Path) -> list[Errand]:
    return [Errand(spec=spec, out=str(out / name)) for name, spec in some.items()]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTERLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def both(lively_base: Path, data: DataRef, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every job in the folder `together` of one sweep, and in `apart`, each with a cache of its own."""
    root = tmp_path_factory.mktemp("both")
    tried = specs(lively_base, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTERLINE_CACHE", str(root / "cache"))
        sweep.run(errands(tried, root / "together"), unheard)
        for name, spec in tried.items():
            patch.setenv("ADAPTERLINE_CACHE", str(root / f"cache-{name}"))
            job.run(spec, str(root / "apart" / name), silent)
    return root


@pytest.mark.parametrize("name", TRIED)
def test_bundles_are_those_of_separate_jobs(both: Path, name: str) -> None:
    together, apart = both / "together" / name, both / "apart" / name
    found, wanted = bundle.read_predictions(together), bundle.read_predictions(apart)
    assert found.rows == wanted.rows
    np.testing.assert_allclose(found.probabilities, wanted.probabilities, rtol=0, atol=1e-6)
    weights = next(apart.glob("*.safetensors")).name
    ours, theirs = load_file(together / weights), load_file(apart / weights)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        # Adam makes more of how a sum was rounded, which where memory lies decides.
        np.testing.assert_allclose(ours[key], value, rtol=0, atol=1e-4, err_msg=key)


def test_jobs_of_a_sweep_are_unlike(both: Path) -> None:
    """Else their being equal to separate ones would say little."""
    learned = [bundle.read_predictions(both / "together" / name).probabilities for name in TRIED]
    differ = [abs(a - b).max() > 1e-4 for number, a in enumerate(learned) for b in learned[:number]]
    assert all(differ)


def test_the_trunk_is_computed_once_for_all_that_are_cut_at_the_same_place(
    lively_base: Path, data: DataRef, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: dict[object, int] = {}
    original = Trunk.computed

    def counted(self: Trunk, rows: Any, packing: Any) -> Any:
        computed[self.encoder.cut] = computed.get(self.encoder.cut, 0) + len(rows)
        return original(self, rows, packing)

    monkeypatch.setattr(Trunk, "computed", counted)
    some = {f"{seed}-{size}": toy_spec(
        lively_base, data, "pfeiffer", 2, limits=LIMITS, seed=seed,
        settings=settings_of("pfeiffer", reduction_factor=size),
    ) for seed in (1, 2) for size in (2, 4)}  # fmt: skip
    some["late"] = toy_spec(lively_base, data, "pfeiffer", 2, limits=LIMITS, settings=LATE)
    sweep.run(errands(some, tmp_path), unheard)
    tokens = material.Shelf().material(some["late"]).tokens
    rows = len(tokens["train"].ids) + len(tokens["validation"].ids)
    assert list(computed.values()) == [rows, rows]
    assert len(list((own_cache / "trunk").glob("*.states"))) == 4  # of both parts, for each cut


def test_what_jobs_share_is_read_once(
    lively_base: Path, data: DataRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[JobSpec] = []
    original = material._read

    def counted(spec: JobSpec, group: Any) -> Any:
        read.append(spec)
        return original(spec, group)

    monkeypatch.setattr(material, "_read", counted)
    some = [toy_spec(lively_base, data, "pfeiffer", 1, seed=seed) for seed in (1, 2)]
    longer = some[0].model_copy(update={"training": some[0].training.model_copy(update={"max_tokens": 8})})
    sweep.run(errands({"a": some[0], "b": some[1], "c": longer}, tmp_path), unheard)
    assert read == [some[0], longer]


def test_a_later_process_does_not_tokenise_again(
    lively_base: Path, data: DataRef, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = toy_spec(lively_base, data, "pfeiffer", 1)
    first = material.Shelf().material(spec).tokens
    monkeypatch.setattr("components.training.batching.tokenise", unheard)  # makes no tokens
    again = material.Shelf().material(spec).tokens
    assert {name: [row.tolist() for row in part.ids] for name, part in again.items()} == {
        name: [row.tolist() for row in part.ids] for name, part in first.items()
    }


def test_one_that_cannot_train_does_not_keep_the_others_from_it(
    lively_base: Path, data: DataRef, tmp_path: Path
) -> None:
    much = Schedule(epochs=2, learning_rates=LearningRates(body=1e38, layer_norm=1e38, head=1e38))
    some = {
        "first": toy_spec(lively_base, data, "pfeiffer", 1),
        "wild": toy_spec(lively_base, data, "pfeiffer", 2, schedule=much),
        "last": toy_spec(lively_base, data, "pfeiffer", 1, seed=2),
    }
    heard: list[News] = []
    sweep.run(errands(some, tmp_path), heard.append)
    ended = {each.errand: each.failed for each in heard if each.event is None}
    assert list(ended) == [0, 1, 2]
    assert (ended[0], ended[2]) == (None, None)
    assert "expected a finite loss" in str(ended[1])
    assert bundle.is_complete(tmp_path / "last")
    assert not bundle.is_complete(tmp_path / "wild")


def test_a_model_is_gone_when_the_next_one_is_loaded(
    lively_base: Path, data: DataRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    much = Schedule(epochs=2, learning_rates=LearningRates(body=1e38, layer_norm=1e38, head=1e38))
    some = {str(seed): toy_spec(lively_base, data, "pfeiffer", 1, seed=seed) for seed in range(4)}
    some["1"] = toy_spec(lively_base, data, "pfeiffer", 2, schedule=much)  # fails
    loaded: list[weakref.ref[Any]] = []
    beside: list[int] = []
    original = job._model

    def watched(*arguments: Any) -> Any:
        beside.append(sum(each() is not None for each in loaded))
        made = original(*arguments)
        loaded.append(weakref.ref(made[0]))
        return made

    monkeypatch.setattr(job, "_model", watched)
    sweep.run(errands(some, tmp_path), unheard)
    assert beside == [0, 0, 0, 0]


def test_what_is_wrong_with_all_ends_the_sweep(lively_base: Path, data: DataRef, tmp_path: Path) -> None:
    wrong = toy_spec(lively_base, data, "pfeiffer", 1, labels=("no", "yes"))
    with pytest.raises(ConfigError, match="expected labels no, yes"):
        sweep.run(errands({"a": wrong}, tmp_path), unheard)


def test_interrupted_it_goes_on_where_it_was(lively_base: Path, data: DataRef, tmp_path: Path) -> None:
    some = {name: toy_spec(lively_base, data, "pfeiffer", 3, seed=seed) for seed, name in enumerate("abc")}

    def interrupt(news: News) -> None:
        if news.errand == 1 and news.event and news.event.metrics and news.event.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.run(errands(some, tmp_path), interrupt)
    first = (tmp_path / "a" / bundle.MANIFEST).stat().st_mtime_ns
    events: list[tuple[int, Event]] = []
    sweep.run(errands(some, tmp_path), lambda news: events.append((news.errand, news.event)) if news.event else None)
    assert (tmp_path / "a" / bundle.MANIFEST).stat().st_mtime_ns == first
    epochs = [(errand, event.epoch) for errand, event in events if event.metrics]
    assert epochs == [(1, 3), (2, 1), (2, 2), (2, 3)]
    sweep.run(errands(some, tmp_path), lambda news: pytest.fail("trained again") if news.event else None)


class TestTheProcess:
    def run(self, path: Path) -> subprocess.CompletedProcess[str]:
        return forks.run(["-m", sweep.MODULE, str(path)], os.environ)

    def test_tells_of_each_job_on_standard_output(self, lively_base: Path, data: DataRef, tmp_path: Path) -> None:
        some = {name: toy_spec(lively_base, data, "pfeiffer", 1, seed=seed) for seed, name in enumerate("ab")}
        sweep.write(errands(some, tmp_path), tmp_path / "errands.json")
        ended = self.run(tmp_path / "errands.json")
        assert ended.returncode == 0, ended.stderr
        heard = [sweep.heard(line) for line in ended.stdout.splitlines()]
        assert [news.errand for news in heard if news and news.event is None] == [0, 1]
        assert {news.errand for news in heard if news and news.event and news.event.metrics} == {0, 1}

    def test_what_all_jobs_have_to_say_is_said_once(
        self, lively_base: Path, data: DataRef, own_cache: Path, tmp_path: Path
    ) -> None:
        tight = LIMITS.model_copy(update={"trunk_cache_gb": 1e-6})
        some = {
            name: toy_spec(lively_base, data, "pfeiffer", 1, seed=seed, limits=tight) for seed, name in enumerate("ab")
        }
        sweep.write(errands(some, tmp_path), tmp_path / "errands.json")
        ended = self.run(tmp_path / "errands.json")
        assert ended.returncode == 0, ended.stderr
        trains, validates = filter(None, map(progress.note, ended.stdout.splitlines()))
        assert trains != validates
        assert all("of the texts 0 are kept, the rest is computed" in each for each in (trains, validates))

    def test_a_wrong_file_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "errands.json").write_text('[{"spec": {}}]')
        ended = self.run(tmp_path / "errands.json")
        assert (ended.returncode, ended.stdout) == (1, "")
        (line,) = ended.stderr.splitlines()
        assert line.startswith("expected a list of job specs")


def test_other_lines_are_no_news() -> None:
    assert sweep.heard("Loading weights: 100%") is None
    assert sweep.heard('{"step": 1}') is None
