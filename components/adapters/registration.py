"""Making a method of ours known to PEFT."""

from __future__ import annotations

from typing import Any


def register(peft_type: str, config: type[Any], tuner: type[Any]) -> None:
    """Enter a method's config and tuner into PEFT's tables, under a plain string. Harmless when called again."""
    from peft import mapping

    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = tuner.prefix
