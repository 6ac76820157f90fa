"""What is measured is kept, and chosen again; what is asked for is not overruled."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from components.errors import TrainingError
from components.training import heads, kernels, measured, onednn
from components.training.kernels import Kernels, Shape, chosen, shape_of
from components.training.onednn import LaidOut, Matrix, OneDNN
from components.training.precision import arithmetic
from tests.training.conftest import BF16

CPU = torch.device("cpu")
BOTH = (torch.bfloat16, torch.float32)
SHAPE = Shape(hidden=128, inner=256, heads=4)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ADAPTERLINE_CACHE", str(tmp_path))
    onednn._is_faster.cache_clear()
    assert issubclass(onednn.preferred(CPU, torch.float32), Matrix)  # which keeps a record of its own
    for record in (tmp_path / "kernels").glob("*"):
        record.unlink()
    yield
    onednn._is_faster.cache_clear()


def test_a_measurement_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = chosen(CPU, SHAPE, BOTH)
    monkeypatch.setattr(kernels, "measure", None)
    assert chosen(CPU, SHAPE, BOTH) == first


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"not json"])
def test_a_damaged_record_is_measured_again(tmp_path: Path, damage: bytes) -> None:
    chosen(CPU, SHAPE, BOTH)
    (record,) = (tmp_path / "kernels").iterdir()
    record.write_bytes(damage)
    assert isinstance(chosen(CPU, SHAPE, BOTH), Kernels)
    assert record.read_bytes() != damage


def test_without_a_cache_folder_nothing_is_kept_and_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERLINE_CACHE", "/proc/nobody/writes/here")
    assert isinstance(chosen(CPU, SHAPE, BOTH), Kernels)


def test_a_full_disk_keeps_nothing_and_fails_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(Path, "replace", full)
    assert isinstance(chosen(CPU, SHAPE, BOTH), Kernels)
    assert not list((tmp_path / "kernels").iterdir())


def test_another_shape_or_precision_is_another_measurement(tmp_path: Path) -> None:
    chosen(CPU, SHAPE, BOTH)
    chosen(CPU, SHAPE, BOTH[1:])
    chosen(CPU, Shape(hidden=128, inner=512, heads=4), BOTH)
    assert len(list((tmp_path / "kernels").iterdir())) == 3


@pytest.mark.parametrize("shape", [SHAPE, Shape(32, 64, 2)])
@pytest.mark.parametrize("asked", BOTH)
def test_a_precision_that_is_asked_for_is_taken(shape: Shape, asked: torch.dtype) -> None:
    assert chosen(CPU, shape, (asked,)).bfloat16 == (asked == torch.bfloat16)


def test_bfloat16_that_a_gpu_only_imitates_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Turing and Volta, where it is slower than float32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(TrainingError, match="cuda without it"):
        arithmetic(torch.device("cuda"), "bf16", SHAPE)


def test_the_random_state_and_the_threads_are_left_as_they_were() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    threads = torch.get_num_threads()
    kernels.measure(CPU, SHAPE, BOTH)
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("by_heads", "expected"),
    [
        ("nowhere", Kernels(bfloat16=False, plain_until=128, math_until=0)),
        ("not today", Kernels(bfloat16=False, plain_until=128, math_until=0, compiled=True)),
        ("slow", Kernels(bfloat16=False, plain_until=128, math_until=0)),
        ("fastest", Kernels(bfloat16=False, plain_until=512, math_until=0, compiled=True)),
    ],
)
def test_the_faster_way_is_chosen(by_heads: str, expected: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds by what is run: bfloat16 the slower, plain attention the faster up to 128 tokens."""
    seconds = {"other": 1.0, "fast": 0.5, "fastest": 0.25, "slow": 2.0}
    monkeypatch.setattr(measured, "seconds", lambda run: seconds[run])
    monkeypatch.setattr(kernels, "_feed_forward", lambda shape, dtype: "slow" if dtype == torch.bfloat16 else "other")

    def attention(shape: Shape, dtype: torch.dtype, fused: bool, compiled: bool = False) -> object:
        return lambda width: "other" if fused else by_heads if compiled else "fast" if width <= 128 else "slow"

    monkeypatch.setattr(kernels, "_attention", attention)
    monkeypatch.setattr(heads, "may_fit", lambda device, dtype, features: by_heads != "nowhere")
    monkeypatch.setattr(heads, "fits", lambda device, dtype, features: by_heads in seconds)
    monkeypatch.setattr(kernels, "_composed", lambda shape, dtype: lambda width: "other")
    assert kernels.measure(CPU, SHAPE, BOTH) == expected


@pytest.mark.parametrize(
    ("family", "sizes", "expected"),
    [
        ("bert", {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}, Shape(64, 96, 4)),
        ("distilbert", {"dim": 64, "hidden_dim": 96, "n_heads": 4}, Shape(64, 96, 4)),
        ("gpt2", {"n_embd": 64, "n_head": 4}, Shape(64, 256, 4)),
        ("t5", {"d_model": 64, "d_ff": 96, "num_heads": 4}, Shape(64, 96, 4)),
        ("t5", {"d_model": 64, "d_ff": 96, "num_heads": 6, "d_kv": 16}, Shape(64, 96, 4)),
    ],
)
def test_shapes_are_read_in_the_words_of_each_family(family: str, sizes: dict[str, int], expected: Shape) -> None:
    assert shape_of(AutoConfig.for_model(family, **sizes)) == expected


class TestOneDNN:
    @pytest.mark.parametrize("rows", [0, 1, 7])
    @pytest.mark.parametrize(
        ("kind", "dtype", "close"),
        [(OneDNN, torch.float32, 1e-5), pytest.param(LaidOut, torch.bfloat16, 1e-2, marks=BF16)],
    )
    def test_its_products_are_those_of_torch(
        self, kind: type[Matrix], dtype: torch.dtype, close: float, rows: int
    ) -> None:
        weight, bias = torch.randn(32, 48).to(dtype), torch.randn(32).to(dtype)
        x, grad = torch.randn(2 * rows, 48).to(dtype), torch.randn(rows, 32).to(dtype)
        ours, torchs = kind(weight, bias), Matrix(weight, bias)
        assert torch.equal(ours.weight, weight)
        for given in (x, x[::2]):
            assert torch.allclose(ours.of(given), torchs.of(given), rtol=close, atol=1e-5)
        for _ in range(2):
            assert torch.allclose(ours.back(grad), torchs.back(grad), rtol=close, atol=1e-5)

    @pytest.mark.parametrize("faster", [True, False])
    def test_what_is_faster_is_preferred_and_measured_once(
        self, faster: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Once in all processes that share the cache folder."""
        taken = {OneDNN: 1.0, Matrix: 2.0 if faster else 1.0}
        monkeypatch.setattr(measured, "seconds", lambda run: taken[type(run.func.__self__)])
        for _ in range(2):
            onednn._is_faster.cache_clear()
            assert onednn.preferred(CPU, torch.float32) is (OneDNN if faster else Matrix)
            monkeypatch.setattr(onednn, "_measure", None)

    def test_what_is_bfloat16_here_is_laid_out_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for able in (True, False):
            monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda able=able: able)
            assert onednn.preferred(CPU, torch.bfloat16) is (LaidOut if able else Matrix)

    def test_on_gpus_products_are_left_to_torch(self) -> None:
        for dtype in (torch.bfloat16, torch.float32):
            assert onednn.preferred(torch.device("cuda"), dtype) is Matrix

    def test_builds_of_torch_without_it_do_without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        for dtype in (torch.bfloat16, torch.float32):
            assert onednn.preferred(CPU, dtype) is Matrix
