"""One of two processes that share a batch: `torchrun --nproc-per-node 2 -m tests.adapters.halves BASE OUT METHOD …`."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors.torch import save_file

from tests.adapters.adapted import INPUTS, adapted


def main(base: str, out: str, *methods: str) -> None:
    """Saves, by method, the gradients of one row, which DDP averages with those of the other processes."""
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=60))  # a step takes milliseconds
    accelerator = Accelerator(cpu=True, kwargs_handlers=[patience])
    row = accelerator.process_index
    for method in methods:
        model = accelerator.prepare(adapted(Path(base), method))
        model(**{name: tensor[row : row + 1] for name, tensor in INPUTS.items()}).logits.sum().backward()
        own = accelerator.unwrap_model(model)
        if accelerator.is_main_process:
            found = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
            save_file(found, Path(out) / method)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
