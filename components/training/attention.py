"""Which member of a fusion counted where: the weights that it gave them on real texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from components.adapters.layer import Site
from components.methods import Member
from components.training.batching import Tokens, bounded_batches, collate


def measure(
    model: Any, members: Sequence[Member], tokens: Tokens, padding: int, device: torch.device
) -> dict[str, Any]:
    """Means over all tokens that are not padding, one row a place, lowest layer first; a row sums to 1.

    members: in the order of the columns. `null` stands for a member without an adapter at that place.
    """
    name = model.active_adapter
    sites = [
        (path.removeprefix("base_model.model."), site) for path, site in model.named_modules()
        if isinstance(site, Site) and name in site.bottleneck_fusions
    ]  # fmt: skip
    totals, count = [torch.zeros(()) for _ in sites], 0
    model.eval()
    with torch.inference_mode():
        for rows in bounded_batches(tokens.lengths):
            inputs = collate(tokens, rows, padding, device)
            model(**inputs)
            kept = inputs["attention_mask"].unsqueeze(-1)
            count += int(kept.sum())
            for index, (_, site) in enumerate(sites):
                seen = site.bottleneck_fusions[name].seen
                totals[index] = totals[index] + (seen * kept).double().sum((0, 1)).cpu()
    places = []
    for (path, site), total in zip(sites, totals, strict=True):
        weights = dict(zip(site.bottleneck_fusions[name].children_names, (total / count).tolist(), strict=True))
        places.append({"layer": site.index, "module": path, "weights": [weights.get(each.digest) for each in members]})
    return {"members": [str(member) for member in members], "places": places}
