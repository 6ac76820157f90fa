"""What a fusion needs beside the steps of a retrain: its members, and where each of them helped."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path

from prefect import task
from prefect.artifacts import create_link_artifact

from components import base_model
from components.config import RetrainConfig
from components.data import ledger
from components.data.ledger import Record
from components.errors import ConfigError, DataError
from components.methods import Member
from components.registry import claim, tracking, versions
from components.registry import members as bundles
from flows import screen, steps
from flows.values import Run, Trained

log = logging.getLogger("adapterline")


@task(**steps.RETRIED, name="members")
def members(config: RetrainConfig) -> tuple[Member, ...]:
    """The versions that the names stand for now, with their bundles kept in the store. All must fit the base, and one
    another.
    """
    fusion = config.adapter.fusion
    if fusion is None:
        raise ConfigError("adapter.method: fusion", config.adapter.method, "run flows.retrain with these parameters")
    connection = tracking.connect(config.registry)
    claim.make(connection, config.registry.store)
    found = tuple(versions.member(connection, reference, config.registry.store) for reference in fusion.members)
    twice = [str(member) for index, member in enumerate(found) if member.digest in {m.digest for m in found[:index]}]
    if twice:
        raise ConfigError("different members", f"the bundle of {', '.join(twice)} twice", "name each adapter once")
    bundles.configs(found, base_model.find(config.base).pin)
    for reference, member in zip(fusion.members, found, strict=True):
        log.info("member    %s is version %s", reference, member.version)
    return found


@task(**steps.RETRIED, name="unseen?")
def require_unseen(split: Record, members: tuple[Member, ...]) -> None:
    """Raise DataError when a member learned from a row of the test part: the gate would ask for what is known."""
    with tempfile.TemporaryDirectory() as folder:
        parts, _ = ledger.load_parts(split.split_uri, split.split_digest, Path(folder))
    test = set(parts["test"]["row"])
    for member in members:
        _, manifest = bundles.fetch(member)
        learned = test & ledger.learned_rows(manifest.data_uri)
        if learned:
            raise DataError(
                "test rows that no member learned from",
                f"{len(learned):,} of {len(test):,} that {member} did",
                f"split as it was for {member.name} (same rows, same settings), or leave it out",
            )


@task(**steps.RETRIED, name="attention")
def attention(config: RetrainConfig, fusion: Trained, run: Run) -> None:
    """Show how much each member counted in each layer, on the test part."""
    from components.evaluation import plots

    measured = json.loads((fusion.folder / "metrics.json").read_bytes())["attention"]
    picture = plots.attention(measured, f"{config.model}: attention to members on the test part")
    tracking.keep(run.tracking, run.id, {"fusion/attention.json": json.dumps(measured, indent=2)})
    tracking.keep_image(run.tracking, run.id, picture, "fusion/attention.png")
    link = run.tracking.page(run.id, "fusion/attention.png")
    create_link_artifact(link, "attention", key=steps.key("attention", config.model), description="Which member helped")
    screen.attention(measured)
