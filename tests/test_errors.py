"""Errors: the tree that the module draws is the tree there is, and every message is one line."""

from __future__ import annotations

import pickle
import re

import pytest

from components import errors
from components.errors import AdapterlineError


def family(root: type[AdapterlineError]) -> list[type[AdapterlineError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in family(child))]


def drawn() -> dict[str, str]:
    """Parent of each class, by the indentation in the docstring."""
    parents: dict[str, str] = {}
    above = {0: "AdapterlineError"}
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ([│ ]*)[├└]── (\w+)", line):
            depth = len(found[1]) // 4 + 1
            above[depth] = found[2]
            parents[found[2]] = above[depth - 1]
    return parents


KINDS = [kind for kind in family(AdapterlineError) if kind.__module__ == errors.__name__]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def test_docstring_draws_the_tree_there_is() -> None:
    assert drawn() == {kind.__name__: kind.__base__.__name__ for kind in KINDS if kind is not AdapterlineError}


@every_kind
def test_message_is_one_line_with_all_three_parts(kind: type[AdapterlineError]) -> None:
    assert str(kind("two\nlines", "a\r\n\ttab", " go on ")) == "expected two lines; found a tab; go on"


@every_kind
def test_error_survives_the_way_between_processes(kind: type[AdapterlineError]) -> None:
    error = pickle.loads(pickle.dumps(kind("this", "that", "do")))  # noqa: S301  # our own bytes
    assert type(error) is kind
    assert (error.expected, error.found, error.todo) == ("this", "that", "do")


def test_exit_codes_tell_a_verdict_from_a_breakdown() -> None:
    verdicts = {errors.GateFailed: 2, errors.GateInconclusive: 3}
    assert {kind: kind.exit_code for kind in KINDS} == {kind: verdicts.get(kind, 1) for kind in KINDS}


def test_a_retry_can_help_where_the_world_was_in_the_way() -> None:
    helped = {errors.StorageUnavailable, errors.RegistryUnavailable, errors.LedgerMoved, errors.JobKilled}
    assert {kind for kind in KINDS if kind.retry_can_help} == helped
