"""The base model: found where it is said to be, pinned by content, refused when it is another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components import base_model
from components.base_model import BasePin
from components.config import BaseConfig
from components.errors import BaseModelError
from tests.conftest import make_base

# Of all-MiniLM-L6-v2 as published: whatever serves the archive, these are the bytes that adapters stand on.
MINILM_WEIGHTS = "a05327124c8b9ae711d869e8d8db2b439fd876925a8a67f3873367db9a3365f2"
MINILM_TOKENIZER = "3e5bb314041c8369d1075408ba317fab271d872651ac61227602faf782d5aa65"
LABELS = ("bad", "good")


@pytest.fixture
def copied(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base in a folder that a test may change."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def found(name: Path | str, **settings: str) -> base_model.BaseModel:
    return base_model.find(BaseConfig.model_validate({"name": str(name), **settings}))


def test_the_embedded_model_is_the_pinned_one() -> None:
    pin = found("minilm").pin
    assert (pin.weights_sha256, pin.tokenizer_sha256) == (MINILM_WEIGHTS, MINILM_TOKENIZER)


def test_the_embedded_model_unpacks_only_what_a_model_needs() -> None:
    names = {path.name for path in found("minilm").path.iterdir()}
    assert names <= {*base_model.MODEL_FILES, *base_model.TOKENIZER_FILES}


def test_the_embedded_tokenizer_neither_cuts_nor_pads() -> None:
    """As published it is set to cut at 128 tokens and to pad to 128."""
    tokenizer = base_model.load_tokenizer(found("minilm"))
    short, long = tokenizer(["one", "word " * 400])["input_ids"]
    assert (len(short), len(long)) == (3, 402)


def test_a_local_folder_is_found(tiny_base: Path) -> None:
    assert found(tiny_base).path == tiny_base


def test_equal_files_have_equal_pins_wherever_they_lie(tiny_base: Path, copied: Path) -> None:
    one, other = found(tiny_base).pin, found(copied).pin
    assert (one.weights_sha256, one.tokenizer_sha256) == (other.weights_sha256, other.tokenizer_sha256)


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("model.safetensors", (True, False)),
        ("config.json", (True, False)),
        ("tokenizer.json", (False, True)),
        ("tokenizer_config.json", (False, True)),
        ("README.md", (False, False)),
    ],
)
def test_pins_follow_the_files_that_matter(copied: Path, file: str, changed: tuple[bool, bool]) -> None:
    before = found(copied).pin
    with (copied / file).open("ab") as content:
        content.write(b"\n")
    after = found(copied).pin
    assert (before.weights_sha256 != after.weights_sha256, before.tokenizer_sha256 != after.tokenizer_sha256) == changed


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.safetensors", r"\*\.safetensors in base model folder base; found config\.json, tokenizer"),
        ("config.json", r"config\.json and .* found model\.safetensors, tokenizer"),
        ("tokenizer.json", r"a tokenizer, one of tokenizer\.json"),
    ],
)
def test_an_incomplete_folder_is_refused(copied: Path, missing: str, message: str) -> None:
    (copied / missing).unlink()
    with pytest.raises(BaseModelError, match=message):
        found(copied)


def test_pickled_weights_alone_are_refused(copied: Path) -> None:
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"\*\.safetensors.*pytorch_model\.bin"):
        found(copied)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="an empty folder"):
        found(tmp_path)


def test_a_hub_model_needs_a_revision() -> None:
    with pytest.raises(BaseModelError, match=r"set base\.revision"):
        found("some-team/some-model")


def test_a_hub_model_cannot_be_had_offline() -> None:
    with pytest.raises(BaseModelError, match=r"some-team/some-model at revision 0123abc.*go online"):
        found("some-team/some-model", revision="0123abc")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nor/this", "neither", "too/many/parts"])
def test_a_name_that_leads_nowhere_is_refused(name: str) -> None:
    with pytest.raises(BaseModelError, match="minilm, a folder, or a hub id"):
        found(name)


def test_the_right_pin_is_accepted(tiny_base: Path) -> None:
    pin = found(tiny_base).pin
    assert found(tiny_base, weights_sha256=pin.weights_sha256).pin == pin


def test_a_wrong_pin_names_both_digests(tiny_base: Path) -> None:
    with pytest.raises(BaseModelError, match=rf"000000000000; found {found(tiny_base).pin.weights_sha256[:12]}"):
        found(tiny_base, weights_sha256="0" * 64)


@pytest.mark.parametrize("what", ["weights", "tokenizer"])
def test_a_base_with_another_digest_is_not_the_pinned_one(tiny_base: Path, what: str) -> None:
    pin = found(tiny_base).pin.model_copy(update={f"{what}_sha256": "0" * 64})
    with pytest.raises(BaseModelError, match=f"{what} digest 000000000000"):
        base_model.find_pinned(pin)


def elsewhere(pin: BasePin) -> BasePin:
    return pin.model_copy(update={"name": "/where/it/was/trained"})


def test_a_base_that_lies_elsewhere_is_found_by_the_variable(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(base_model.PATH_VARIABLE, str(tiny_base))
    pin = elsewhere(found(tiny_base).pin)
    located = base_model.find_pinned(pin)
    assert (located.path, located.pin) == (tiny_base, pin)


def test_the_variable_does_not_loosen_the_pin(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(base_model.PATH_VARIABLE, str(make_base(tmp_path, initializer_range=0.05)))
    with pytest.raises(BaseModelError, match="weights digest"):
        base_model.find_pinned(elsewhere(found(tiny_base).pin))


def test_truncation_and_padding_saved_with_a_tokenizer_are_reset(copied: Path) -> None:
    from tokenizers import Tokenizer

    saved = Tokenizer.from_file(str(copied / "tokenizer.json"))
    saved.enable_truncation(4)
    saved.enable_padding(length=16)
    saved.save(str(copied / "tokenizer.json"))
    rows = base_model.load_tokenizer(found(copied))(["word1", "word1 word2 word3 word4 word5"])["input_ids"]
    assert [len(row) for row in rows] == [3, 7]


def test_a_control_token_in_a_text_is_text(tiny_base: Path) -> None:
    tokenizer = base_model.load_tokenizer(found(tiny_base))
    ids = tokenizer("word1 [SEP] word2")["input_ids"]
    assert (ids.count(tokenizer.sep_token_id), ids.count(tokenizer.unk_token_id)) == (1, 3)


@pytest.mark.parametrize(
    ("of_config", "of_tokenizer", "expected"),
    [(3, "[PAD]", 3), (None, "[PAD]", 0), (-1, "[MASK]", 4), (None, None, 2)],
)
def test_rows_are_filled_up_with_what_the_model_takes_for_padding(
    tmp_path: Path, of_config: int | None, of_tokenizer: str | None, expected: int
) -> None:
    """Many decoders have no token for padding; then it is the one that ends a text, here [CLS]."""
    make_base(tmp_path, "gpt2")
    for name, about in (
        ("config.json", {"pad_token_id": of_config}),
        ("tokenizer_config.json", {"pad_token": of_tokenizer, "eos_token": "[CLS]"}),
    ):
        path = tmp_path / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **about}))
    base = found(tmp_path)
    model, _ = base_model.load_classifier(base, LABELS)
    assert (base_model.padding(base), model.config.pad_token_id) == (expected, expected)

    rows = [[7, 8, 9, 10], [11, 12]]
    model.eval()
    together = model(torch.tensor([rows[0], rows[1] + 2 * [expected]])).logits
    assert torch.allclose(together, torch.cat([model(torch.tensor([row])).logits for row in rows]), atol=1e-5)


def heads(folder: Path, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    model, names = base_model.load_classifier(found(folder), LABELS)
    assert names == ("classifier",)
    weights: torch.Tensor = model.get_submodule(names[0]).weight
    return weights


def test_the_head_is_drawn_from_the_seed(tiny_base: Path) -> None:
    assert torch.equal(heads(tiny_base, 1), heads(tiny_base, 1))
    assert not torch.equal(heads(tiny_base, 1), heads(tiny_base, 2))


def test_the_transformer_is_that_of_the_checkpoint(tiny_base: Path) -> None:
    model, _ = base_model.load_classifier(found(tiny_base), LABELS)
    saved = load_file(tiny_base / "model.safetensors")
    loaded = model.base_model.state_dict()
    assert [name for name, tensor in saved.items() if not torch.equal(tensor, loaded[name])] == []


def test_labels_are_known_to_the_model(tiny_base: Path) -> None:
    model, _ = base_model.load_classifier(found(tiny_base), ("x", "y", "z"))
    assert model.config.id2label == {0: "x", 1: "y", 2: "z"}


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet"])
def test_attention_dropout_is_off(tmp_path: Path, family: str) -> None:
    model, _ = base_model.load_classifier(found(make_base(tmp_path, family)), LABELS)
    settings = [getattr(model.config, name) for name in base_model.ATTENTION_DROPOUT if hasattr(model.config, name)]
    assert settings == [0.0]


def test_a_pin_is_described_by_flat_tags(tiny_base: Path) -> None:
    assert all(isinstance(value, str) for value in base_model.describe(found(tiny_base).pin).values())


@pytest.mark.parametrize("labels", [("bad", "good"), ("bad", "good", "plain")])
def test_the_head_of_a_checkpoint_that_is_a_classifier_is_trained_anew(
    tiny_base: Path, tmp_path: Path, labels: tuple[str, ...]
) -> None:
    model, _ = base_model.load_classifier(base_model.find(BaseConfig(name=str(tiny_base))), ("bad", "good"))
    model.save_pretrained(tmp_path)
    base_model.load_tokenizer(base_model.find(BaseConfig(name=str(tiny_base)))).save_pretrained(tmp_path)
    again, head = base_model.load_classifier(base_model.find(BaseConfig(name=str(tmp_path))), labels)
    assert head == ("classifier",)
    assert again.classifier.out_features == len(labels)
