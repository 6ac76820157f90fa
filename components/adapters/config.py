"""Configuration of the PEFT method "BOTTLENECK"; the words are AdapterHub's, so its users find their way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from components.errors import ConfigError

PEFT_TYPE = "BOTTLENECK"
INITIALISATIONS = ("mam", "bert", "houlsby")
FUSIONS = ("dynamic", "static", "average", "learned_average")


def _words(words: str, default: Any) -> Any:
    factory = {"default_factory": default} if callable(default) else {"default": default}
    return field(**factory, metadata={"help": words})


@dataclass
class BottleneckConfig(PeftConfig):
    """Bottleneck adapters and what is composed with them: adapter(z) = up(f(down(z))), beside a frozen sub-layer.

    Houlsby et al. 2019 (https://arxiv.org/abs/1902.00751) put one after attention and one after the feed-forward,
    each before the residual sum and its layer norm. Pfeiffer et al. 2021 (https://arxiv.org/abs/2005.00247) keep one a
    layer, which reads the sum after the layer norm. He et al. 2022 (https://arxiv.org/abs/2110.04366) put it beside the
    feed-forward and scale it. Steitz & Roth 2024 (https://arxiv.org/abs/2406.06820) put it behind the residual sum:

        houlsby        y = norm(x + h + adapter(h))                   h: output of the sub-layer, x: its input
        pfeiffer       y = norm(x + h + adapter(norm(x + h)))
        parallel       y = norm(x + h + scaling · adapter(x))
        adapter-plus   y = norm(x + h) + scaling ⊙ adapter(norm(x + h))

    Families that normalise before a sub-layer have no norm in these places.
    """

    mh_adapter: bool = _words("an adapter after multi-head attention", False)
    output_adapter: bool = _words("an adapter after the feed-forward", True)
    cross_adapter: bool = _words("an adapter after attention to the encoder, in decoders", False)
    reduction_factor: float | dict[str, float] = _words(
        'hidden size / bottleneck size; or by layer, as {"0": 8, "default": 16}', 16
    )
    non_linearity: str = _words("any activation name of transformers", "relu")
    dropout: float = _words("on the adapter's output, while training", 0.0)
    original_ln_before: bool = _words("residual sum and layer norm of the base come before the adapter", True)
    original_ln_after: bool = _words("residual sum and layer norm of the base come after the adapter", True)
    residual_before_ln: bool | str = _words(
        'the residual around the adapter: true, from the sub-layer; false, from what the adapter reads; "post_add", '
        "from the residual sum",
        True,
    )
    adapter_residual_before_ln: bool = _words("that residual is added before ln_after", False)
    ln_before: bool = _words("a layer norm of the adapter's own on its input", False)
    ln_after: bool = _words("a layer norm of the adapter's own on its output", False)
    is_parallel: bool = _words("the adapter reads what the sub-layer reads", False)
    scaling: float | str = _words('a factor on the output; "learned", or "channel" for one a feature', 1.0)
    use_gating: bool = _words("a learned gate, from the mean over tokens, padding included as in AdapterHub", False)
    init_weights: str = _words(
        "mam: starts as the identity; bert: normal, 0.02; houlsby: truncated normal, 0.01", "mam"
    )
    leave_out: list[int] = _words("layers without adapter, from 0, the encoder's before the decoder's", list)
    stochastic_depth: float = _words("share of rows that pass the adapter by, while training", 0.0)
    train_layer_norm: bool = _words("train copies of the base's layer norms at the adapters", False)

    phm_layer: bool = _words("projections are sums of Kronecker products: Compacter", False)
    phm_dim: int = _words("number of products in a sum", 4)
    phm_rank: int = _words("rank of the larger factor", 1)
    phm_init_range: float = _words("spread of the small factors at the start, where layers share them", 0.0001)
    shared_phm_rule: bool = _words("all layers share the small factors", True)
    factorized_phm_rule: bool = _words("the small factors are of rank 1", False)
    learn_phm: bool = _words("the small factors are trained", True)
    shared_W_phm: bool = _words("all layers share the larger factors, too", False)  # noqa: N815  # AdapterHub's word
    factorized_phm_W: bool = _words("the larger factors are of rank phm_rank", True)  # noqa: N815

    prefix_length: int = _words("learned keys and values in front of self-attention", 0)
    prefix_bottleneck: int | None = _words("hidden size of the network that makes them; none once folded", None)
    encoder_prefix: bool = _words("in encoder-decoders, prefixes in the encoder", True)
    cross_prefix: bool = _words("in encoder-decoders, prefixes in the attention to the encoder", True)
    prefix_positions: bool = _words("in T5, prefixes take the first positions of the keys, as in AdapterHub", False)

    mask_rate: float = _words("share of bottleneck neurons masked while training", 0.0)
    mask_weight: float = _words("weight of the loss for telling which were masked", 0.1)

    drop_layers: int = _words("the first layers, whose adapters are not used: AdapterDrop", 0)
    drop_range: list[int] | None = _words("from, to: how many are dropped at each step of training", None)

    fuse: list[str] | None = _words("adapters of this model that are composed: AdapterFusion", None)
    fusion: str = _words("dynamic, static (without value matrix), average or learned_average", "dynamic")
    query_before_ln: bool = _words("a fusion is asked with the sub-layer's output, before the layer norm", False)
    fusion_weights: list[float] | None = _words("of a fixed average; equal by default", None)

    places: list[dict[str, Any]] | None = _words("where the modules are, for a family that is not known", None)
    target_modules: list[str] | str | None = _words("module names; by default those of the model family", None)
    modules_to_save: list[str] | None = _words("further trained modules: the head", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if isinstance(self.reduction_factor, Mapping):
            self.reduction_factor = {str(layer): factor for layer, factor in self.reduction_factor.items()}
        problems = list(self._problems())
        if problems:
            raise ConfigError("settings of an adapter that fit together", "; ".join(problems), "correct them")
        if self.drop_range:  # the adapters of layers that every step drops never learn
            self.drop_layers = max(self.drop_layers, self.drop_range[0])

    def _problems(self) -> list[str]:
        known = (
            ("init_weights", INITIALISATIONS),
            ("fusion", FUSIONS),
            ("residual_before_ln", (True, False, "post_add")),
        )
        problems = [f"{name} {getattr(self, name)!r}, not among {values}" for name, values in known
                    if getattr(self, name) not in values]  # fmt: skip
        if isinstance(self.scaling, str) and self.scaling not in ("learned", "channel"):
            problems.append(f"scaling {self.scaling!r}, not a number, learned or channel")
        if self.residual_before_ln == "post_add" and not self.original_ln_before and not self.is_parallel:
            problems.append("residual_before_ln post_add without original_ln_before")
        if not self.fuse and not (self.mh_adapter or self.output_adapter or self.cross_adapter or self.prefix_length):
            problems.append("none of mh_adapter, output_adapter, cross_adapter and prefix_length")
        if self.phm_layer and self.phm_dim < 1:
            problems.append(f"phm_dim {self.phm_dim}, at least 1")
        if self.phm_layer and self.shared_W_phm and isinstance(self.reduction_factor, Mapping):
            problems.append("shared_W_phm with a reduction_factor by layer")
        problems += [f"{name} {share:g}, from 0 to below 1" for name in ("dropout", "stochastic_depth", "mask_rate")
                     if not 0 <= (share := getattr(self, name)) < 1]  # fmt: skip
        if self.prefix_length and (self.drop_range or self.drop_layers):
            problems.append("AdapterDrop with prefixes, which stay in every layer")
        if self.drop_range is not None and not (
            len(self.drop_range) == 2 and 0 <= self.drop_range[0] <= self.drop_range[1]
        ):
            problems.append(f"drop_range {self.drop_range}, two numbers from 0, the smaller first")
        if self.fusion_weights is not None and len(self.fusion_weights) != len(self.fuse or ()):
            problems.append(f"{len(self.fusion_weights)} fusion_weights for {len(self.fuse or ())} adapters")
        return problems

    def reduction_of(self, layer: int) -> float:
        """Hidden size / bottleneck size in a layer. Raises ConfigError when a mapping has neither it nor a default."""
        if not isinstance(self.reduction_factor, Mapping):
            return float(self.reduction_factor)
        found = self.reduction_factor.get(str(layer), self.reduction_factor.get("default"))
        if found is None:
            raise ConfigError(
                f"a reduction factor for layer {layer}",
                f"{self.reduction_factor}",
                'add a "default" to reduction_factor',
            )
        return float(found)


def _method(**fixed: Any) -> Callable[..., BottleneckConfig]:
    def configure(**settings: Any) -> BottleneckConfig:
        return BottleneckConfig(**{**fixed, **settings})

    return configure


pfeiffer = _method()
houlsby = _method(mh_adapter=True, original_ln_before=False, train_layer_norm=True)
parallel = _method(original_ln_before=False, is_parallel=True, scaling=4.0, reduction_factor=2)
adapter_plus = _method(
    original_ln_after=False, residual_before_ln=False, scaling="channel", non_linearity="gelu", reduction_factor=96
)
compacter = _method(
    mh_adapter=True, original_ln_before=False, phm_layer=True, non_linearity="gelu", reduction_factor=32
)
compacter_plus = _method(phm_layer=True, non_linearity="gelu", reduction_factor=32)
mam = _method(
    original_ln_before=False, is_parallel=True, scaling=4.0, reduction_factor=2, prefix_length=30, prefix_bottleneck=512
)
masked = _method(mask_rate=0.15)

METHODS: dict[str, Callable[..., BottleneckConfig]] = {
    "pfeiffer": pfeiffer,  # Pfeiffer et al. 2021
    "houlsby": houlsby,  # Houlsby et al. 2019, who also train the layer norms
    "parallel": parallel,  # He et al. 2022, table 6: scaled, on the feed-forward
    "adapter-plus": adapter_plus,  # Steitz & Roth 2024
    "compacter": compacter,  # Mahabadi et al. 2021, https://arxiv.org/abs/2106.04647
    "compacter-plus": compacter_plus,  # its Compacter++
    "mam": mam,  # He et al. 2022: Mix-And-Match, prefixes in attention and parallel adapters on the feed-forward
    "masked": masked,  # not the published MAM: masked bottleneck neurons, and a head that tells which were masked
}
