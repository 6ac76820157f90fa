"""Adapters under the ways in which models are run: checkpointed, compiled, in threads, in processes, by the Trainer."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from components.adapters import METHODS
from tests.adapters.adapted import INPUTS, adapted, config_of, logits, stir
from tests.adapters.architectures import FAMILIES, inputs, tiny
from tests.conftest import make_base

CHECKPOINTED = [family for family in FAMILIES if family not in ("albert", "mpnet")]  # transformers' own do not allow it


@pytest.mark.parametrize("method", METHODS)
def test_under_autocast_rows_may_be_mixed(method: str) -> None:
    if method == "mam":
        pytest.skip("prefixes are not mixed")
    model = model_of("bert", method).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        alone = model(**inputs("bert")).last_hidden_state
        mixed = model(**inputs("bert"), adapter_names=["task", "task"]).last_hidden_state
    assert torch.allclose(mixed, alone, atol=0.1)


def model_of(family: str, method: str) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(tiny(family), config_of(method, ()), adapter_name="task")
    stir(model)
    return model


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).last_hidden_state.pow(2).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("family", CHECKPOINTED)
@pytest.mark.parametrize("method", ["houlsby", "parallel"])
def test_gradient_checkpointing_changes_no_gradient(family: str, method: str) -> None:
    model = model_of(family, method).train()
    plain = gradients(model, inputs(family))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    again = gradients(model, inputs(family))
    assert plain.keys() == again.keys()
    assert all(torch.allclose(again[name], plain[name], atol=1e-6) for name in plain)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("method", ["pfeiffer", "parallel", "adapter-plus", "compacter", "mam"])
def test_compiled_it_computes_the_same_in_one_graph(family: str, method: str) -> None:
    model = model_of(family, method).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = model(**inputs(family)).last_hidden_state
        assert torch.allclose(compiled(**inputs(family)).last_hidden_state, expected, atol=1e-5)


def test_threads_do_not_see_each_others_streams() -> None:
    model = model_of("bert", "parallel").eval()
    batches = [{"input_ids": torch.full((2, length), length)} for length in (3, 5, 7, 9)]
    with torch.no_grad():
        alone = [model(**batch).last_hidden_state for batch in batches]
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.allclose(model(**batches[index]).last_hidden_state, alone[index], atol=1e-6):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_models_can_be_pickled_into_another_process(tmp_path: Path) -> None:
    models = {method: model_of("bert", method).eval() for method in ("parallel", "mam")}
    (tmp_path / "models").write_bytes(pickle.dumps((models, inputs("bert"))))
    script = """
import pickle, sys, torch
from safetensors.torch import save_file
models, batch = pickle.load(open(sys.argv[1], "rb"))
with torch.no_grad():
    save_file({name: model(**batch).last_hidden_state.contiguous() for name, model in models.items()}, sys.argv[2])
"""
    command = [sys.executable, "-c", script, str(tmp_path / "models"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    there = load_file(tmp_path / "out")
    for method, model in models.items():
        with torch.no_grad():
            expected = model(**inputs("bert")).last_hidden_state
        assert torch.allclose(there[method], expected, atol=1e-6), method


def test_two_processes_share_the_work(tmp_path: Path) -> None:
    """DDP by accelerate, over gloo: the mean of both rows' gradients is that of the batch."""
    base, methods = make_base(tmp_path / "base"), ("pfeiffer", "mam")
    # On the loopback interface, whatever the machine's name resolves to. Processes that lose each other start again,
    # with a store of their own: in that of the launcher they would find each other's old addresses.
    halves = ["-m", "tests.adapters.halves", str(base), str(tmp_path), *methods]
    launch = ["--standalone", "--local-addr", "127.0.0.1", "--max-restarts", "2", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launch, *halves],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for method in methods:
        together = load_file(tmp_path / method)
        model = adapted(base, method)
        (model(**INPUTS).logits.sum() / 2).backward()
        alone = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert together.keys() == alone.keys(), method
        assert all(torch.allclose(together[name], alone[name], atol=1e-5) for name in alone), method


@pytest.mark.parametrize("method", METHODS)
def test_the_trainer_of_transformers_trains_and_saves_it(tmp_path: Path, method: str) -> None:
    from transformers import Trainer, TrainingArguments

    model = adapted(make_base(tmp_path / "base"), method)
    before = logits(model)
    rows = [{**{name: tensor[row] for name, tensor in INPUTS.items()}, "labels": torch.tensor(row)} for row in (0, 1)]
    settings = TrainingArguments(
        output_dir=str(tmp_path / "out"), num_train_epochs=3, learning_rate=0.05, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model=model, args=settings, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    trained = logits(model.eval())
    assert not torch.allclose(trained, before, atol=1e-3)
    again = adapted(tmp_path / "base", method)
    again.load_adapter(str(tmp_path / "saved" / "task"), "again")
    again.set_adapter("again")
    assert torch.allclose(logits(again.eval()), trained, atol=1e-6)
