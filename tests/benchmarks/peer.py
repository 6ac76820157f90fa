"""The virtual environment of the peer: AdapterHub's library, which stands on a transformers of its own (4.57).

Made once below the benchmark's folder and used again. torch comes from a folder of wheels that pip is configured to
look at, if it has one, else as the CPU build from where uv finds it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = ("adapters==1.3.0", "torch==2.13.0", "accelerate>=1.15,<1.16", "numpy>=2.4,<2.5")


def python(folder: Path) -> str:
    """The environment's Python, with everything in it."""
    path, done = folder / "bin" / "python", folder / "installed"
    if not done.is_file() or done.read_text() != "\n".join(REQUIREMENTS):
        uv = _uv()
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", str(path), *_torch_source(), *REQUIREMENTS]
        subprocess.run(install, check=True)
        done.write_text("\n".join(REQUIREMENTS))
    return str(path)


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.is_file() else shutil.which("uv")
    if not found:
        raise SystemExit("expected uv beside this Python or on PATH; found none; run make install")
    return found


def _torch_source() -> list[str]:
    """As the Makefile's TORCH_SOURCE, but always the CPU build."""
    folders = os.environ.get("PIP_FIND_LINKS")
    if not folders:
        asked = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
        folders = subprocess.run(asked, capture_output=True, text=True).stdout
    for folder in folders.split():
        if any(Path(folder).glob("torch-2.13*")):
            return ["--find-links", folder]
    return ["--torch-backend=cpu"]
