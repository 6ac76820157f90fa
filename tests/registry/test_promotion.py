"""Promotion: only with evidence, only from what was seen, and whole whatever is cut off in between."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file, save_file

from components import storage
from components.errors import BundleError, GateFailed, GateInconclusive, HistoryError, ProductionMoved, RegistryError
from components.methods import Member
from components.registry import bundle, history, promotion, tracking, versions
from components.registry.history import Record
from components.registry.promotion import Approval, Case
from components.registry.versions import Version
from tests.registry.registered import Shelf, folder_of, seal, shelf

ADA, EVE = Approval("ada", "it is better"), Approval("eve", "it is worse")


@pytest.fixture(scope="module")
def shelved(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return shelf(tmp_path_factory.mktemp("registry"), tiny_base)


@pytest.fixture
def model(request: pytest.FixtureRequest) -> str:
    """A model of the test's own."""
    return "".join(sign if sign.isalnum() else "-" for sign in request.node.name)


def records(there: Shelf, model: str) -> list[Record]:
    return history.records(there.registry.store, model)


def examined(there: Shelf, version: Version) -> Case:
    return promotion.examine(there.registry, version.name, version.number)


def promoted(there: Shelf, version: Version, approval: Approval = ADA) -> Record:
    return promotion.promote(there.registry, examined(there, version), approval)


def walked(there: Shelf, model: str, count: int) -> list[Version]:
    """So many versions, each promoted after the one before."""
    made = []
    for number in range(count):
        made.append(there.version(model, champion=str(number) if number else None))
        promoted(there, made[-1])
    return made


class TestPromoting:
    def test_alias_record_and_run_say_the_same(self, shelved: Shelf, model: str) -> None:
        first, second = shelved.version(model), shelved.version(model, champion="1")
        promoted(shelved, first)
        record = promoted(shelved, second)

        assert shelved.production(model) == second.number == record.after
        assert (record.before, record.who, record.why, record.verdict) == (first.number, "ada", "it is better", "pass")
        assert record.bundle_digest == second.tags["bundle_digest"]
        assert records(shelved, model)[-1] == record
        run = shelved.runs(model)[-1]
        assert (run.info.run_id, run.info.status) == (record.run, "FINISHED")
        assert (run.data.tags["from"], run.data.tags["to"], run.data.tags["reviewer"]) == ("1", "2", "ada")

    def test_the_candidate_is_meant_if_no_version_is_named(self, shelved: Shelf, model: str) -> None:
        shelved.version(model)
        second = shelved.version(model)
        shelved.registry.versions.client.set_registered_model_alias(model, versions.CANDIDATE, second.number)
        assert promotion.examine(shelved.registry, model).version.number == second.number

    def test_nobody_is_no_reviewer(self) -> None:
        with pytest.raises(RegistryError, match="--reviewer"):
            Approval("  ", "")

    def test_what_is_in_production_is_not_promoted_again(self, shelved: Shelf, model: str) -> None:
        (version,) = walked(shelved, model, 1)
        with pytest.raises(RegistryError, match="other than the one in production"):
            examined(shelved, version)


class TestEvidence:
    """What is refused leaves alias and history as they were."""

    @pytest.fixture
    def champion(self, shelved: Shelf, model: str) -> Version:
        return walked(shelved, model, 1)[0]

    @pytest.fixture(autouse=True)
    def unchanged(self, shelved: Shelf, model: str, champion: Version) -> object:
        before = records(shelved, model)
        yield
        assert (shelved.production(model), records(shelved, model)) == (champion.number, before)

    def test_a_tag_is_no_verdict(self, shelved: Shelf, model: str) -> None:
        version = shelved.version(model, accuracy=0.5, champion="1")
        labels = bundle.read_predictions(folder_of(version)).labels
        wrong = torch.eye(2).numpy()[1 - labels]
        digest = version.tags["bundle_digest"]
        shelved.report(version.tags["gate_run"], digest, wrong, labels, "1", verdict="fail")
        with pytest.raises(GateFailed):
            examined(shelved, version)

    def test_without_the_gates_report_there_is_no_promotion(self, shelved: Shelf, model: str) -> None:
        version = shelved.version(model, gate_run="0" * 32)
        with pytest.raises(RegistryError, match="the gate's report"):
            examined(shelved, version)

    def test_a_report_on_another_bundle_does_not_count(self, shelved: Shelf, model: str) -> None:
        good, bad = shelved.version(model, champion="1"), shelved.version(model, accuracy=0.9, champion="1")
        borrowed = shelved.version(model, accuracy=0.9, gate_run=good.tags["gate_run"])
        assert borrowed.tags["bundle_digest"] == bad.tags["bundle_digest"]
        with pytest.raises(RegistryError, match="one on"):
            examined(shelved, borrowed)

    @pytest.mark.parametrize("damage", [{"rules": None}, {"scores": {"adapter": 1}}, {"policy": {"margin": "wide"}}])
    def test_a_damaged_report_is_none(self, shelved: Shelf, model: str, damage: dict[str, Any]) -> None:
        version = shelved.version(model, champion="1")
        labels = bundle.read_predictions(folder_of(version)).labels
        right = torch.eye(2).numpy()[labels]
        shelved.report(version.tags["gate_run"], version.tags["bundle_digest"], right, labels, "1", **damage)
        with pytest.raises(RegistryError, match="the gate's report"):
            examined(shelved, version)

    def test_the_score_must_be_what_the_gate_saw(self, shelved: Shelf, model: str) -> None:
        version = shelved.version(model, accuracy=0.96, champion="1")
        labels = bundle.read_predictions(folder_of(version)).labels
        better = torch.eye(2).numpy()[labels]
        shelved.report(version.tags["gate_run"], version.tags["bundle_digest"], better, labels, "1")
        with pytest.raises(BundleError, match=r"100\.0000%"):
            examined(shelved, version)

    @pytest.mark.parametrize("file", ["adapter_model.safetensors", "predictions.safetensors", "adapter_config.json"])
    @pytest.mark.fault("one byte of a registered bundle flipped", "not promoted, not gone back to; the file is named")
    def test_one_flipped_byte_is_named(self, shelved: Shelf, model: str, file: str) -> None:
        version = shelved.version(model, champion="1")
        path = folder_of(version) / file
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(RegistryError, match=file):
            examined(shelved, version)

    def test_weights_with_a_new_manifest_are_another_bundle(self, shelved: Shelf, model: str) -> None:
        version = shelved.version(model, champion="1")
        weights = load_file(folder_of(version) / "adapter_model.safetensors")
        save_file({name: 2 * each for name, each in weights.items()}, folder_of(version) / "adapter_model.safetensors")
        seal(folder_of(version))
        with pytest.raises(RegistryError, match="with bundle digest"):
            examined(shelved, version)

    def test_a_fusion_needs_what_it_stands_on(
        self, shelved: Shelf, model: str, champion: Version, tmp_path: Path
    ) -> None:
        member = Member(name="m", version="1", uri=str(tmp_path / "gone"), digest=champion.tags["bundle_digest"])
        version = shelved.version(model, champion="1")
        digest = seal(folder_of(version), members=[member.model_dump()])
        versions.tag(shelved.registry.versions, version, {"bundle_digest": digest})
        labels = bundle.read_predictions(folder_of(version)).labels
        shelved.report(version.tags["gate_run"], digest, torch.eye(2).numpy()[labels], labels, "1")
        with pytest.raises(BundleError, match="member m/1"):
            examined(shelved, version)

    def test_what_a_member_of_a_fusion_has_learned_from_speaks_for_nobody(
        self, shelved: Shelf, model: str, champion: Version, tmp_path: Path
    ) -> None:
        known = Path(shutil.copytree(shelved.data.uri, tmp_path / "split"))
        shutil.copy(known / "test.parquet", known / "train.parquet")
        of_member = Path(shutil.copytree(folder_of(champion), tmp_path / "member"))
        sealed = seal(of_member, data_uri=str(known))
        member = Member(name="m", version="1", uri=str(of_member), digest=sealed)
        version = shelved.version(model)
        digest = seal(folder_of(version), members=[member.model_dump()])
        versions.tag(shelved.registry.versions, version, {"bundle_digest": digest})
        labels = bundle.read_predictions(folder_of(version)).labels
        shelved.report(version.tags["gate_run"], digest, torch.eye(2).numpy()[labels], labels, None)
        with pytest.raises(GateInconclusive, match="vs champion"):
            examined(shelved, version)

    def test_a_champion_that_came_after_the_gate_is_compared_now(self, shelved: Shelf, model: str) -> None:
        worse = shelved.version(model, accuracy=0.8)  # judged when nothing was in production
        with pytest.raises(GateFailed, match=r"vs champion \(version 1\): -20\.0 points"):
            examined(shelved, worse)


class TestMoved:
    def test_an_equal_version_passes_against_the_champion_of_today(self, shelved: Shelf, model: str) -> None:
        walked(shelved, model, 1)
        evidence = examined(shelved, shelved.version(model)).evidence
        assert evidence.remeasured
        assert [rule.verdict for rule in evidence.report.rules if "(version 1)" in rule.rule] == ["pass"]

    def test_the_second_of_two_that_saw_the_same_is_told_who_was_first(self, shelved: Shelf, model: str) -> None:
        first, second = (examined(shelved, shelved.version(model)) for _ in range(2))
        promotion.promote(shelved.registry, first, ADA)
        with pytest.raises(ProductionMoved, match=r"version 1 since .* by ada"):
            promotion.promote(shelved.registry, second, EVE)
        assert (shelved.production(model), len(records(shelved, model))) == ("1", 1)

    def test_nobody_loses_against_a_record_of_their_own(
        self, shelved: Shelf, model: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """S3 kept it and its answer was lost: the client writes again, and it is there."""
        append = history.append
        monkeypatch.setattr(history, "append", lambda *record: append(*record) and append(*record))
        assert promoted(shelved, shelved.version(model)) == records(shelved, model)[0]
        assert shelved.production(model) == "1"

    @pytest.mark.fault("six promotions racing", "one wins, the others say who was first")
    def test_of_many_at_once_one_wins(self, shelved: Shelf, model: str) -> None:
        cases = [examined(shelved, shelved.version(model)) for _ in range(6)]

        def attempt(case: Case) -> Record | None:
            try:
                return promotion.promote(shelved.registry, case, Approval(case.version.number, "first"))
            except ProductionMoved:
                return None

        with ThreadPoolExecutor(len(cases)) as pool:
            (won,) = [record for record in pool.map(attempt, cases) if record]
        assert shelved.production(model) == won.after == won.who
        assert records(shelved, model) == [won]
        assert sorted({run.info.status for run in shelved.runs(model)} - {"KILLED"}) in (
            ["FAILED", "FINISHED"],
            ["FINISHED"],
        )


class TestByHand:
    @pytest.mark.fault("production moved by hand in MLflow", "shown as such, recorded by the next command")
    def test_it_is_seen_and_recorded_once(self, shelved: Shelf, model: str) -> None:
        walked(shelved, model, 2)
        shelved.by_hand(model, "1")
        _, seen = promotion.look(shelved.registry, model)
        assert seen is not None
        assert (seen.action, seen.before, seen.after, seen.who) == ("by hand", "2", "1", "unknown")
        assert len(records(shelved, model)) == 2  # looking changes nothing

        for _ in range(2):
            assert promotion.settle(shelved.registry, model)[-1].action == "by hand"
        assert len(records(shelved, model)) == 3
        assert promotion.look(shelved.registry, model)[1] is None
        assert shelved.production(model) == "1"

    def test_production_without_any_history_was_set_by_hand(self, shelved: Shelf, model: str) -> None:
        version = shelved.version(model)
        shelved.by_hand(model, version.number)
        (record,) = promotion.settle(shelved.registry, model)
        assert (record.action, record.before, record.after) == ("by hand", None, version.number)

    def test_an_alias_that_was_taken_away_is_one_too(self, shelved: Shelf, model: str) -> None:
        walked(shelved, model, 1)
        shelved.registry.versions.client.delete_registered_model_alias(model, versions.PRODUCTION)
        record = promotion.settle(shelved.registry, model)[-1]
        assert (record.action, record.before, record.after) == ("by hand", "1", None)
        assert promotion.roll_back(shelved.registry, model, ADA).after == "1"

    def test_evidence_from_before_it_is_void(self, shelved: Shelf, model: str) -> None:
        walked(shelved, model, 2)
        case = examined(shelved, shelved.version(model, champion="2"))
        shelved.by_hand(model, "1")
        with pytest.raises(ProductionMoved, match="by hand"):
            promotion.promote(shelved.registry, case, ADA)
        assert shelved.production(model) == "1"


class TestCutOff:
    """Killed between the record and the alias, or held up there."""

    def written(self, there: Shelf, version: Version) -> Record:
        """The next record, whose writer then died."""
        found = records(there, version.name)
        record = promotion._record(found, version.name, "promote", version, ADA, "pass")
        assert history.append(there.registry.store, record)
        return record

    def test_it_is_finished_by_whoever_comes_next(self, shelved: Shelf, model: str) -> None:
        walked(shelved, model, 1)
        record = self.written(shelved, shelved.version(model))
        assert shelved.production(model) == "1"
        assert promotion.settle(shelved.registry, model)[-1] == record
        assert shelved.production(model) == "2"
        assert history.is_done(shelved.registry.store, record)

    def test_it_is_not_taken_for_a_change_by_hand(self, shelved: Shelf, model: str) -> None:
        walked(shelved, model, 1)
        self.written(shelved, shelved.version(model))
        assert promotion.look(shelved.registry, model)[1] is None

    def test_what_was_set_by_hand_since_stands(self, shelved: Shelf, model: str) -> None:
        walked(shelved, model, 2)
        self.written(shelved, shelved.version(model))
        shelved.by_hand(model, "1")
        last = promotion.settle(shelved.registry, model)[-1]
        assert (last.action, last.before, last.after) == ("by hand", "3", "1")
        assert shelved.production(model) == "1"

    @pytest.mark.fault(
        "a promotion held up between record and alias while others go on", "the newest record has the last word"
    )
    def test_a_late_writer_does_not_undo_what_came_after(self, shelved: Shelf, model: str) -> None:
        walked(shelved, model, 3)
        late = records(shelved, model)[1]
        promotion._carry_out(shelved.registry, late)
        assert shelved.production(model) == "3"

    def test_a_run_that_nobody_ends_is_ended(self, shelved: Shelf, model: str) -> None:
        left = tracking.start(shelved.registry.promotions, "promote", {"model": model})
        walked(shelved, model, 1)
        assert {run.info.run_id: run.info.status for run in shelved.runs(model)}[left] == "KILLED"

    def test_a_damaged_history_stops_everything(self, shelved: Shelf, model: str) -> None:
        walked(shelved, model, 1)
        case = examined(shelved, shelved.version(model, champion="1"))
        folder = Path(shelved.registry.store) / "history" / model
        storage.write(str(folder / "000002.json"), b"{}")
        with pytest.raises(HistoryError):
            promotion.promote(shelved.registry, case, ADA)
        assert shelved.production(model) == "1"


class TestRollingBack:
    def test_each_step_leads_further_back(self, shelved: Shelf, model: str) -> None:
        walked(shelved, model, 3)
        back = [promotion.roll_back(shelved.registry, model, EVE).after for _ in range(2)]
        assert back == ["2", "1"]
        assert shelved.production(model) == "1"
        assert [record.action for record in records(shelved, model)[3:]] == ["roll back"] * 2
        with pytest.raises(RegistryError, match="in production before"):
            promotion.roll_back(shelved.registry, model, EVE)

    def test_a_version_can_be_named(self, shelved: Shelf, model: str) -> None:
        walked(shelved, model, 3)
        assert promotion.roll_back(shelved.registry, model, EVE, "1").after == shelved.production(model) == "1"

    @pytest.mark.parametrize("to", ["3", "2", "9"])
    def test_only_what_was_in_production_and_is_not(self, shelved: Shelf, model: str, to: str) -> None:
        walked(shelved, model, 2)
        shelved.version(model)
        with pytest.raises(RegistryError, match="in production before: 1"):
            promotion.roll_back(shelved.registry, model, EVE, to)
        assert shelved.production(model) == "2"

    def test_nothing_was_ever_in_production(self, shelved: Shelf, model: str) -> None:
        shelved.version(model)
        with pytest.raises(RegistryError, match="in production before: none"):
            promotion.roll_back(shelved.registry, model, EVE)

    def test_a_damaged_version_is_not_gone_back_to(self, shelved: Shelf, model: str) -> None:
        first, _ = walked(shelved, model, 2)
        (folder_of(first) / "metrics.json").write_text(json.dumps({}))
        with pytest.raises(RegistryError, match=r"metrics\.json"):
            promotion.roll_back(shelved.registry, model, EVE)
        assert shelved.production(model) == "2"
