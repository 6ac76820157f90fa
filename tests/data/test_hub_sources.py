"""Hub data sets, read offline from a copy in the layout of the hub's own cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.config import Columns, DataConfig
from components.data import sources
from tests.data.refusal import SECRET, refusal

OLD, NEW = "a" * 40, "b" * 40
TEXTS = [f"text number {number}" for number in range(6)]
CARD = """---
dataset_info:
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': calm
          '1': upset
---
"""


def csv(labels: list[str]) -> str:
    return "text,label\n" + "".join(f"{text},{label}\n" for text, label in zip(TEXTS, labels, strict=True))


@pytest.fixture
def snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the cached revisions of `owner/name`; `main` is NEW, and OLD has other labels."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    root = tmp_path / "hub" / "datasets--owner--name"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(NEW)
    for revision, labels in {OLD: ["x", "y"] * 3, NEW: ["0", "1"] * 3}.items():
        folder = root / "snapshots" / revision
        folder.mkdir(parents=True)
        (folder / "train.csv").write_text(csv(labels))
    return root / "snapshots"


@pytest.mark.parametrize(
    ("revision", "answered", "labels"),
    [(None, NEW, ["0", "1"] * 3), (OLD, OLD, ["x", "y"] * 3)],
    ids=["main", "pinned"],
)
def test_revision_decides_what_is_read(snapshots: Path, revision: str | None, answered: str, labels: list[str]) -> None:
    rows = sources.read(DataConfig(source="owner/name", revision=revision))
    assert rows.revision == answered
    assert rows.table.to_dict() == {"text": TEXTS, "label": labels}


def test_part_decides_what_is_read(snapshots: Path) -> None:
    (snapshots / NEW / "test.csv").write_text("text,label\nheld out,1\nas well,0\n")
    rows = sources.read(DataConfig(source="owner/name", part="test"))
    assert rows.table["text"] == ["held out", "as well"]


def test_class_names_of_the_card_become_the_labels(snapshots: Path) -> None:
    (snapshots / NEW / "README.md").write_text(CARD)
    assert sources.read(DataConfig(source="owner/name")).table["label"] == ["calm", "upset"] * 3


def test_rows_that_the_card_leaves_unlabelled_are_refused(snapshots: Path) -> None:
    (snapshots / NEW / "README.md").write_text(CARD)
    (snapshots / NEW / "train.csv").write_text(csv(["0", "1", "-1", "0", "-1", "1"]))
    error = refusal(lambda: sources.read(DataConfig(source="owner/name")))
    assert error.found == "2 rows without one, the first at row 3"


def test_unknown_part_is_refused(snapshots: Path) -> None:
    error = refusal(lambda: sources.read(DataConfig(source="owner/name", part="nope")))
    assert "'nope'" in error.expected


def test_missing_column_is_refused(snapshots: Path) -> None:
    error = refusal(lambda: sources.read(DataConfig(source="owner/name", columns=Columns(label="class"))))
    assert error.found == "columns text, label"


@pytest.mark.parametrize("row", [f"{SECRET},{SECRET}", f"{SECRET},1,more,{SECRET}"], ids=["label", "columns"])
def test_refused_row_of_a_hub_file_is_not_quoted(snapshots: Path, row: str) -> None:
    (snapshots / NEW / "README.md").write_text(CARD)
    (snapshots / NEW / "train.csv").write_text(csv(["0", "1"] * 3) + row + "\n")
    refusal(lambda: sources.read(DataConfig(source="owner/name")))


@pytest.mark.parametrize("source", ["owner/other", "owner/name.git", "o--w/n..me"])
def test_hub_id_that_the_cache_does_not_have_is_refused_offline(snapshots: Path, source: str) -> None:
    error = refusal(lambda: sources.read(DataConfig(source=source)))
    assert source in error.expected
    assert "go online" in error.todo


def test_revision_that_the_cache_does_not_have_is_refused_offline(snapshots: Path) -> None:
    error = refusal(lambda: sources.read(DataConfig(source="owner/name", revision="c" * 40)))
    assert "c" * 40 in error.expected
