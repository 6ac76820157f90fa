"""Digests: equal for equal content, however it is written down or where it lies."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from components import digest


def test_json_digest_does_not_follow_the_order_of_keys() -> None:
    assert digest.of_json({"a": 1, "b": {"c": 2, "d": 3}}) == digest.of_json({"b": {"d": 3, "c": 2}, "a": 1})


@pytest.mark.parametrize("other", [{"a": [2, 1]}, {"a": [1, 2, 3]}, {"a": ["1", 2]}, {"b": [1, 2]}, [1, 2], None])
def test_json_digest_follows_content(other: object) -> None:
    assert digest.of_json({"a": [1, 2]}) != digest.of_json(other)


def test_digest_is_sha256_of_the_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 1000
    (tmp_path / "file").write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    assert digest.of_bytes(content) == digest.of_file(tmp_path / "file") == expected


def files(folder: Path, contents: dict[str, str]) -> list[Path]:
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_text(content)
    return [folder / name for name in contents]


def test_digest_of_files_follows_neither_order_nor_folder(tmp_path: Path) -> None:
    here = files(tmp_path / "here", {"a": "1", "b": "2"})
    there = files(tmp_path / "there", {"b": "2", "a": "1"})
    assert digest.of_files(here) == digest.of_files(there)


@pytest.mark.parametrize("other", [{"a": "1", "b": "3"}, {"a": "1", "c": "2"}, {"a": "2", "b": "1"}, {"a": "1"}])
def test_digest_of_files_follows_names_and_content(tmp_path: Path, other: dict[str, str]) -> None:
    here = files(tmp_path / "here", {"a": "1", "b": "2"})
    assert digest.of_files(here) != digest.of_files(files(tmp_path / "there", other))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a folder `part`, a module `alone` and a folder `other`."""
    for name in ("part/deep/one.py", "part/two.py", "alone.py", "other/three.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    monkeypatch.setattr(digest, "PACKAGE", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["part/deep/one.py", "part/two.py", "alone.py"])
def test_code_digest_follows_every_source_named(package: Path, name: str) -> None:
    before = digest.of_code("part", "alone")
    (package / name).write_text("changed")
    assert digest.of_code("part", "alone") != before


def test_code_digest_follows_moved_sources(package: Path) -> None:
    before = digest.of_code("part")
    (package / "part" / "two.py").rename(package / "part" / "deep" / "two.py")
    assert digest.of_code("part") != before


def test_code_digest_does_not_follow_other_files(package: Path) -> None:
    before = digest.of_code("part", "alone")
    (package / "other" / "three.py").write_text("changed")
    (package / "part" / "two.pyc").write_text("compiled")
    assert digest.of_code("part", "alone") == before


def test_code_digest_knows_our_own_parts() -> None:
    """A part that is misspelt or gone would be an empty digest, and nothing would ever retrain."""
    parts = ["data", "adapters", "training", "evaluation", "registry", "serving", "config"]
    assert len({digest.of_code(part) for part in parts}) == len(parts)
