"""What speaks for a version that shall go to production, looked at again: bundle, gate, the champion of today."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from components.config import GateConfig
from components.data import ledger
from components.errors import BundleError, RegistryError
from components.evaluation import gate
from components.registry import bundle, members, versions
from components.registry.tracking import Tracking, calls, load_mlflow
from components.registry.versions import Version

if TYPE_CHECKING:
    from datasets import Dataset

    Split = tuple[dict[str, Dataset], tuple[str, ...]]

AGAIN = "retrain that model: it makes a new candidate"


@dataclass(frozen=True)
class Evidence:
    """The report of the gate with its rule on the champion as of today.

    remeasured: production was another version when the gate judged, and both were compared again.
    """

    version: Version
    champion: Version | None
    report: gate.GateReport
    remeasured: bool


def gather(tracking: Tracking, version: Version) -> Evidence:
    """Check a version as if nobody had before.

    Raises GateFailed or GateInconclusive when it did not pass, or would not against what is in production today;
    RegistryError or BundleError when its bundle, what that stands on, or its gate's report is not what was registered.
    """
    champion = versions.with_alias(tracking, version.name, versions.PRODUCTION)
    if champion is not None and champion.number == version.number:
        raise RegistryError(
            f"a version of {version.name} other than the one in production", f"version {version.number}", AGAIN
        )
    report, known, policy = _judged(tracking, version)
    report.raise_unless_passed()
    with whole(tracking, version) as (folder, manifest), _split(version) as split:
        _require_same_score(version, report, folder, split[0]["test"])
        if (champion.number if champion else None) == known:
            return Evidence(version, champion, report, remeasured=False)
        rule = gate.nothing_in_production(policy)
        if champion is not None:
            rule = _compared(tracking, version, folder, manifest, split, champion, policy)
    rules = tuple(rule if each.rule.startswith(gate.CHAMPION_RULE) else each for each in report.rules)
    report = replace(report, verdict=gate.overall(rules), rules=rules)
    report.raise_unless_passed()
    return Evidence(version, champion, report, remeasured=True)


@contextmanager
def whole(tracking: Tracking, version: Version) -> Iterator[tuple[Path, bundle.Manifest]]:
    """The bundle of a version and its manifest. Every byte of it and of what it stands on is the registered one."""
    with tempfile.TemporaryDirectory() as name:
        folder, manifest = versions.bundle_of(tracking, version, Path(name) / "bundle")
        for number, member in enumerate(manifest.members):
            members.fetch_anew(member, Path(name) / str(number))
        yield folder, manifest


def _judged(tracking: Tracking, version: Version) -> tuple[gate.GateReport, str | None, GateConfig]:
    """What the gate said when this very bundle was registered, what was in production then, and by which policy."""
    run = version.tags.get("gate_run", "")
    try:
        with calls(tracking.uri):
            text = load_mlflow(tracking.uri).artifacts.load_text(f"runs:/{run}/{versions.GATE_REPORT}")
        content: dict[str, Any] = json.loads(text)
        of, champion, policy = content["bundle_digest"], content["champion"], content["policy"]
        judged = gate.from_json(content), champion, GateConfig.model_validate(policy)
    except (RegistryError, ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        if isinstance(error, RegistryError) and error.retry_can_help:
            raise
        raise RegistryError(f"the gate's report on {version.address} in run {run or '?'}", "none", AGAIN) from error
    if of != version.tags["bundle_digest"]:
        raise RegistryError(f"the gate's report on the bundle of {version.address}", f"one on {of[:12]}", AGAIN)
    return judged


def _require_same_score(version: Version, report: gate.GateReport, folder: Path, test: Dataset) -> None:
    """The accuracy that the gate saw, computed again from the bundle's predictions and the frozen test rows."""
    predictions = bundle.read_predictions(folder)
    if predictions.rows != list(test["row"]):
        raise BundleError(f"predictions of {version.address} on its test rows", "on other rows", AGAIN)
    found = float(gate.correct(predictions.probabilities, np.asarray(test["label"], dtype=np.int64)).mean())
    said = report.scores["adapter"]["accuracy"].value
    if abs(found - said) > 1e-9:
        raise BundleError(f"{version.address} to be right on {said:.4%} of its test rows", f"{found:.4%}", AGAIN)


def _compared(
    tracking: Tracking,
    version: Version,
    folder: Path,
    manifest: bundle.Manifest,
    ours: Split,
    champion: Version,
    policy: GateConfig,
) -> gate.RuleVerdict:
    """The rule on the champion, on every row that either held out for testing and neither has learned from."""
    with _split(champion) as theirs, whole(tracking, champion) as (kept, of_kept):
        stood_on = [members.fetch(each)[1] for each in (*manifest.members, *of_kept.members)]
        to_members = [ledger.learned_rows(each.data_uri) for each in stood_on]
        table, names = held_out(*ours, *theirs, *to_members)
        truth = np.asarray(table["label"], dtype=np.int64)
        adapter = _probabilities(tracking, version, folder, manifest.labels, table, names)
        other = _probabilities(tracking, champion, kept, of_kept.labels, table, names)
    right, theirs_right = gate.correct(adapter, truth), gate.correct(other, truth)
    return gate.against_champion(champion.number, right, theirs_right, policy, np.random.default_rng(policy.seed))


def held_out(
    ours: dict[str, Dataset],
    labels: tuple[str, ...],
    theirs: dict[str, Dataset],
    their_labels: tuple[str, ...],
    *to_members: Set[str],
) -> tuple[Dataset, tuple[str, ...]]:
    """The union of two test parts without what either of both has learned from, and the labels of both.

    to_members: ids of rows that members of a fusion have learned from.
    """
    from datasets import concatenate_datasets

    names = labels + tuple(label for label in their_labels if label not in labels)
    learned = {row for parts in (ours, theirs) for name in ("train", "validation") for row in parts[name]["row"]}
    taken = learned.union(*to_members)
    tables = []
    for parts, known in ((ours, labels), (theirs, their_labels)):
        test = parts["test"]
        new = [index for index, row in enumerate(test["row"]) if row not in taken]
        taken |= {test["row"][index] for index in new}
        codes = np.array([names.index(known[code]) for code in np.asarray(test["label"])[new]], dtype=np.int64)
        tables.append(test.select(new).remove_columns("label").add_column("label", codes))
    return concatenate_datasets(tables), names


def _probabilities(
    tracking: Tracking,
    version: Version,
    folder: Path,
    known: tuple[str, ...],
    table: Dataset,
    labels: tuple[str, ...],
) -> npt.NDArray[np.float32]:
    """Of a version that knows these labels, (rows, labels): what its bundle keeps, else computed from it."""
    predictions = bundle.read_predictions(folder)
    at = {row: index for index, row in enumerate(predictions.rows)}
    found = np.zeros((len(table), len(labels)), dtype=np.float32)
    kept = [index for index, row in enumerate(table["row"]) if row in at]
    columns = [labels.index(label) for label in known]
    found[np.ix_(kept, columns)] = predictions.probabilities[[at[table["row"][index]] for index in kept]]
    if missing := sorted(set(range(len(table))) - set(kept)):
        found[missing] = versions.score(tracking, version.address, table.select(missing), labels)
    return found


@contextmanager
def _split(version: Version) -> Iterator[Split]:
    """The split that a version was trained and judged on, and its labels."""
    with tempfile.TemporaryDirectory() as folder:
        uri, digest = version.tags.get("split_uri"), version.tags.get("split_digest")
        if not (uri and digest):
            raise RegistryError(f"tags split_uri and split_digest on {version.address}", "none", AGAIN)
        yield ledger.load_parts(uri, digest, Path(folder))
