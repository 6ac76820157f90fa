"""Pictures: that there is one, of what was measured, with words on it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from matplotlib import image
from matplotlib.figure import Figure

from components.evaluation import plots


def measured(*rows: list[float | None], layers: tuple[int, ...] = ()) -> dict[str, Any]:
    numbers = layers or tuple(range(len(rows)))
    places = [
        {"layer": number, "module": f"bert.encoder.layer.{number}.{('attention', 'output')[index % 2]}", "weights": row}
        for index, (number, row) in enumerate(zip(numbers, rows, strict=True))
    ]
    return {"members": ["anna/1", "bruno/3"], "places": places}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_a_heat_map_has_title_axes_members_and_numbers(drawn: list[Figure]) -> None:
    plots.attention(measured([0.25, 0.75], [0.5, 0.5]), "what helped")
    axes = drawn[0].axes[0]
    assert axes.get_title() == "what helped"
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["anna/1", "bruno/3"]
    assert [text.get_text() for text in axes.texts] == ["0.25", "0.75", "0.50", "0.50"]


def test_it_is_a_picture() -> None:
    picture = image.imread(io.BytesIO(plots.attention(measured([0.25, 0.75]), "x")), format="png")
    assert min(picture.shape[:2]) > 100


def test_a_member_without_an_adapter_at_a_place_is_shown_as_absent(drawn: list[Figure]) -> None:
    plots.attention(measured([0.25, 0.75], [None, 1.0]), "x")
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["0.25", "0.75", "–", "1.00"]


def test_its_numbers_can_be_read_on_their_colours(drawn: list[Figure]) -> None:
    """Light is what weighs most, even where all weigh the same, and what is absent has no colour."""
    plots.attention(measured([0.5, 0.5], [0.1, 0.9], [None, 1.0]), "x")
    plots.attention(measured([0.5, 0.5]), "x")
    found = [[text.get_color() for text in figure.axes[0].texts] for figure in drawn]
    assert found == [["white", "white", "white", "black", "black", "black"], ["black", "black"]]


def test_places_in_one_layer_are_told_apart(drawn: list[Figure]) -> None:
    plots.attention(measured([0.5, 0.5], [0.5, 0.5], [1.0, 0.0], layers=(0, 0, 1)), "x")
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert labels == ["0 attention", "0 output", "1"]
