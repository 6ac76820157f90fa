"""Does an adapter fit a base? Asked in a process of its own, so that who asks need not import torch.

python -m components.fit BASE ADAPTER MAX_TOKENS        BASE: a folder.  ADAPTER: an AdapterConfig in JSON
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from components import forks
from components.config import AdapterConfig
from components.errors import ConfigError


def problems(base: Path, adapter: AdapterConfig, max_tokens: int) -> list[str]:
    """What of the adapter and the length of texts the base in this folder does not allow, a phrase each.

    Raises ConfigError when no adapter can be added to it at all.
    """
    command = ["-m", "components.fit", str(base), adapter.model_dump_json(), str(max_tokens)]
    done = forks.run(command, os.environ)
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        todo = "save it anew, or name another"
        raise ConfigError(f"a base that transformers can read in {base.name}", last, todo) from None
    if "error" in answer:
        raise ConfigError(*answer["error"])
    return list(answer["problems"])


def main() -> None:
    from components.adapters.methods import misfits

    base, adapter, max_tokens = sys.argv[1:]
    asked = AdapterConfig.model_validate_json(adapter)
    try:
        answer = {"problems": misfits(Path(base), asked.method, asked.settings, int(max_tokens))}
    except ConfigError as error:
        answer = {"error": [error.expected, error.found, error.todo]}
    sys.stdout.write(f"\n{json.dumps(answer)}\n")


if __name__ == "__main__":
    main()
