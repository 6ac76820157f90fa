"""Expectations that rows must meet before anything is trained, checked with Great Expectations.

Great Expectations sees measurements of the rows (lengths, hashes, declared labels), never their text, so neither the
Data Docs page nor the JSON result can show any. Only `show_samples` lets the text in.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from components.config import ValidationConfig
from components.data.rows import row_ids
from components.data.spool import ROWS, batches
from components.errors import ValidationFailed

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

OTHER = "(not a declared label)"
SAMPLES = 20


@dataclass(frozen=True)
class Expectation:
    """One rule: what Great Expectations is to check, and how a person is told of its result."""

    name: str
    checks: tuple[Any, ...]
    expected: str
    found: Callable[[list[dict[str, Any]]], str]


@dataclass(frozen=True)
class Outcome:
    """What came of one expectation."""

    name: str
    severity: str
    met: bool
    expected: str
    found: str


@dataclass(frozen=True)
class Report:
    """All outcomes, the Data Docs page and the full JSON result."""

    outcomes: tuple[Outcome, ...]
    html: str
    result: str

    @property
    def errors(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.met and outcome.severity == "error"]

    @property
    def warnings(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.met and outcome.severity == "warning"]

    def raise_for_errors(self, place: str) -> None:
        """Raise ValidationFailed naming every unmet expectation of severity `error`; `place` is where the report is."""
        if self.errors:
            raise ValidationFailed(
                " and ".join(outcome.expected for outcome in self.errors),
                "; ".join(f"{outcome.found} ({outcome.name})" for outcome in self.errors),
                f"correct the rows, or the bounds under `validation`; report: {place}",
            )


def validate(
    rows: Dataset,
    labels: Sequence[str],
    config: ValidationConfig,
    previous: dict[str, int] | None = None,
    show_samples: bool = False,
) -> Report:
    """Check rows against all expectations.

    rows: string columns `text`, [`text_pair`], `label`.  previous: rows per label of the last accepted data set.
    """
    frame = _measurements(rows, labels, show_samples)
    expectations = _expectations(frame, labels, config, previous)
    severity = {each.name: "warning" if each.name in config.warnings else "error" for each in expectations}
    results, html, document = _run(frame, expectations, severity, show_samples)
    outcomes = []
    for each in expectations:
        mine = [result for result in results if result["expectation_config"]["meta"]["name"] == each.name]
        met = bool(mine) and len(mine) == len(each.checks) and all(result["success"] for result in mine)
        found = each.found([result["result"] for result in mine])
        outcomes.append(Outcome(each.name, severity[each.name], met, each.expected, found))
    return Report(tuple(outcomes), html, document)


def _measurements(rows: Dataset, labels: Sequence[str], show_samples: bool) -> pd.DataFrame:
    """Numbers only, and few bytes of them a row; but with `show_samples` the texts and labels themselves."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = {"text": "characters", "text_pair": "pair_characters"}
    lengths = {name: column for name, column in lengths.items() if name in rows.column_names}
    columns = {column: np.empty(len(rows), dtype=np.int32) for column in lengths.values()}
    columns["content"] = np.empty(len(rows), dtype=np.uint64)
    code = np.empty(len(rows), dtype=np.int32)
    for number, batch in enumerate(batches(rows)):
        place = slice(number * ROWS, number * ROWS + len(batch))
        columns["content"][place] = row_ids(batch)
        code[place] = pc.fill_null(pc.index_in(batch["label"], value_set=pa.array(labels)), len(labels)).to_numpy()
        for name, column in lengths.items():
            columns[column][place] = pc.utf8_length(pc.utf8_trim_whitespace(batch[name])).to_numpy()
    of_class = np.append(np.bincount(code, minlength=len(labels) + 1)[:-1], np.nan)
    label = pd.Series(pd.Categorical.from_codes(code, pd.Index([*labels, OTHER]))).cat.remove_unused_categories()
    frame = pd.DataFrame({"label": label, **columns, "rows_of_class": of_class[code]}, copy=False)
    if show_samples:
        table = rows.data.table
        frame["label"], frame["text"] = table["label"].to_pandas(), table["text"].to_pandas()
    return frame


def _expectations(
    frame: pd.DataFrame, labels: Sequence[str], config: ValidationConfig, previous: dict[str, int] | None
) -> list[Expectation]:
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    from great_expectations import expectations as gx

    low, high = config.min_characters, config.max_characters
    lengths = [name for name in ("characters", "pair_characters") if name in frame.columns]
    outside = (frame[lengths].lt(low) | frame[lengths].gt(high)).any(axis=1)
    other = ~frame["label"].isin(list(labels))
    checks = [
        Expectation(
            "columns",
            (gx.ExpectTableColumnsToMatchSet(column_set=["label", *lengths], exact_match=False),),
            "text and label columns",
            lambda results: "them" if results else "nothing",
        ),
        Expectation(
            "row_count",
            (gx.ExpectTableRowCountToBeBetween(min_value=config.min_rows, max_value=config.max_rows),),
            f"{config.min_rows:,} to {config.max_rows:,} rows",
            lambda results: f"{len(frame):,} rows",
        ),
        Expectation(
            "text_length",
            (
                *(gx.ExpectColumnValuesToBeBetween(column=name, min_value=low, max_value=high) for name in lengths),
                *([gx.ExpectColumnValueLengthsToBeBetween(column="text", max_value=high)] if "text" in frame else []),
            ),
            f"texts of {low:,} to {high:,} characters",
            lambda results: _outside(frame, outside, lengths),
        ),
        Expectation(
            "labels",
            (gx.ExpectColumnValuesToBeInSet(column="label", value_set=list(labels)),),
            f"labels among {', '.join(labels)}",
            lambda results: f"{other.sum():,} rows with another one{_first(other)}" if other.any() else "only those",
        ),
        Expectation(
            "rows_per_class",
            (
                gx.ExpectColumnDistinctValuesToContainSet(column="label", value_set=list(labels)),
                gx.ExpectColumnMinToBeBetween(column="rows_of_class", min_value=config.min_rows_per_class),
            ),
            f"at least {config.min_rows_per_class:,} rows of each class",
            lambda results: _per_class(frame, labels),
        ),
        Expectation(
            "duplicates",
            (
                gx.ExpectColumnProportionOfUniqueValuesToBeBetween(
                    column="content", min_value=1 - config.max_duplicate_share
                ),
            ),
            f"at most {config.max_duplicate_share:.0%} exact duplicates",
            lambda results: f"{1 - frame['content'].nunique() / len(frame):.1%}",
        ),
    ]
    if previous is not None and set(previous) == set(labels):
        total = sum(previous.values())
        weights = [previous[name] / total for name in labels]
        checks.append(
            Expectation(
                "class_balance",
                (
                    gx.ExpectColumnKLDivergenceToBeLessThan(
                        column="label",
                        partition_object={"values": list(labels), "weights": weights},
                        threshold=config.max_class_divergence,
                    ),
                ),
                f"class balance within {config.max_class_divergence} nats (KL) of the last accepted data",
                _balance,
            )
        )
    return checks


def _run(
    frame: pd.DataFrame, expectations: list[Expectation], severity: dict[str, str], show_samples: bool
) -> tuple[list[dict[str, Any]], str, str]:
    import great_expectations as gx
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    suite = gx.ExpectationSuite(name="labelled rows")
    for each in expectations:
        for check in each.checks:
            check.meta = {"name": each.name}
            check.severity = "critical" if severity[each.name] == "error" else "warning"
            suite.add_expectation(check)
    asset = context.data_sources.add_pandas("rows").add_dataframe_asset("measurements")
    definition = gx.ValidationDefinition(
        name="labelled rows",
        data=asset.add_batch_definition_whole_dataframe("all"),
        suite=context.suites.add(suite),
    )
    validation = context.validation_definitions.add(definition).run(
        batch_parameters={"dataframe": frame},
        result_format={"result_format": "BASIC", "partial_unexpected_count": SAMPLES if show_samples else 0},
    )
    for result in validation.results:  # the page cannot render NumPy numbers
        if hasattr(value := result.result.get("observed_value"), "item"):
            result.result["observed_value"] = value.item()
    document = validation.to_json_dict()
    page = DefaultJinjaPageView().render(ValidationResultsPageRenderer().render(validation))
    return document["results"], str(page), json.dumps(document, indent=2)


def _outside(frame: pd.DataFrame, outside: pd.Series[bool], lengths: list[str]) -> str:
    if not outside.any():
        return f"{frame[lengths].min().min():,} to {frame[lengths].max().max():,} characters"
    longest = int(frame.loc[outside, lengths].iloc[0].max())
    return f"{outside.sum():,} rows outside{_first(outside)}, of {longest:,} characters"


def _per_class(frame: pd.DataFrame, labels: Sequence[str]) -> str:
    counts = frame["label"].value_counts()
    fewest = min(labels, key=lambda name: int(counts.get(name, 0)))
    return f"{int(counts.get(fewest, 0)):,} of class {fewest}"


def _balance(results: list[dict[str, Any]]) -> str:
    value = results[0].get("observed_value") if results else None
    return "classes the last data did not have" if value is None else f"{value:.3f} nats"


def _first(mask: pd.Series[bool]) -> str:
    """Counted from 1 and without the header, as the reader of a file counts its rows."""
    return f", the first in row {int(mask.to_numpy().argmax()) + 1:,}"
