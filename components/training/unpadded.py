"""Batches without padding, for models whose answers would depend on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from components.adapters.parameters import is_adapted


def unpadded(
    model: Any, batches: Iterable[npt.NDArray[np.int64]], lengths: npt.NDArray[np.int64]
) -> Iterator[npt.NDArray[np.int64]]:
    """The same batches, of row numbers in order of length; where padding counts, cut to rows of one length each.

    A gate is the mean over all tokens of a row, padding included: so AdapterHub computes it, whose adapters are to
    answer here as they do there. Beside a longer text the same one would be answered otherwise. lengths: (rows,).
    """
    counts = is_adapted(model) and any(getattr(each, "use_gating", False) for each in model.peft_config.values())
    for batch in batches:
        yield from np.split(batch, np.flatnonzero(np.diff(lengths[batch])) + 1) if counts else (batch,)
