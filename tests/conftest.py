"""What tests share: a tiny random base model, toy rows whose labels can be learned, the real data if it is there."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for a hub must fail at once, on every machine
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests run side by side, and threads that want the same cores spin in wait for each other: three times the CPU. What is
# to compute with several threads is told so, and does.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"

GOOD = ["lovely", "great", "wonderful", "happy", "superb", "delightful", "charming", "brilliant"]
BAD = ["awful", "terrible", "horrible", "sad", "dreadful", "nasty", "gloomy", "broken"]
PLAIN = [f"word{number}" for number in range(80)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", action="store_true", help="print a table of the faults that were tried")


def pytest_configure(config: pytest.Config) -> None:
    """Worker processes have it too: what their tests try travels with the reports."""
    if config.getoption("--faults"):
        from tests.faults.table import Table

        config.pluginmanager.register(Table())


def toy_rows(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label), `bad` and `good` in turn; two telling words among eight plain ones, all texts unlike."""
    rng = random.Random(seed)  # noqa: S311  # not for secrets
    rows = []
    for number in range(count):
        label = ("bad", "good")[number % 2]
        words = rng.sample(PLAIN, 8) + rng.sample(BAD if label == "bad" else GOOD, 2)
        rng.shuffle(words)
        rows.append((" ".join(words), label))
    return rows


def write_csv(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("text", "label")) -> Path:
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


@pytest.fixture
def toy_csv(tmp_path: Path) -> Path:
    """400 toy rows as CSV."""
    return write_csv(tmp_path / "toy.csv", toy_rows(400))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers and hidden size 32 with random weights and a tokenizer that knows the toy words."""
    return make_base(tmp_path_factory.mktemp("base"))


def make_base(folder: Path, family: str = "bert", **settings: object) -> Path:
    """Save a tiny random model of a family, with a word-level tokenizer, as `save_pretrained` does."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *GOOD, *BAD, *PLAIN])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 70,
        "pad_token_id": 0,
        "initializer_range": 0.1,  # with BERT's 0.02 the features of random layers are too alike to learn from
    }
    if family == "distilbert":
        sizes["hidden_dim"] = sizes.pop("intermediate_size")  # the only size that it does not also know by BERT's name
    config = AutoConfig.for_model(family, **{**sizes, **settings})
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables and nothing in them, to be copied: to make them takes seconds."""
    from components.registry import tracking

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    tracking.load_mlflow(f"sqlite:///{path}").MlflowClient().search_registered_models()
    return path


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Path of a real data file; the test is skipped, with the reason printed, where it is absent."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.is_file():
            pytest.skip(f"real data {name} is not beside this checkout")
        return path

    return find
