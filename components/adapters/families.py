"""Where the adapted modules are, as data: a row for each model family.

A site is a residual sum of a transformer layer: h, what a sub-layer computed, plus x, the residual stream that it read.
Post-norm families (BERT and its kin, BART, Marian) apply a layer norm to h + x; pre-norm families (GPT-2, Llama, T5,
ViT, ...) pass h + x on as it is and apply their layer norms inside the sub-layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Site:
    """Paths below a layer: `entry` is the first module that reads x, `exit` the last one that computes h.

    The exit is the dropout at the end of the sub-layer, except where the model drops out by a function (BART) or by
    one module for several sums (ViT): there it is the dense layer. `norm` is the layer norm of h + x, None without one.
    `attends` is the module that calls transformers' attention function, None where a model has attention of its own.
    """

    entry: str
    exit: str
    norm: str | None = None
    attends: str | None = None


@dataclass(frozen=True)
class Stack:
    """One list of layers: where its nn.ModuleList is (`*` is any index, for lists in lists), and a layer's sites."""

    layers: str
    attention: Site
    output: Site
    cross: Site | None = None

    @property
    def sites(self) -> dict[str, Site]:
        """By name, in the order of the forward pass."""
        sites = {"attention": self.attention, "cross": self.cross, "output": self.output}
        return {name: site for name, site in sites.items() if site is not None}


_BERT_ATTENTION = Site("attention", "attention.output.dropout", "attention.output.LayerNorm", "attention.self")
_BERT_OUTPUT = Site("intermediate", "output.dropout", "output.LayerNorm")
_BERT = Stack("encoder.layer", _BERT_ATTENTION, _BERT_OUTPUT)
_LLAMA = Stack(
    "layers",
    Site("input_layernorm", "self_attn.o_proj", None, "self_attn"),
    Site("post_attention_layernorm", "mlp.down_proj"),
)
_BART_ATTENTION = Site("self_attn", "self_attn.out_proj", "self_attn_layer_norm", "self_attn")
_BART_CROSS = Site("encoder_attn", "encoder_attn.out_proj", "encoder_attn_layer_norm", "encoder_attn")
_BART_OUTPUT = Site("fc1", "fc2", "final_layer_norm")
_BART = (
    Stack("encoder.layers", _BART_ATTENTION, _BART_OUTPUT),
    Stack("decoder.layers", _BART_ATTENTION, _BART_OUTPUT, _BART_CROSS),
)
_T5_ATTENTION = Site("layer.0.layer_norm", "layer.0.dropout", None, "layer.0.SelfAttention")
_T5_CROSS = Site("layer.1.layer_norm", "layer.1.dropout", None, "layer.1.EncDecAttention")

# By config.model_type. Layers are counted through from the first stack to the last: encoder, then decoder.
FAMILIES: dict[str, tuple[Stack, ...]] = {
    "bert": (_BERT,),
    "roberta": (_BERT,),
    "xlm-roberta": (_BERT,),
    "electra": (_BERT,),
    "deberta-v2": (Stack("encoder.layer", replace(_BERT_ATTENTION, attends=None), _BERT_OUTPUT),),
    "mpnet": (
        Stack(
            "encoder.layer",
            Site("attention", "attention.dropout", "attention.LayerNorm"),
            Site("intermediate", "output.dropout", "output.LayerNorm"),
        ),
    ),
    "distilbert": (
        Stack(
            "transformer.layer",
            Site("attention", "attention.out_lin", "sa_layer_norm", "attention"),
            Site("ffn.lin1", "ffn.dropout", "output_layer_norm"),
        ),
    ),
    "albert": (  # the model runs these few layers again and again, and so their adapters
        Stack(
            "encoder.albert_layer_groups.*.albert_layers",
            Site("attention", "attention.output_dropout", "attention.LayerNorm", "attention"),
            Site("ffn", "ffn_output", "full_layer_layer_norm"),
        ),
    ),
    "modernbert": (Stack("layers", Site("attn_norm", "attn.out_drop", None, "attn"), Site("mlp_norm", "mlp.Wo")),),
    "gpt2": (Stack("h", Site("ln_1", "attn.resid_dropout", None, "attn"), Site("ln_2", "mlp.dropout")),),
    "llama": (_LLAMA,),
    "qwen2": (_LLAMA,),
    "qwen3": (_LLAMA,),
    "t5": (
        Stack("encoder.block", _T5_ATTENTION, Site("layer.1.layer_norm", "layer.1.dropout")),
        Stack("decoder.block", _T5_ATTENTION, Site("layer.2.layer_norm", "layer.2.dropout"), _T5_CROSS),
    ),
    "bart": _BART,
    "marian": _BART,
    "vit": (
        Stack(
            "layers",
            Site("layernorm_before", "attention.o_proj", None, "attention"),
            Site("layernorm_after", "mlp.fc2"),
        ),
    ),
}
