"""Are objects what the Kubernetes API takes? By its published schemas, unknown fields refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import kubernetes_validate

# The oldest release that its makers still mend, and the newest that there is a schema of.
VERSIONS = ("1.34", "1.37")
# https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/, which the schema takes for any text.
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti|Pi|Ei|k|M|G|T|P|E)?")
QUANTITIES = ("requests", "limits")


def problems(thing: dict[str, Any]) -> list[str]:
    """What the API would refuse or drop, in one line each."""
    found = wrong_quantities(thing)
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(thing, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{version} {'.'.join(map(str, error.path))}: {error.message}")
        except kubernetes_validate.SchemaNotFoundError as error:
            found.append(f"{version} {error.message}")
    return found


def nodes(thing: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in an object, at any depth."""
    if isinstance(thing, dict):
        yield thing
    for inner in thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list) else ():
        yield from nodes(inner)


def wrong_quantities(thing: Any) -> list[str]:
    return [f"{each!r} is no quantity" for each in quantities(thing) if not QUANTITY.fullmatch(str(each))]


def quantities(thing: Any) -> Iterator[Any]:
    for node in nodes(thing):
        for key in QUANTITIES:
            yield from node[key].values() if isinstance(node.get(key), dict) else ()
        if "sizeLimit" in node:
            yield node["sizeLimit"]


def pods(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The pod specs of workloads, by kind and name."""
    return {
        f"{each['kind']} {each['metadata'].get('name', '')}": each["spec"]["template"]["spec"]
        for each in objects
        if "template" in each.get("spec", {})
    }


def references(thing: Any) -> set[tuple[str, str, str]]:
    """(kind, name, key) of every key of a Secret or ConfigMap that is asked for; key "*" asks for all."""
    kinds = {
        "secretKeyRef": ("Secret", "key"), "configMapKeyRef": ("ConfigMap", "key"),
        "secretRef": ("Secret", None), "configMapRef": ("ConfigMap", None), "configMap": ("ConfigMap", None),
    }  # fmt: skip
    return {
        (kind, node[field]["name"], node[field][key] if key else "*")
        for node in nodes(thing)
        for field, (kind, key) in kinds.items()
        if isinstance(node.get(field), dict)
    }
