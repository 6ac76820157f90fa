"""Pictures of measurements, as PNG."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from typing import Any


def attention(measured: Mapping[str, Any], title: str) -> bytes:
    """How much each member of a fusion counted at each place, as a heat map: members across, layers down.

    measured: as `components.training.attention.measure` gives it.
    """
    import numpy as np
    from matplotlib.figure import Figure  # without pyplot, which is for one thread and a screen

    names, places = measured["members"], measured["places"]
    weights = np.array([place["weights"] for place in places], dtype=float)  # None becomes nan
    figure = Figure(figsize=(2.5 + 1.5 * len(names), 2 + 0.45 * len(places)), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    image = axes.imshow(weights, cmap="viridis", vmin=0, aspect="auto")
    axes.set_title(title)
    axes.set_xlabel("member (model/version)")
    axes.set_ylabel("layer, from 0")
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axes.set_yticks(range(len(places)), _names(places))
    middle = np.nanmax(weights) / 2  # of the colours, which begin at 0
    for (row, column), weight in np.ndenumerate(weights):
        shown = "–" if np.isnan(weight) else f"{weight:.2f}"
        axes.text(column, row, shown, ha="center", va="center", color="white" if weight <= middle else "black")
    figure.colorbar(image, label="mean attention weight of a token (a row sums to 1)")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _names(places: list[dict[str, Any]]) -> list[str]:
    """The layers' numbers, with the module where a layer has several places."""
    count = Counter(place["layer"] for place in places)
    found = []
    for place in places:
        number, module = str(place["layer"]), place["module"]
        found.append(number if count[place["layer"]] == 1 else f"{number} {module.rpartition(f'.{number}.')[2]}")
    return found
