"""Many bundles at work on one base: the base is once in memory, and runs once over rows of any of them.

fleet = load({"mood": Path("bundles/mood"), "topic": Path("bundles/topic")})
fleet.probabilities(["What a day!", "The match was late."], ["mood", "topic"])     # each text by one
fleet.answers(table(["What a day!"]))                                              # each text by all
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from components import base_model
from components.errors import BundleError, ConfigError
from components.registry import bundle
from components.serving.classifier import table

if TYPE_CHECKING:
    from datasets import Dataset

    from components.base_model import BaseModel, BasePin

TOKENS = 8_192  # of a batch, padding included: what bounds the memory of a pass


@dataclass(frozen=True)
class Fleet:
    """Made by `load`."""

    manifests: Mapping[str, bundle.Manifest]
    _model: Any
    _tokenizer: Any
    _device: str

    def probabilities(
        self, texts: Sequence[str], names: Sequence[str], pairs: Sequence[str] | None = None
    ) -> npt.NDArray[np.float32]:
        """(texts, most classes): each text by the bundle of its name; 0 in columns beyond its labels.

        Raises ConfigError for unknown names.
        """
        unknown = sorted(set(names) - set(self.manifests))
        if unknown or len(names) != len(texts):
            found = ", ".join(unknown) or f"{len(names)}"
            raise ConfigError(f"for each of {len(texts)} texts a name among {_few(self.manifests)}", found, "pass such")
        rows = table(texts, pairs)
        found_for = np.zeros((len(texts), max(len(each.labels) for each in self.manifests.values())), np.float32)
        for limit, known in self._by_limit().items():
            mine = np.flatnonzero([name in known for name in names])
            for batch, inputs in self._batches(rows.select(mine), limit, TOKENS) if len(mine) else ():
                whose = [self._inner(names[row]) for row in mine[batch]]
                made = _softmax(self._model(**inputs, adapter_names=whose).logits)
                found_for[mine[batch], : made.shape[1]] = made
        return found_for

    def answers(self, rows: Dataset) -> dict[str, npt.NDArray[np.float32]]:
        """(rows, classes) by name: of all bundles, with the layers below the first adapter computed once.

        rows: string columns `text` and, for pairs, `text_pair`.
        """
        from components.adapters.together import answers

        made = {name: np.zeros((len(rows), len(each.labels)), np.float32) for name, each in self.manifests.items()}
        for limit, names in self._by_limit().items():
            for batch, inputs in self._batches(rows, limit, TOKENS // len(names)):
                logits = answers(self._model, [self._inner(name) for name in names], **inputs)
                for name in names:
                    made[name][batch] = _softmax(logits[self._inner(name)])
        return made

    def _by_limit(self) -> dict[int, list[str]]:
        """Bundles that cut texts alike read the same tokens."""
        found: dict[int, list[str]] = {}
        for name, manifest in self.manifests.items():
            found.setdefault(manifest.max_tokens, []).append(name)
        return found

    def _batches(self, rows: Dataset, limit: int, most: int) -> Iterator[tuple[npt.NDArray[np.int64], dict[str, Any]]]:
        """Row numbers and model inputs."""
        import torch

        from components.training.batching import bounded_batches, collate, tokenise
        from components.training.unpadded import unpadded

        tokens = tokenise(rows, self._tokenizer, limit)
        with torch.inference_mode():
            for batch in unpadded(self._model, bounded_batches(tokens.lengths, most), tokens.lengths):
                padding = self._model.config.pad_token_id
                yield batch, collate(tokens, batch, padding, torch.device(self._device))

    def _inner(self, name: str) -> str:
        """Its adapter's name in the model, where names are parts of modules' names."""
        return _adapter(list(self.manifests).index(name))


def load(folders: Mapping[str, Path], device: str = "cpu") -> Fleet:
    """The bundles of these folders on the base that all of them are pinned to.

    Raises BundleError for a bundle that is not right or stands on another base, ConfigError for one whose method
    cannot share a pass, or not with that of the others.
    """
    from components.adapters.layer import Site

    manifests = {name: bundle.read_manifest(folder) for name, folder in folders.items()}
    first, *others = manifests
    for name in others:
        try:
            bundle.require_base(manifests[name], manifests[first].base)
        except BundleError as error:
            raise BundleError(f"{error.expected} for {name}", f"{error.found}, of {first}", "serve it alone") from error
    for name, folder in folders.items():
        if not shares(folder, manifests[name]):
            wanted = "bundles of bottleneck adapters without prefixes, to serve many on one base"
            raise ConfigError(wanted, f"{name} of method {manifests[name].method}", "serve it alone")
    base = base_model.find_pinned(manifests[first].base)
    model = _model(base, manifests, folders).eval().to(device)
    if not all(each.mixes(model.peft_config) for each in model.modules() if isinstance(each, Site)):
        configs = zip(manifests, model.peft_config.values(), strict=True)
        behind = [name for name, config in configs if not config.original_ln_after]
        raise ConfigError(
            "bundles that can share a batch: none behind a layer norm that one of them trains",
            f"{', '.join(behind)} among {', '.join(folders)}",
            "serve them apart",
        )
    return Fleet(manifests, model, base_model.load_tokenizer(base), device)


def shares(folder: Path, manifest: bundle.Manifest) -> bool:
    """Can this bundle be one of a fleet?"""
    from components.adapters import methods

    if manifest.method == "full" or manifest.members:
        return False
    config: Any = methods.load_config(folder)
    return config.peft_type == "BOTTLENECK" and not config.prefix_length


def groups(folders: Mapping[str, Path], manifests: Mapping[str, bundle.Manifest]) -> list[dict[str, Path]]:
    """Of these bundles those that can be fleets of two or more; what is in none is to be served alone.

    On a base whose layer norms some of them train, those that stand behind the norms are a fleet of their own. On one
    with an encoder and a decoder each is alone.
    """
    from components.adapters import methods

    configs: dict[str, Any] = {
        name: methods.load_config(folder) for name, folder in folders.items() if shares(folder, manifests[name])
    }
    bases = {name: (manifests[name].base.weights_sha256, manifests[name].base.tokenizer_sha256) for name in configs}
    behind = {name for name, config in configs.items() if not config.original_ln_after}
    training = {name for name, config in configs.items() if config.train_layer_norm}
    moved = {bases[name] for name in training - behind}
    found: dict[object, dict[str, Path]] = {}
    for name in configs:
        if name not in training & behind:
            found.setdefault((bases[name], bases[name] in moved and name in behind), {})[name] = folders[name]
    several = [group for group in found.values() if len(group) > 1]
    return [group for group in several if not _has_decoder(manifests[next(iter(group))].base)]


def _has_decoder(pin: BasePin) -> bool:
    """Beside an encoder."""
    from transformers import AutoConfig

    place = base_model.find_pinned(pin).path
    return bool(AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=True).is_encoder_decoder)


def _model(base: BaseModel, manifests: Mapping[str, bundle.Manifest], folders: Mapping[str, Path]) -> Any:
    from peft import get_peft_model
    from safetensors.torch import load_file

    from components.adapters import methods

    model: Any = base_model.load_classifier(base, next(iter(manifests.values())).labels)[0]
    for number, (name, folder) in enumerate(folders.items()):
        config, inner = methods.load_config(folder), _adapter(number)
        if number:
            model.add_adapter(inner, config)
        else:
            model = get_peft_model(model, config, adapter_name=inner)
        _fit_head(model.base_model.model, inner, len(manifests[name].labels))
        try:
            bundle.load_adapter_weights(model, inner, load_file(folder / "adapter_model.safetensors"))
        except BundleError as error:
            raise BundleError(f"{error.expected} in bundle {name}", error.found, error.todo) from error
    return model


def _fit_head(model: Any, adapter: str, classes: int) -> None:
    """Give an adapter's copies of the head the size for its labels. What is in them is loaded next."""
    import copy

    import torch
    from peft.utils import ModulesToSaveWrapper
    from transformers import AutoModelForSequenceClassification

    if classes == model.config.num_labels:
        return
    config = copy.deepcopy(model.config)
    config.num_labels = classes
    with torch.device("meta"):
        fitting = AutoModelForSequenceClassification.from_config(config)
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            like, own = fitting.get_submodule(name), module.modules_to_save[adapter]
            if [each.shape for each in like.parameters()] != [each.shape for each in own.parameters()]:
                module.modules_to_save[adapter] = like.to_empty(device="cpu")


def _adapter(number: int) -> str:
    return f"served_{number:04d}"  # none is the beginning of another, which PEFT would mix up


def _softmax(logits: Any) -> npt.NDArray[np.float32]:
    made: npt.NDArray[np.float32] = logits.float().softmax(-1).cpu().numpy()
    return made


def _few(names: Mapping[str, Any]) -> str:
    return ", ".join([*list(names)[:5], *(["…"] if len(names) > 5 else [])])
