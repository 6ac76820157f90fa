"""Configuration of the PEFT method "BOTTLENECK"; the words are AdapterHub's, so its users find their way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

PEFT_TYPE = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):
    """Bottleneck adapters: down-projection, non-linearity, up-projection, residual.

    Houlsby et al. 2019 (https://arxiv.org/abs/1902.00751) put one after attention and one after the feed-forward,
    each before the residual sum and its layer norm, and train the layer norms. Pfeiffer et al. 2021
    (https://arxiv.org/abs/2005.00247) keep one a layer, after the feed-forward's residual sum and layer norm:

        houlsby    y = norm(h + adapter(h) + x)              h: output of the sub-layer, x: its input
        pfeiffer   y = norm(s + adapter(norm(s)))            s = h + x

    Both equal the base model at initialisation, for the up-projection starts at zero (as in He et al. 2022).
    """

    reduction_factor: float = field(default=16, metadata={"help": "hidden size / bottleneck size"})
    non_linearity: str = field(default="relu", metadata={"help": "any activation name of transformers"})
    dropout: float = field(default=0.0, metadata={"help": "on the adapter's input, while training"})
    mh_adapter: bool = field(default=False, metadata={"help": "an adapter after multi-head attention"})
    output_adapter: bool = field(default=True, metadata={"help": "an adapter after the feed-forward"})
    original_ln_before: bool = field(default=True, metadata={"help": "the adapter reads the layer norm's output"})
    train_layer_norm: bool = field(default=False, metadata={"help": "train copies of the layer norms that follow"})
    leave_out: list[int] = field(default_factory=list, metadata={"help": "layers without adapter, from 0"})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "module names; by default those of the model family"}
    )
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "further trained modules: the head"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE


def pfeiffer(**settings: Any) -> BottleneckConfig:
    """The configuration of Pfeiffer et al. 2021; `settings` are the other fields of BottleneckConfig."""
    return BottleneckConfig(mh_adapter=False, output_adapter=True, original_ln_before=True, **settings)


def houlsby(**settings: Any) -> BottleneckConfig:
    """The configuration of Houlsby et al. 2019; `settings` are the other fields of BottleneckConfig."""
    return BottleneckConfig(
        mh_adapter=True, output_adapter=True, original_ln_before=False, train_layer_norm=True, **settings
    )


METHODS = {"pfeiffer": pfeiffer, "houlsby": houlsby}
