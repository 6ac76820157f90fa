"""The bundles that a fusion stands on: kept in the store by digest, checked when they are used, and never changed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import cache, storage
from components.base_model import BasePin
from components.errors import BundleError, ConfigError
from components.methods import Member
from components.registry import bundle

if TYPE_CHECKING:
    from peft import PeftConfig

FOLDER = "bundles"
# Where members lie by their digests, when it is not where the manifest says: `ADAPTERLINE_BUNDLES=/models/bundles`.
PATH_VARIABLE = "ADAPTERLINE_BUNDLES"
# A fusion asks once at each place, so its members must read and write the same there.
PLACEMENT = ("mh_adapter", "output_adapter", "cross_adapter", "original_ln_before", "original_ln_after",
             "residual_before_ln", "leave_out")  # fmt: skip


def place(store: str, digest: str) -> str:
    """Where a store has the bundle with this digest, if it has it."""
    return storage.join(store if storage.is_s3(store) else str(Path(store).resolve()), FOLDER, digest)


def is_kept(uri: str) -> bool:
    return storage.exists(storage.join(uri, bundle.MANIFEST))


def fetch(member: Member) -> tuple[Path, bundle.Manifest]:
    """The folder of a member's bundle, and its manifest. What comes from S3 stays in the cache.

    Raises BundleError when it is missing, incomplete or another one.
    """
    if not storage.is_s3(_uri(member)):
        return fetch_anew(member, Path(_uri(member)))
    kept = cache.folder() / FOLDER / member.digest
    if bundle.is_complete(kept):
        return kept, _verified(kept, member, f"{kept}, which can be removed")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as name:
        fresh, manifest = fetch_anew(member, Path(name) / member.digest)
        try:
            fresh.rename(kept)
        except OSError:  # another process was first, or something incomplete is in its place
            if not bundle.is_complete(kept):
                kept.rename(Path(name) / "incomplete")
                fresh.rename(kept)
    return kept, manifest


def fetch_anew(member: Member, folder: Path) -> tuple[Path, bundle.Manifest]:
    """The same from the store, whatever this machine's cache has. folder: takes what comes from S3.

    Raises BundleError when it is missing, incomplete or another one.
    """
    uri = _uri(member)
    if not storage.is_s3(uri):
        return Path(uri), _verified(Path(uri), member, uri)
    if is_kept(uri):
        storage.download_folder(uri, folder, last=bundle.MANIFEST)
    return folder, _verified(folder, member, uri)


def _uri(member: Member) -> str:
    root = os.environ.get(PATH_VARIABLE)
    return storage.join(root, member.digest) if root else member.uri


def _verified(folder: Path, member: Member, place: str) -> bundle.Manifest:
    wanted, todo = f"member {member} with bundle digest {member.digest[:12]} at {place}", "bring that bundle back"
    if not bundle.is_complete(folder):
        raise BundleError(wanted, f"no {bundle.MANIFEST}", f"{todo}, or say where it lies with {PATH_VARIABLE}=FOLDER")
    try:
        manifest = bundle.read_manifest(folder)
    except BundleError as error:
        raise BundleError(f"{wanted}: {error.expected}", error.found, todo) from error
    if manifest.digest != member.digest:
        raise BundleError(wanted, f"digest {manifest.digest[:12]}", f"{todo}, or fuse again")
    return manifest


def configs(members: Sequence[Member], base: BasePin) -> dict[str, PeftConfig]:
    """The members' PEFT configs by digest, without their heads.

    Raises BundleError when a member is not there or has another base, ConfigError when they cannot be fused.
    """
    from components.adapters import methods

    found: dict[str, Any] = {}
    for member in members:
        folder, manifest = fetch(member)
        try:
            bundle.require_base(manifest, base)
        except BundleError as error:
            raise BundleError(
                f"{error.expected} for a fusion with {member}", error.found, "fuse on one base"
            ) from error
        config = None if manifest.method == "full" else methods.load_config(folder)
        if config is None or config.peft_type != "BOTTLENECK" or config.fuse or _is_beside(config):
            raise ConfigError(
                "members of method pfeiffer, or another that follows a sub-layer and trains no layer norms",
                f"{member} of method {manifest.method}",
                "name another version",
            )
        found[member.digest] = config
    for name in PLACEMENT:
        values = {str(member): getattr(found[member.digest], name) for member in members}
        if any(value != values[str(members[0])] for value in values.values()):
            words = ", ".join(f"{member} has {value}" for member, value in values.items())
            raise ConfigError(f"members with the same {name}", words, "fuse adapters that stand in the same places")
    return found


def _is_beside(config: Any) -> bool:
    return bool(config.train_layer_norm or config.is_parallel or config.prefix_length)


def adapted(model: Any, config: PeftConfig, members: Sequence[Member], base: BasePin) -> Any:
    """The PEFT model of an adapter, active; that of a fusion has its members below it, loaded and frozen.

    Raises BundleError when a member is not there, was changed or has another base, or the config names others.
    """
    from peft import get_peft_model

    fuses, known = list(getattr(config, "fuse", None) or ()), [member.digest for member in members]
    if fuses != known:
        raise BundleError(
            f"a fusion of {_short(known)}, as in the manifest", f"of {_short(fuses)}", "do not use this bundle"
        )
    if not members:
        return get_peft_model(model, config, adapter_name=bundle.ADAPTER_NAME)
    found = configs(members, base)
    for member in members:
        model = _with(model, member, found[member.digest])
    model.add_adapter(bundle.ADAPTER_NAME, config)
    model.set_adapter(bundle.ADAPTER_NAME)
    return model


def _with(model: Any, member: Member, config: Any) -> Any:
    """The model with one more adapter: the member's, without its head."""
    from peft import get_peft_model
    from safetensors.torch import load_file

    heads = tuple(f"base_model.model.{name}." for name in config.modules_to_save or ())
    config.modules_to_save = None
    if hasattr(model, "peft_config"):
        model.add_adapter(member.digest, config)
    else:
        model = get_peft_model(model, config, adapter_name=member.digest)
    state = load_file(fetch(member)[0] / "adapter_model.safetensors")
    bundle.load_adapter_weights(
        model, member.digest, {name: tensor for name, tensor in state.items() if not name.startswith(heads)}
    )
    return model


def _short(digests: Sequence[str]) -> str:
    return ", ".join(digest[:12] for digest in digests) or "nothing"
