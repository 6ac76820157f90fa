"""One of two processes that share a batch: `torchrun --nproc-per-node 2 -m tests.adapters.halves BASE OUT METHOD …`."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors.torch import save_file

from tests.adapters.adapted import INPUTS, adapted


def gradients(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By parameter, of one row, averaged by DDP with those of the other processes."""
    row = accelerator.process_index
    together = accelerator.prepare(model)
    together(**{name: both[row : row + 1] for name, both in INPUTS.items()}).logits.sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def main(base: str, out: str, *methods: str) -> None:
    """Save each method's gradients."""
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=60))  # a step takes milliseconds
    accelerator = Accelerator(cpu=True, kwargs_handlers=[patience])
    for method in methods:
        found = gradients(accelerator, adapted(Path(base), method))
        if accelerator.is_main_process:
            save_file(found, Path(out) / method)
        # What DDP holds must end before the group of processes does: as the last to hold it, it would end the group
        # itself, waiting with Python's lock for a thread of gloo's that may be waiting for the lock.
        accelerator.free_memory()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
