"""The adapter methods by name, and the settings of each: the parameters' section `adapter`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from components.frozen import Frozen, Positive, Share

AdapterMethod = Literal[
    "pfeiffer",
    "houlsby",
    "parallel",
    "adapter-plus",
    "compacter",
    "compacter-plus",
    "mam",
    "masked",
    "lora",
    "ia3",
    "prefix",
    "bitfit",
    "head",
]
Method = Literal[AdapterMethod, "fusion", "full"]

# Which section of `adapter` sets a method; the others have nothing to set.
SECTIONS: dict[str, str] = {
    **dict.fromkeys(("pfeiffer", "houlsby", "parallel", "adapter-plus"), "bottleneck"),
    **dict.fromkeys(("compacter", "compacter-plus", "mam", "masked"), "bottleneck"),
    "lora": "lora",
    "prefix": "prefix",
    "fusion": "fusion",
}
Number = float | dict[Annotated[str, BeforeValidator(str)], float]


def _above_0(number: Number) -> Number:
    """One for all layers, or by layer; checked here, for pydantic would complain once for each kind."""
    by_layer = number if isinstance(number, dict) else {"default": number}
    if any(layer != "default" and not layer.isdecimal() for layer in by_layer):
        raise ValueError("Input should name layers by number, or default")
    if any(value <= 0 for value in by_layer.values()):
        raise ValueError("Input should be greater than 0")
    return number


class Bottleneck(Frozen):
    """A bottleneck adapter; the words are AdapterHub's, and what is not given is as the method has it."""

    reduction_factor: Annotated[Number, AfterValidator(_above_0)] | None = Field(
        None, description='hidden size / bottleneck size, also by layer as {"0": 8, default: 16}; pfeiffer, houlsby: 16'
    )
    non_linearity: Literal["relu", "gelu", "gelu_new", "silu", "swish", "tanh", "leakyrelu"] | None = None
    dropout: float | None = Field(None, ge=0, lt=1, description="on the adapter's output, while training")
    leave_out: tuple[int, ...] = Field((), description="layers without adapter, counted from 0")
    init_weights: Literal["mam", "bert", "houlsby"] | None = Field(None, description="mam starts as the identity")
    mh_adapter: bool | None = Field(None, description="an adapter after multi-head attention")
    output_adapter: bool | None = Field(None, description="an adapter after the feed-forward")
    cross_adapter: bool | None = Field(None, description="an adapter after attention to the encoder")
    is_parallel: bool | None = Field(None, description="the adapter reads what the sub-layer reads")
    original_ln_before: bool | None = Field(None, description="it stands behind the base's residual sum and norm")
    original_ln_after: bool | None = Field(None, description="the base's residual sum and norm follow it")
    residual_before_ln: bool | Literal["post_add"] | None = None
    adapter_residual_before_ln: bool | None = None
    ln_before: bool | None = Field(None, description="a layer norm of its own on its input")
    ln_after: bool | None = Field(None, description="a layer norm of its own on its output")
    scaling: float | Literal["learned", "channel"] | None = None
    use_gating: bool | None = None
    stochastic_depth: float | None = Field(None, ge=0, lt=1)
    train_layer_norm: bool | None = Field(None, description="train copies of the base's norms at the adapters")
    phm_dim: Positive | None = Field(None, description="compacter: number of Kronecker products")
    phm_rank: Positive | None = None
    prefix_length: int | None = Field(None, ge=0, description="mam: learned keys and values")
    prefix_bottleneck: Positive | None = Field(None, description="mam: hidden size of the network that makes them")
    mask_rate: Share | None = Field(None, description="masked: share of neurons masked while training")
    mask_weight: float | None = Field(None, ge=0)
    drop_layers: int | None = Field(None, ge=0, description="AdapterDrop: so many first layers do without")
    drop_range: tuple[int, int] | None = Field(None, description="AdapterDrop: how many at each step, from, to")
    drop_margin: Share | None = Field(
        None, description="AdapterDrop: in the end drop all that cost at most this much of the validation score"
    )


class Lora(Frozen):
    """LoRA on query and value (Hu et al. 2022, https://arxiv.org/abs/2106.09685)."""

    r: Positive = Field(8, description="rank of the update")
    alpha: float = Field(16, gt=0, description="the update is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the update's input, while training")


class Prefix(Frozen):
    """Prefix tuning (Li & Liang 2021, https://arxiv.org/abs/2101.00190), as PEFT has it."""

    length: Positive = Field(20, description="learned keys and values in front of every layer's own")


FusionKind = Literal["dynamic", "static", "average", "learned_average"]


class FusionConfig(Frozen):
    """AdapterFusion (Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247) of registered adapters."""

    kind: FusionKind = Field("dynamic", description="static: without value matrices; averages: the same for all tokens")
    members: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*(@[A-Za-z][\w.-]*|/\d+)$")], ...] = Field(
        min_length=2, description="versions by alias or number: tweets-sentiment@production, movies-sentiment/3"
    )


class Member(Frozen):
    """A registered version that a fusion stands on: its bundle lies at `uri` and has this digest."""

    name: str
    version: str
    uri: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


class Fusion(Frozen):
    """AdapterFusion of bundles that stay as they are."""

    kind: FusionKind = "dynamic"
    members: tuple[Member, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _members_differ(self) -> Fusion:
        if len({member.digest for member in self.members}) < len(self.members):
            raise ValueError(f"members must be different bundles, found {', '.join(map(str, self.members))}")
        return self


Settings = Bottleneck | Lora | Prefix | Fusion
KINDS: dict[str, type[Settings]] = {"bottleneck": Bottleneck, "lora": Lora, "prefix": Prefix, "fusion": Fusion}


class LearningRates(Frozen):
    """Peak learning rates. `body` is what the method adds to the base, or the whole transformer for `full`."""

    body: float = Field(gt=0)
    layer_norm: float = Field(gt=0)
    head: float = Field(gt=0)


class Schedule(Frozen):
    """How long and how fast one job learns."""

    epochs: Positive
    patience: Positive = Field(2, description="epochs without a better validation score before stopping")
    learning_rates: LearningRates


class AdapterConfig(Frozen):
    """The adapter job. A section that the method does not read is refused."""

    method: Literal[AdapterMethod, "fusion"] = "pfeiffer"
    bottleneck: Bottleneck | None = Field(None, description="of pfeiffer, houlsby, parallel, …, mam and masked")
    lora: Lora | None = None
    prefix: Prefix | None = None
    fusion: FusionConfig | None = None
    schedule: Schedule = Schedule(
        epochs=10, patience=3, learning_rates=LearningRates(body=1e-3, layer_norm=1e-3, head=1e-3)
    )

    @model_validator(mode="after")
    def _prefixes_are_not_dropped(self) -> AdapterConfig:
        own = self.bottleneck
        if own and own.drop_margin is not None and (self.method == "mam" or own.prefix_length):
            raise ValueError("drop_margin is for adapters without prefixes, which stay in every layer")
        return self

    @model_validator(mode="after")
    def _reads_its_sections(self) -> AdapterConfig:
        own = SECTIONS.get(self.method)
        foreign = [name for name in dict.fromkeys(SECTIONS.values()) if name != own and getattr(self, name) is not None]
        if foreign:
            reads = f"reads adapter.{own}" if own else "has no section of its own"
            raise ValueError(f"method {self.method} {reads}: remove {', '.join(foreign)}")
        if self.method == "fusion" and self.fusion is None:
            raise ValueError("method fusion reads adapter.fusion: give its members")
        return self

    @property
    def settings(self) -> Settings | None:
        """The section of the method, with defaults where it is not given; None when there is nothing to set.

        Those of a fusion are not known before its members are found.
        """
        own = None if self.fusion else SECTIONS.get(self.method)
        return None if own is None else getattr(self, own) or settings_of(self.method)


def settings_of(method: str, **given: Any) -> Settings | None:
    """The settings of a method from plain values; None for a method without. Raises ValidationError."""
    kind = kind_of(method)
    return None if kind is None else kind.model_validate(given)


def kind_of(method: str) -> type[Settings] | None:
    """What the settings of a method are; None for a method without."""
    own = SECTIONS.get(method)
    return None if own is None else KINDS[own]


def members_of(settings: Settings | None) -> tuple[Member, ...]:
    """The bundles that a fusion stands on; none for any other method."""
    return settings.members if isinstance(settings, Fusion) else ()
