"""Several adapters on one base: fused, one a row of a batch, all for one input, or none in the first layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from components.adapters import METHODS
from components.adapters.drop import drop
from components.adapters.fusion import Fusion
from components.adapters.layer import Site
from components.adapters.parameters import training_mode
from components.adapters.regulariser import Regulariser
from components.adapters.together import answers
from components.errors import ConfigError
from tests.adapters.adapted import INPUTS, classifier, config_of, logits
from tests.adapters.adapted import stir as stir_adapter
from tests.adapters.architectures import FAMILIES, SEQ2SEQ, inputs, tiny
from tests.conftest import make_base

NAMES = ("anna", "bruno", "clara", "david")


def loaded(family: str, methods: Sequence[str], **settings: Any) -> PeftModel:
    """A tiny model with adapters of random weights, by the names in NAMES; the first is active."""
    names = NAMES[: len(methods)]
    torch.manual_seed(0)
    model = get_peft_model(tiny(family), config_of(methods[0], (), **settings), adapter_name=names[0])
    for name, method in zip(names[1:], methods[1:], strict=True):
        model.add_adapter(name, config_of(method, (), **settings))
    for seed, name in enumerate(names):
        stir_adapter(model, name, seed)
    return model.eval()


@torch.no_grad()
def hidden(model: Any, batch: dict[str, torch.Tensor], **more: Any) -> torch.Tensor:
    output: torch.Tensor = model(**batch, **more).last_hidden_state
    return output


MIXED = ("pfeiffer", "houlsby", "parallel", "compacter")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_of_a_batch_has_its_own_adapter(family: str) -> None:
    model = loaded(family, MIXED)
    batch = inputs(family)
    alone = {}
    for name in NAMES:
        model.set_adapter(name)
        alone[name] = hidden(model, batch)
    with model.disable_adapter():
        alone["__base__"] = hidden(model, batch)
    for names in (["anna", "bruno"], ["clara", "__base__"], ["david", "david"], ["__base__", "anna"]):
        mixed = hidden(model, batch, adapter_names=names)
        for row, name in enumerate(names):
            assert torch.allclose(mixed[row], alone[name][row], atol=1e-5), name


def test_rows_may_have_adapters_behind_the_layer_norm() -> None:
    model = loaded("bert", ("adapter-plus", "pfeiffer"))
    batch = inputs("bert")
    first = hidden(model, batch)
    model.set_adapter("bruno")
    second = hidden(model, batch)
    mixed = hidden(model, batch, adapter_names=["anna", "bruno"])
    assert torch.allclose(mixed[0], first[0], atol=1e-5)
    assert torch.allclose(mixed[1], second[1], atol=1e-5)


@pytest.mark.parametrize(
    ("methods", "names", "word"),
    [
        (("pfeiffer",), ["anna", "nobody"], "nobody"),
        (("mam", "pfeiffer"), ["anna", "bruno"], "prefixes"),
        (("adapter-plus", "houlsby"), ["anna", "bruno"], "one batch"),
    ],
)
def test_rows_that_cannot_be_mixed_are_refused(methods: Sequence[str], names: list[str], word: str) -> None:
    model = loaded("bert", methods)
    with pytest.raises(ConfigError, match=word):
        model(**inputs("bert"), adapter_names=names)
    assert torch.isfinite(hidden(model, inputs("bert"))).all()


@pytest.mark.parametrize("names", [["anna"], ["anna", "bruno", "anna"]])
def test_every_row_needs_a_name(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="2 rows"):
        loaded("bert", ("pfeiffer", "pfeiffer"))(**inputs("bert"), adapter_names=names)


@pytest.mark.parametrize(("family", "kind"), [("gpt2", AutoModelForCausalLM), ("t5", AutoModelForSeq2SeqLM)])
def test_beams_keep_the_adapter_of_their_row(family: str, kind: Any) -> None:
    config = tiny(family).config
    torch.manual_seed(0)
    model = get_peft_model(kind.from_config(config), config_of("parallel", ()), adapter_name="anna")
    stir_adapter(model.eval(), "anna")
    given = {name: each for name, each in inputs(family).items() if not name.startswith("decoder")}
    settings = {**given, "max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(**settings, adapter_names=["anna", "anna"]), model.generate(**settings))


def test_rows_are_not_mixed_while_training() -> None:
    model = loaded("bert", ("pfeiffer", "pfeiffer")).train()
    with pytest.raises(ConfigError, match="eval"):
        model(**inputs("bert"), adapter_names=["anna", "bruno"])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SEQ2SEQ])
def test_all_answers_to_one_input(family: str) -> None:
    """Each equals that of the adapter alone, also where the first layer, which is shared, carries none."""
    model = loaded(family, ("pfeiffer", "houlsby"), leave_out=[] if family == "albert" else [0])
    batch = inputs(family)
    with torch.no_grad():
        both = answers(model, ["bruno", "anna"], **batch)
    for name in NAMES[:2]:
        model.set_adapter(name)
        assert torch.allclose(both[name], hidden(model, batch), atol=1e-5)


def test_shared_layers_compute_each_text_once() -> None:
    model = loaded("bert", ("pfeiffer", "pfeiffer"), leave_out=[0])
    rows = []
    for layer in model.base_model.model.encoder.layer:
        layer.register_forward_hook(lambda *seen: rows.append(len(seen[1][0])))
    with torch.no_grad():
        answers(model, ["anna", "bruno"], **inputs("bert"))
    assert rows == [2, 4]


def test_answers_of_tasks_with_different_labels(tmp_path: Path) -> None:
    model, head = classifier(make_base(tmp_path))
    model = get_peft_model(model, config_of("pfeiffer", head), adapter_name="anna")
    model.add_adapter("bruno", config_of("houlsby", head))
    wide = torch.nn.Linear(model.config.hidden_size, 5)
    name = next(name for name, module in model.named_modules() if name.endswith(f"{head[-1]}.modules_to_save"))
    model.get_submodule(name)["bruno"] = wide
    stir_adapter(model, "anna")
    model.eval()
    with torch.no_grad():
        both = answers(model, ["anna", "bruno"], **INPUTS)
    assert both["anna"].shape == (2, 2)
    assert both["bruno"].shape == (2, 5)
    assert torch.allclose(both["anna"], logits(model), atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_all_answers_of_models_that_classify_by_the_last_token(family: str) -> None:
    """They look for it in the inputs, which must come as often as there are adapters."""
    config = tiny(family).config
    config.num_labels = 2
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForSequenceClassification.from_config(config), config_of("pfeiffer", ("score",)),
                           adapter_name="anna")  # fmt: skip
    model.add_adapter("bruno", config_of("houlsby", ("score",), leave_out=[0]))
    stir_adapter(model, "anna")
    stir_adapter(model.eval(), "bruno", 2)
    batch = inputs(family)
    with torch.no_grad():
        both = answers(model, ["bruno", "anna"], **batch)
        for name in ("anna", "bruno"):
            model.set_adapter(name)
            assert torch.allclose(both[name], model(**batch).logits, atol=1e-5)


def test_answers_of_an_unknown_adapter_are_refused() -> None:
    with pytest.raises(ConfigError, match="nobody"):
        answers(loaded("bert", ("pfeiffer",)), ["nobody"], **inputs("bert"))


def test_encoder_decoders_are_refused() -> None:
    with pytest.raises(ConfigError, match="decoder"):
        answers(loaded("t5", ("pfeiffer", "pfeiffer")), ["anna", "bruno"], **inputs("t5"))


def fused(family: str, **settings: Any) -> PeftModel:
    model = loaded(family, ("pfeiffer", "pfeiffer"))
    model.add_adapter("both", METHODS["pfeiffer"](fuse=["anna", "bruno"], **settings))
    model.set_adapter("both")
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["dynamic", "static", "average", "learned_average"])
def test_a_fusion_of_one_adapter_with_itself_is_that_adapter(family: str, kind: str) -> None:
    """Whatever the weights, they sum to one. The value matrix has 1e-6 beside its diagonal."""
    model = loaded(family, ("pfeiffer", "pfeiffer"))
    batch = inputs(family)
    stir_adapter(model, "bruno", 7)
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".anna." in name}
    model.load_state_dict({name.replace(".anna.", ".bruno."): tensor for name, tensor in weights.items()}, strict=False)
    alone = hidden(model, batch)
    model.add_adapter("both", METHODS["pfeiffer"](fuse=["anna", "bruno"], fusion=kind))
    model.set_adapter("both")
    assert torch.allclose(hidden(model.eval(), batch), alone, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_fusion_trains(family: str) -> None:
    trained = {name for name, parameter in fused(family).named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".bottleneck_fusions.both." in name for name in trained)


def test_an_average_weighs_as_told() -> None:
    batch = inputs("bert")
    only_first = fused("bert", fusion="average", fusion_weights=[1.0, 0.0])
    assert torch.allclose(hidden(only_first, batch), hidden(loaded("bert", ("pfeiffer", "pfeiffer")), batch), atol=1e-6)


def test_the_value_matrix_is_held_near_the_identity() -> None:
    model = fused("bert")
    assert Regulariser(model)() is None
    model.train()
    at_first = Regulariser(model)()
    assert at_first is not None
    assert float(at_first.detach()) < 1e-8
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Fusion):
                module.value.weight.mul_(2)
    later = Regulariser(model)()
    assert later is not None
    assert float(later.detach()) == pytest.approx(0.01 * 2 * 16, rel=1e-3)  # two sites, 16 ones beside 2s


def test_a_saved_fusion_holds_no_adapters_and_loads_again(tmp_path: Path) -> None:
    model = fused("bert")
    stir_adapter(model, "both")
    batch = inputs("bert")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "both" / "adapter_model.safetensors")
    assert saved
    assert all(".bottleneck_fusions." in name for name in saved)
    other = PeftModel.from_pretrained(tiny("bert"), tmp_path / "anna", adapter_name="anna")
    other.load_adapter(str(tmp_path / "bruno"), "bruno")
    other.load_adapter(str(tmp_path / "both"), "both")
    other.set_adapter("both")
    assert torch.allclose(hidden(other.eval(), batch), hidden(model, batch), atol=1e-6)


def test_a_fusion_without_its_adapters_is_refused(tmp_path: Path) -> None:
    fused("bert").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny("bert"), tmp_path / "anna", adapter_name="anna")
    with pytest.raises(ConfigError, match="no bruno"):
        model.load_adapter(str(tmp_path / "both"), "both")


@pytest.mark.parametrize(
    "second", [{"original_ln_before": False}, {"use_gating": True}, {"ln_after": True}, {"drop_layers": 1}]
)
def test_adapters_that_do_not_stand_alike_are_not_fused(second: dict[str, Any]) -> None:
    model = loaded("bert", ("pfeiffer",))
    model.add_adapter("bruno", config_of("pfeiffer", (), **second))
    with pytest.raises(ConfigError, match="bruno"):
        model.add_adapter("both", METHODS["pfeiffer"](fuse=["anna", "bruno"]))


def test_an_adapter_that_a_fusion_stands_on_is_not_deleted() -> None:
    model = fused("bert")
    with pytest.raises(ConfigError, match="both"):
        model.delete_adapter("anna")
    assert torch.isfinite(hidden(model, inputs("bert"))).all()


def test_nothing_is_left_to_chance_in_fused_adapters() -> None:
    model = loaded("bert", ("masked", "masked"))
    model.add_adapter("both", METHODS["pfeiffer"](fuse=["anna", "bruno"], fusion="static"))
    model.set_adapter("both")
    model.train()
    assert torch.equal(hidden(model, inputs("bert")), hidden(model, inputs("bert")))
    assert Regulariser(model)() is None


def test_attention_tells_which_adapter_helped() -> None:
    model = fused("bert")
    hidden(model, inputs("bert"))
    seen = [module.seen for module in model.modules() if isinstance(module, Fusion)]
    assert [weights.shape for weights in seen] == [(2, 5, 2)] * 2
    assert all(torch.allclose(weights.sum(-1), torch.ones(2, 5)) for weights in seen)


def test_the_masks_loss_is_that_of_every_place_and_of_this_pass_only() -> None:
    """ALBERT runs its one layer twice."""
    model = loaded("albert", ("masked",)).train()
    for _ in range(2):
        model(**inputs("albert"))
        assert len(model.base_model.model.shared_of_adapters.step.losses) == 2
    loss = Regulariser(model)()
    assert loss is not None
    assert 0.1 * 0.2 < float(loss.detach()) < 0.1 * 20
    copy.deepcopy(model)


def sites(model: PeftModel) -> dict[int, Site]:
    return {module.index: module for module in model.modules() if isinstance(module, Site)}


def test_dropped_layers_do_without_their_adapters() -> None:
    batch = inputs("bert")
    model = loaded("bert", ("pfeiffer",))
    whole = hidden(model, batch)
    drop(model, 1)
    dropped = hidden(model, batch)
    assert not torch.allclose(dropped, whole, atol=1e-3)
    with torch.no_grad():
        sites(model)[0].bottleneck_adapters["anna"].up.weight.zero_()
        sites(model)[0].bottleneck_adapters["anna"].up.bias.zero_()
    assert torch.equal(hidden(model, batch), dropped)
    drop(model, 0)
    assert torch.equal(hidden(model, batch), dropped)


def test_dropped_layers_stay_dropped_when_loaded(tmp_path: Path) -> None:
    model = loaded("bert", ("pfeiffer",))
    drop(model, 1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("bert"), tmp_path / "anna", adapter_name="anna").eval()
    assert torch.equal(hidden(again, inputs("bert")), hidden(model, inputs("bert")))


@pytest.mark.parametrize("layers", [-1, 2])
def test_the_last_layer_keeps_its_adapter(layers: int) -> None:
    with pytest.raises(ConfigError, match="0 to 1 layers"):
        drop(loaded("bert", ("pfeiffer",)), layers)


def test_robust_training_drops_another_number_at_each_step() -> None:
    """And none while predicting."""
    model = loaded("bert", ("pfeiffer",), drop_range=[0, 1])
    batch = inputs("bert")
    whole = hidden(model, batch)
    drop(model, 1)
    dropped = hidden(model, batch)
    drop(model, 0)
    model.train()
    torch.manual_seed(0)
    seen = [model(**batch).last_hidden_state for _ in range(20)]
    assert {torch.allclose(each, whole, atol=1e-6) for each in seen} == {True, False}
    assert all(torch.allclose(each, whole, atol=1e-6) or torch.allclose(each, dropped, atol=1e-6) for each in seen)
    assert torch.equal(hidden(model.eval(), batch), whole)


def test_while_a_fusion_learns_its_adapters_compute_what_they_will_compute_when_used() -> None:
    model = loaded("bert", ("masked", "masked"), mask_rate=0.5)
    model.add_adapter("both", METHODS["pfeiffer"](fuse=["anna", "bruno"]))
    model.set_adapter("both")
    batch = inputs("bert")
    quiet = hidden(model.eval(), batch)
    training_mode(model)
    assert all(module.training for module in model.modules() if isinstance(module, Fusion))
    assert torch.equal(hidden(model, batch), quiet)
    learned = Regulariser(model)()
    assert learned is not None
    assert float(learned) < 1e-8, "nobody tells which neurons are masked"
