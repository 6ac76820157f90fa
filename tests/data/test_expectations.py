"""Expectations: each bound is kept or reported, errors stop and warnings do not, and no report shows a row."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from components.config import ValidationConfig
from components.data.expectations import Outcome, Report, validate
from components.errors import ValidationFailed
from tests.conftest import toy_rows
from tests.data.refusal import SECRET, refusal
from tests.data.toy_corpus import Row, table

LABELS = ("bad", "good")
EVEN = {"bad": 100, "good": 100}
GOOD = toy_rows(200)


def check(rows: list[Row], previous: dict[str, int] | None = EVEN, show: bool = False, **bounds: Any) -> Report:
    return validate(table(rows), LABELS, ValidationConfig(**bounds), previous, show)


def unmet(report: Report) -> dict[str, str]:
    """Names and findings of all that was not met."""
    return {outcome.name: outcome.found for outcome in (*report.errors, *report.warnings)}


def test_good_rows_meet_all() -> None:
    report = check(GOOD)
    report.raise_for_errors("report.html")
    assert unmet(report) == {}
    assert [outcome.name for outcome in report.outcomes] == [
        "columns", "row_count", "text_length", "labels", "rows_per_class", "duplicates", "class_balance",
    ]  # fmt: skip


LONG = (SECRET * 2500, "bad")
UNMET = {
    "long text": ([*GOOD, LONG], {}, {"text_length": "1 rows outside, the first in row 201, of 20,000 characters"}),
    "empty text": ([*GOOD, (" ", "bad")], {}, {"text_length": "1 rows outside, the first in row 201, of 0 characters"}),
    "undeclared label": (
        [*GOOD[:9], ("a row", SECRET), *GOOD[9:]],
        {},
        {"labels": "1 rows with another one, the first in row 10"},
    ),
    "too few": (GOOD, {"min_rows": 201}, {"row_count": "200 rows"}),
    "too many": (GOOD, {"max_rows": 199}, {"row_count": "200 rows"}),
    "small class": (GOOD, {"min_rows_per_class": 101}, {"rows_per_class": "100 of class bad"}),
    "duplicates": (GOOD + GOOD, {}, {"duplicates": "50.0%"}),
}


@pytest.mark.parametrize("case", UNMET)
def test_bound_that_is_not_kept_is_the_only_one_reported(case: str) -> None:
    rows, bounds, expected = UNMET[case]
    assert unmet(check(rows, None, **bounds)) == expected


@pytest.mark.parametrize(
    ("rows", "bounds"),
    [
        (GOOD, {"min_rows": 200, "max_rows": 200}),
        (GOOD, {"min_rows_per_class": 100}),
        ([*GOOD, ("x" * 10_000, "bad"), ("x", "good")], {}),
        (GOOD + GOOD[:50], {}),
    ],
    ids=["rows", "class", "length", "duplicates"],
)
def test_bound_itself_is_allowed(rows: list[Row], bounds: dict[str, int]) -> None:
    assert unmet(check(rows, None, **bounds)) == {}


def test_declared_class_without_rows_is_an_error() -> None:
    report = check([row for row in GOOD if row[1] == "bad"], None)
    assert unmet(report) == {"rows_per_class": "0 of class good"}


def test_second_text_has_to_keep_the_bounds_too() -> None:
    columns = {"text": [text for text, _ in GOOD], "text_pair": [""] * 200, "label": [label for _, label in GOOD]}
    report = validate(Dataset.from_dict(columns), LABELS, ValidationConfig())
    assert set(unmet(report)) == {"text_length"}


def test_same_text_with_another_second_text_is_no_duplicate() -> None:
    columns = {"text": ["same"] * 200, "text_pair": [text for text, _ in GOOD], "label": [name for _, name in GOOD]}
    assert unmet(validate(Dataset.from_dict(columns), LABELS, ValidationConfig())) == {}


def test_warnings_do_not_stop_the_run() -> None:
    report = check(GOOD + GOOD)
    assert [outcome.name for outcome in report.warnings] == ["duplicates"]
    report.raise_for_errors("report.html")


@pytest.mark.parametrize("name", ["duplicates", "class_balance", "row_count", "rows_per_class", "text_length"])
def test_severity_is_the_configuration_s_choice(name: str) -> None:
    """The same rows, unmet in all five ways, with one of them a warning."""
    rows = (GOOD[::2] * 2)[:150] + GOOD[1:41:2] + [LONG]
    report = check(rows, min_rows=1000, min_rows_per_class=50, warnings=(name,))
    assert [outcome.name for outcome in report.warnings] == [name]
    assert len(report.errors) == 4


def test_all_errors_are_raised_together_and_with_the_place_of_the_report() -> None:
    report = check([*GOOD, LONG, ("a row", SECRET)], min_rows=500)
    error = refusal(lambda: report.raise_for_errors("out/report.html"), ValidationFailed)
    assert error.expected == "500 to 10,000,000 rows and texts of 1 to 10,000 characters and labels among bad, good"
    assert all(f"({name})" in error.found for name in ("row_count", "text_length", "labels"))
    assert error.todo.endswith("report: out/report.html")


@pytest.mark.parametrize(
    ("previous", "met"),
    [
        ({"bad": 100, "good": 100}, True),
        ({"bad": 10, "good": 10}, True),  # shares, not counts
        ({"bad": 60, "good": 40}, True),  # KL 0.020 nats
        ({"bad": 75, "good": 25}, False),  # 0.144
        ({"bad": 1, "good": 99}, False),
    ],
)
def test_class_balance_is_compared_with_the_last_data(previous: dict[str, int], met: bool) -> None:
    assert ("class_balance" not in unmet(check(GOOD, previous))) is met


def test_class_balance_reports_the_divergence() -> None:
    """0.5 ln(0.5/0.75) + 0.5 ln(0.5/0.25) = 0.1438."""
    assert unmet(check(GOOD, {"bad": 75, "good": 25})) == {"class_balance": "0.144 nats"}


@pytest.mark.parametrize("previous", [None, {"bad": 100, "awful": 100}], ids=["first data", "other labels"])
def test_class_balance_needs_comparable_data(previous: dict[str, int] | None) -> None:
    assert "class_balance" not in [outcome.name for outcome in check(GOOD, previous).outcomes]


UNSEEMLY = [*GOOD, LONG, (SECRET, "bad"), (f"{SECRET} twice", "good"), (f"{SECRET} twice", "good"), ("one", SECRET)]


def test_report_shows_no_row_and_no_undeclared_label() -> None:
    report = check(UNSEEMLY, max_characters=50, max_duplicate_share=0)
    shown = report.html + report.result + repr(report.outcomes)
    words = {word for text, _ in UNSEEMLY for word in text.split() if word.startswith("word")}
    assert set(unmet(report)) >= {"text_length", "labels", "duplicates"}  # there was something to show
    assert SECRET not in shown
    assert [word for word in words if word in shown] == []


def test_samples_are_shown_on_request() -> None:
    report = check(UNSEEMLY, show=True)
    assert SECRET in report.html
    assert SECRET in report.result


def test_samples_decide_nothing() -> None:
    def verdicts(outcomes: tuple[Outcome, ...]) -> list[tuple[str, bool]]:
        return [(outcome.name, outcome.met) for outcome in outcomes]

    assert verdicts(check(UNSEEMLY).outcomes) == verdicts(check(UNSEEMLY, show=True).outcomes)


def test_page_names_every_column_that_was_checked() -> None:
    page = check(GOOD).html
    assert page.lstrip().lower().startswith("<!doctype html")
    assert all(name in page for name in ("characters", "label", "rows_of_class", "content"))
