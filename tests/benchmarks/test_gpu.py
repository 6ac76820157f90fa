"""The benchmark for GPUs runs where there is nothing but PyTorch, transformers and PEFT: here on the CPU."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.benchmarks.gpu import RIVALS

ROOT = Path(__file__).parent.parent.parent


def required(*names: str) -> set[str]:
    """These distributions and all that they need, without extras, as installed here."""
    found: set[str] = set()
    wanted = [*names]
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in found:
            continue
        found.add(name)
        needs = map(Requirement, importlib.metadata.requires(name) or [])
        wanted += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def bare_site(folder: Path) -> Path:
    """A folder of links to the files of only these distributions, to be the only one that Python finds packages in."""
    for name in required("torch", "transformers", "peft"):
        distribution = importlib.metadata.distribution(name)
        for file in distribution.files or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return folder


def python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    # -S: no site-packages beside those on the path
    return subprocess.run([sys.executable, "-S", *arguments], env=environment, cwd=site, capture_output=True, text=True)


def test_runs_on_a_bare_machine(tmp_path: Path) -> None:
    site = bare_site(tmp_path)
    assert "No module named 'prefect'" in python(site, "-c", "import prefect").stderr  # else this proves nothing
    out = tmp_path / "gpu.json"
    sizes = ["--layers", "2", "--hidden", "64", "--lengths", "16", "24", "--batch", "2", "--steps", "2"]
    few = ["--epochs", "2", "--repeats", "1", "--device", "cpu", "--out", str(out)]
    done = python(site, "-m", "tests.benchmarks.gpu", *sizes, *few)
    assert done.returncode == 0, done.stderr
    samples = json.loads(out.read_bytes())["samples"]
    assert [(each["length"], each["name"]) for each in samples] == [(n, name) for n in (16, 24) for name in RIVALS]
    assert all(each["tokens_per_second"] > 0 and each["owed"] > 0 for each in samples)
    trained = {each["name"]: each["trained_parameters"] for each in samples}
    assert trained["pfeiffer upper half, ours"] < trained["pfeiffer, ours"] < trained["full, plain"]
    assert trained["pfeiffer, ours"] == trained["pfeiffer, plain"]
