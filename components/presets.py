"""Ready parameter sets: of data, which can run alone, and of methods, which are joined to one with `+`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from components.errors import ConfigError

PRESETS = Path(__file__).parent.parent / "flows" / "presets"
METHODS = PRESETS / "methods"


def preset(name: str) -> Path:
    """Path of a preset by name. Raises ConfigError that lists the ones there are."""
    for folder in (PRESETS, METHODS):
        if (path := folder / f"{name}.yaml").is_file():
            return path
    whole, methods = (", ".join(sorted(file.stem for file in each.glob("*.yaml"))) for each in (PRESETS, METHODS))
    raise ConfigError(
        f"a preset among {whole}, with + and a method's among {methods} if you like",
        repr(name),
        "choose one, e.g. tweets+lora, or pass --config FILE",
    )


def joined(names: str) -> tuple[dict[str, Any], str]:
    """The parameters of presets joined with `+`, of which later ones win, and the files they come from.

    Raises ConfigError for a name that is none, and for methods without data.
    """
    paths = [preset(name) for name in names.split("+")]
    if all(path.parent == METHODS for path in paths):
        raise ConfigError("a preset with data before that of a method", repr(names), f"write e.g. tweets+{names}")
    together: dict[str, Any] = {}
    for path in paths:
        later = content(path)
        if "method" in later.get("adapter", {}):  # settings of one method are none for another
            together.pop("adapter", None)
        together = _merged(together, later)
    return together, ", ".join(map(str, paths))


def content(path: Path) -> dict[str, Any]:
    """What a YAML file holds. Raises ConfigError when it cannot be read or is no mapping."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            "a readable YAML file", f"{type(error).__name__} in {path}", "check path and syntax"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError("a YAML mapping of parameters", f"{type(content).__name__} in {path}", "see flows/presets")
    return content


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both mappings, section by section; what stands in both is as the second has it."""
    both = dict(first)
    for key, value in second.items():
        known = both.get(key)
        both[key] = _merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return both
