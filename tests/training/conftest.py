"""What the tests of training share: a saved split of toy rows, and a base whose adapters can learn them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from components.training.spec import DataRef
from tests.conftest import make_base
from tests.training.toy_jobs import saved_split

BF16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this processor"
)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataRef:
    return saved_split(tmp_path_factory.mktemp("split"))


@pytest.fixture(scope="session")
def lively_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights wide enough that the first token sees the others: frozen, the tiny base's own are too small for that."""
    return make_base(tmp_path_factory.mktemp("lively"), initializer_range=0.1)
