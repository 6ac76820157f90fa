"""Files that travel as packages: fetched once from the package index, checked against a pinned sha256, cached."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from components import cache, digest
from components.errors import StorageError, StorageUnavailable


@dataclass(frozen=True)
class Archive:
    """One file of one release, pinned by content."""

    project: str
    filename: str
    sha256: str


def fetch(archive: Archive) -> Path:
    """Path of the archive in the cache, downloaded when it is not there yet or is damaged.

    The index is that of `$PIP_INDEX_URL`, else the public one. Nothing is opened or run: the caller gets a file
    whose sha256 is the pinned one.

    Raises StorageError when the index cannot be reached or serves other bytes.
    """
    target = cache.folder() / "pypi" / archive.filename
    if target.is_file() and digest.of_file(target) == archive.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        fresh = Path(folder) / archive.filename
        _download(archive, fresh, target)
        found = digest.of_file(fresh)
        if found != archive.sha256:
            raise StorageError(
                f"{archive.filename} with sha256 {archive.sha256}",
                f"sha256 {found}",
                "the package index served another file: do not use it, and check which index is configured",
            )
        fresh.replace(target)
    return target


def _download(archive: Archive, fresh: Path, target: Path) -> None:
    import requests
    from pypi_simple import PYPI_SIMPLE_ENDPOINT, NoSuchProjectError, PyPISimple

    index = os.environ.get("PIP_INDEX_URL") or PYPI_SIMPLE_ENDPOINT
    try:
        with PyPISimple(index) as client:
            files = {file.filename: file for file in client.get_project_page(archive.project).packages}
            if archive.filename not in files:
                raise StorageError(
                    f"{archive.filename} in the package index",
                    f"{len(files)} other files of {archive.project}",
                    f"put the file into {target.parent} by hand, or set PIP_INDEX_URL to an index that has it",
                )
            client.download_package(files[archive.filename], fresh, verify=False)
    except NoSuchProjectError:
        raise StorageError(
            f"project {archive.project} in the package index", "no such project", "check PIP_INDEX_URL"
        ) from None  # its message holds the index's URL, which may hold a password
    except requests.RequestException as error:
        raise StorageUnavailable(
            f"{archive.filename} from the package index",
            f"{type(error).__name__} while fetching it",
            f"go online once, set PIP_INDEX_URL, or put the file into {target.parent} by hand",
        ) from None
