"""Models that answer the same rows: found by name, loaded, and on one base together where they can be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from components.config import RegistryConfig
from components.errors import ConfigError
from components.registry import bundle, tracking, versions
from components.serving import classifier, fleet

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from datasets import Dataset

    from components.serving.classifier import Classifier
    from components.serving.fleet import Fleet

SCHEME = "models:/"
NUMBERED = re.compile(r"[^./][^/]*/\d+")  # NAME/3


@dataclass(frozen=True)
class Models:
    """Made by `loaded`. labels: by model, in the order in which they were named."""

    labels: Mapping[str, tuple[str, ...]]
    fleets: Sequence[Fleet]
    alone: Mapping[str, Classifier]

    def answers(self, rows: Dataset) -> dict[str, npt.NDArray[np.float32]]:
        """(rows, classes) by model. rows: string columns `text` and, for pairs, `text_pair`."""
        found = {name: each.of_rows(rows) for name, each in self.alone.items()}
        for each in self.fleets:
            found |= each.answers(rows)
        return {name: found[name] for name in self.labels}


def is_registered(reference: str) -> bool:
    """A version of a registered model, not a folder."""
    named = "@" in reference or NUMBERED.fullmatch(reference)
    return reference.startswith(SCHEME) or (bool(named) and not Path(reference).exists())


def loaded(references: Sequence[str], device: str = "cpu") -> Models:
    """NAME@ALIAS, NAME/3, both also after models:/, or folders of bundles; a registered one must be proven, and is
    compared with what was registered byte for byte.

    Raises RegistryError, BundleError or BaseModelError when one is not there or not right, ConfigError when two have
    one name.
    """
    with _folders(references) as folders:
        manifests = {name: bundle.read_manifest(folder) for name, folder in folders.items()}
        together = fleet.groups(folders, manifests)
        shared = {name for group in together for name in group}
        return Models(
            {name: manifest.labels for name, manifest in manifests.items()},
            [fleet.load(group, device) for group in together],
            {name: classifier.load(folder, device) for name, folder in folders.items() if name not in shared},
        )


@contextmanager
def _folders(references: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Where the bundles lie, by the names that their columns get, for the length of the block."""
    found: list[tuple[str, str, Path]] = []
    with TemporaryDirectory() as temporary:
        there = tracking.connect(RegistryConfig()) if any(map(is_registered, references)) else None
        for number, reference in enumerate(references):
            if there is None or not is_registered(reference):
                folder = Path(reference)
                found.append((folder.resolve().name, reference, folder))
                continue
            version = versions.find(there, reference.removeprefix(SCHEME))
            folder, _ = versions.bundle_of(there, version, Path(temporary) / str(number))
            found.append((version.name, f"{version.name}-{version.number}", folder))
        names = [name for name, _, _ in found]
        named = {longer if names.count(name) > 1 else name: folder for name, longer, folder in found}
        if len(named) < len(found):
            raise ConfigError("different models", ", ".join(references), "name each once")
        yield named
