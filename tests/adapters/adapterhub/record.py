"""Records what AdapterHub's library `adapters` computes, and checks what we export with it.

    python tests/adapters/adapterhub/record.py [--venv DIR] [--out DIR]              write the golden files
    python tests/adapters/adapterhub/record.py [--venv DIR] --check FOLDER [--case CASE]

Any Python from 3.10 runs it and needs nothing installed: `adapters` stands on a transformers of its own (4.57), so the
script makes a virtual environment from REQUIREMENTS, in DIR when that is given (it stays there and is used again), else
in a temporary folder. About 1 GB of packages; pip's own settings apply, for example PIP_FIND_LINKS or
PIP_EXTRA_INDEX_URL to get the torch for CPUs. Recording takes seconds once the environment is there.

**Golden files.** `cases.py` says what is recorded. Below --out (default: the folder `golden` beside this file)

    FAMILY/base/                  the tiny random model, as `save_pretrained` writes it
    FAMILY/inputs.safetensors     what the model is given: input_ids, attention_mask, and those of a decoder;
                                  base.hidden: what it computes without adapters; probe.hidden, probe.logits
    FAMILY/CASE/ADAPTER/          an adapter as `save_adapter` leaves it, in one of its two formats, with its head
    FAMILY/CASE/fusion/           as `save_adapter_fusion` leaves it, with its head; the adapters are beside it
    FAMILY/CASE/case.safetensors  output.hidden: the last hidden state, (batch, tokens, hidden), of the decoder in an
                                  encoder-decoder; output.logits: (batch, labels), where there is a head;
                                  gradient.NAME: derivative of sum(output * probe) by the weight saved as NAME, the
                                  output being logits where there is a head. The probe of a padded token is 0.
    FAMILY/CASE/case.json         which folder holds which adapter, and the versions it was recorded with

All weights, layer norms included, are random and far from their initial values. All in float32, on one thread, in
evaluation mode. Recording twice on one machine gives the same bytes; another kind of CPU may round differently
(below 1e-5 in the outputs).

A gradient that is 0 in theory is a small random number here, so compare it with the largest of its case: the bias of a
fusion's keys shifts all scores of a softmax alike.

**Where AdapterHub 1.3.0 and its papers part,** the recording follows the papers where a setting of AdapterHub does:
- With torch's fused attention ("sdpa", the default) and padding in the batch, GPT-2 masks its prefix out and DistilBERT
  raises the scores of its prefix by 1; without padding, causal decoders (GPT-2, BART) let a token see prefix tokens in
  place of its own nearest ones. "eager" does none of it: cases with prefixes are recorded with it.
- Compacter's weights that layers share are not saved from a bare model (`adapters.init(AutoModel…)`). Those cases are
  recorded from `AutoAdapterModel`, with the model's name before every weight's.
and AdapterHub where no setting does:
- T5 counts prefix tokens as the first positions of the keys: distances to real tokens grow by the prefix length.
- A gate is the mean over all tokens of a row, padding included.
- Prefixes and the norm of `ln_before` are saved under several names, and therefore never as safetensors. Gradients are
  recorded for the names without `.pool.`.

**--check** loads what `components.adapters.adapterhub.save` wrote onto the recorded base with AdapterHub itself,
compares the outputs with those recorded, prints the largest difference and exits 1 when one is above 1e-5. Weights that
AdapterHub finds missing or unexpected, which it would only log, end the check too. With --case, for example
`--case bert/pfeiffer`, FOLDER is the export of that case: an adapter's folder, or for a fusion a folder that holds the
fusion and its adapters, each in a folder of its own at any depth. Without, FOLDER holds exports in folders named as the
cases are, and all of them are checked. Golden files are read from --out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REQUIREMENTS = ("adapters==1.3.0", "transformers==4.57.6", "torch==2.13.0", "numpy==2.4.6", "safetensors==0.8.0")
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
# Nothing is fetched while recording, one thread adds in one order, and no accelerator takes part.
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}


def reference_python(folder: Path) -> Path:
    """The interpreter of the reference environment in `folder`, which is made or completed where needed."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    found = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    installed = {line.split("+")[0] for line in found.splitlines()}  # torch==2.13.0+cpu will do
    if not installed.issuperset(REQUIREMENTS):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    return python


def exports(folder: Path) -> list[tuple[str, Path]]:
    """(case, folder) for every folder FAMILY/CASE below `folder`."""
    return [(f"{path.parent.name}/{path.name}", path) for path in sorted(folder.glob("*/*")) if path.is_dir()]


def arguments_of(options: argparse.Namespace) -> list[str]:
    """Module and command line of the second half, which imports `adapters`."""
    if options.check is None:
        options.out.mkdir(parents=True, exist_ok=True)
        return ["tests.adapters.adapterhub.recording", str(options.out.resolve())]
    pairs = [(options.case, options.check)] if options.case else exports(options.check)
    if not pairs or not all(path.is_dir() for _, path in pairs):
        sys.exit(f"expected exports in {options.check}, found none; name the folder, and with --case its case")
    flat = [text for case, path in pairs for text in (case, str(path.resolve()))]
    return ["tests.adapters.adapterhub.checking", str(options.out.resolve()), *flat]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Record what AdapterHub's library computes, or check with it what we export."
    )
    parser.add_argument(
        "--venv", type=Path, help="where the reference environment is kept; default: a temporary folder"
    )
    parser.add_argument("--out", type=Path, default=HERE / "golden", help="the golden files; default: %(default)s")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="what components.adapters.adapterhub.save wrote")
    parser.add_argument("--case", help="the case that FOLDER is an export of, for example bert/pfeiffer")
    options = parser.parse_args()
    arguments = arguments_of(options)
    with tempfile.TemporaryDirectory() as temporary:
        python = reference_python((options.venv or Path(temporary)).resolve())
        command = [python, "-m", *arguments]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(command, cwd=ROOT, env={**inherited, **QUIET}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
