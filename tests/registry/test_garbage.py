"""Mark and sweep: what is reachable is never listed; what is not, and is old enough, always is."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from components.registry.garbage import WHY, Thing, in_both, leftovers
from components.storage import Entry

NOW, GRACE = 1_000_000.0, 86_400.0
OLD, YOUNG = NOW - 2 * GRACE, NOW - GRACE / 2


def thing(name: str, keys: str = "", refers: str = "", modified: float = OLD, held: str = "") -> Thing:
    files = (Entry(name, 1, "mark", modified),)
    return Thing("job", name, "store", files, modified, frozenset(keys.split()), frozenset(refers.split()), held)


def listed(things: list[Thing], roots: set[str] = frozenset(), **more: object) -> set[str]:  # type: ignore[assignment]
    return {each.place for each in leftovers(things, roots, NOW - GRACE, **more)}  # type: ignore[arg-type]


def reaches(things: list[Thing], roots: set[str]) -> set[str]:
    """By definition, and slowly: a thing stays if a root names it, it is young or held, or one that stays needs it."""
    stays: set[str] = set()
    for _ in things:
        named = roots | {key for each in things if each.place in stays for key in each.refers}
        stays |= {each.place for each in things if each.held or each.modified >= NOW - GRACE or named & each.keys}
    return stays


@pytest.mark.parametrize("seed", range(60))
def test_exactly_what_nothing_reaches_is_listed(seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311  # not for secrets
    keys = [f"key{number}" for number in range(25)]
    things = [
        thing(
            f"thing{number}",
            " ".join(rng.sample(keys, rng.randint(0, 2))),
            " ".join(rng.sample(keys, rng.choice((0, 0, 1, 3)))),
            rng.choice((OLD, OLD, OLD, OLD, YOUNG)),
            "lock" if rng.random() < 0.05 else "",
        )
        for number in range(30)
    ]
    roots = set(rng.sample(keys, rng.randint(0, 4)))
    stays = reaches(things, roots)
    assert listed(things, roots) == {each.place for each in things} - stays
    assert listed(list(reversed(things)), roots) == listed(things, roots)


def test_what_a_kept_thing_needs_stays_over_any_distance() -> None:
    chain = [thing(f"{n}", f"key{n}", f"key{n + 1}") for n in range(5)]
    assert listed(chain, {"key0"}) == set()
    assert listed(chain, {"key2"}) == {"0", "1"}


def test_two_that_only_need_each_other_go() -> None:
    assert listed([thing("a", "a", "b"), thing("b", "b", "a")]) == {"a", "b"}


@pytest.mark.parametrize("how", [{"modified": YOUNG}, {"held": "lock"}])
def test_what_is_young_or_held_stays_with_what_it_needs(how: dict[str, object]) -> None:
    assert listed([replace(thing("a", "", "b"), **how), thing("b", "b")]) == set()  # type: ignore[arg-type]


def test_a_kind_that_nobody_could_be_asked_about_stays_with_what_it_needs() -> None:
    things = [thing("a", "", "b"), replace(thing("b", "b"), kind="split"), replace(thing("c"), kind="split")]
    assert listed(things, spared={"job"}) == {"c"}


def test_only_what_is_listed_twice_unchanged_is_in_both() -> None:
    same, changed, gone = thing("same"), thing("changed"), thing("gone")
    again = [thing("same"), replace(changed, files=(Entry("changed", 2, "mark"),)), thing("new")]
    assert [each.place for each in in_both([same, changed, gone], again)] == ["same"]


def test_every_reason_says_something() -> None:
    assert all(WHY.values())
