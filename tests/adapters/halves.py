"""One of two processes that share a batch: `torchrun --nproc-per-node 2 -m tests.adapters.halves BASE METHOD OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import save_file

from tests.adapters.adapted import INPUTS, adapted


def main(base: str, method: str, out: str) -> None:
    """Saves the gradients of one row, which DDP averages with those of the other processes."""
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(adapted(Path(base), method))
    row = accelerator.process_index
    model(**{name: tensor[row : row + 1] for name, tensor in INPUTS.items()}).logits.sum().backward()
    own = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        save_file({name: p.grad for name, p in own.named_parameters() if p.grad is not None}, out)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
