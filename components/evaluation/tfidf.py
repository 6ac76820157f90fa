"""The yardstick: TF-IDF and logistic regression, what a task is worth without any transformer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Yardstick:
    """Class probabilities on the test part, (rows, classes), the seconds it took and the number of its weights."""

    probabilities: npt.NDArray[np.float64]
    seconds: float
    parameters: int


def yardstick(train: Dataset, test: Dataset, labels: Sequence[str], seed: int) -> Yardstick:
    """Fit on words and word pairs of the train part, score the test part.

    Both have columns `text`, [`text_pair`], `label`.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    begin = time.perf_counter()
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2 if len(train) >= 1_000 else 1),
        LogisticRegression(C=10.0, max_iter=1_000, random_state=seed),
    )
    # The products are small: threads would wait for one another, which takes five times the CPU.
    with threadpool_limits(1, user_api="blas"):
        model.fit(_texts(train), train["label"][:])
    probabilities = np.zeros((len(test), len(labels)))
    probabilities[:, model[-1].classes_] = model.predict_proba(_texts(test))
    weights = model[-1].coef_.size + model[-1].intercept_.size
    return Yardstick(probabilities, time.perf_counter() - begin, int(weights))


def _texts(table: Dataset) -> Iterator[str]:
    """In batches: a column makes its rows one by one, which takes ten times as long, and a list of them all memory."""
    for batch in table.iter(batch_size=1_000):
        texts = batch["text"]
        pairs = batch.get("text_pair")
        yield from (f"{text} {pair}" for text, pair in zip(texts, pairs, strict=True)) if pairs else texts
