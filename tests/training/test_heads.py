"""Compiled attention is that of float32, and where it cannot be had training goes on without, and says why."""

from __future__ import annotations

import math
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from components import digest
from components.training import heads
from components.training.frozen import Attention
from components.training.packing import Packing

CPU = torch.device("cpu")
ABLE = torch.cpu._is_avx512_bf16_supported()
HERE = pytest.mark.skipif(not ABLE, reason="this processor multiplies no pairs of bfloat16")
COMPILER = pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler here")


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing was compiled yet."""
    monkeypatch.delenv("CC", raising=False)
    heads._library.cache_clear()
    yield
    heads._library.cache_clear()


def both_ways(
    attention: Attention, lengths: list[int], given: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What it makes of rows of these lengths, (tokens, hidden) without padding, its gradient, and those of padding."""
    dtype = attention.dtype
    packing = Packing.of(np.array(lengths), dtype, CPU)
    there = np.concatenate([start + np.arange(length) for start, length in zip(packing.starts, lengths, strict=True)])
    x = torch.full((packing.tokens, attention.hidden), 3.0 if dtype == torch.float32 else torch.nan, dtype=dtype)
    x[there] = given.to(dtype)
    x.requires_grad_()
    made = attention(x, packing, first=False, fused=False)
    (made[there].float() * wanted).sum().backward()
    assert x.grad is not None
    padding = np.setdiff1d(np.arange(packing.tokens), there)
    return made[there].detach().float(), x.grad[there].float(), x.grad[padding].float()


def exactly(qkv: torch.Tensor, lengths: list[int], grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What two heads see of packed rows, and the gradients of qkv, in float64."""
    x = qkv.double().requires_grad_()
    seen = []
    for row in x.split(lengths):
        q, k, v = row.view(len(row), 3, 2, -1).permute(1, 2, 0, 3)
        scores = (q @ k.transpose(1, 2)) * math.log(2)
        seen.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
    made = torch.cat(seen)
    (gradients,) = torch.autograd.grad(made, x, grad.double())
    return made.detach(), gradients


@HERE
@COMPILER
@pytest.mark.parametrize("features", [32, 64, 96, 128])
@pytest.mark.parametrize("sharp", [0.0, 0.3, 2.0, 30.0])
@pytest.mark.parametrize("lengths", [[1], [16, 16], [5, 1, 8], [31, 33, 32], [64, 40], [257, 130, 200]])
def test_it_is_attention_to_the_rounding_of_bfloat16(features: int, sharp: float, lengths: list[int]) -> None:
    """sharp: what queries are multiplied by; at 30 most see one key, and powers go beyond 2^±1000."""
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 2 * features)
    qkv[:, 0] *= sharp
    qkv, grad = qkv.flatten(1).bfloat16(), torch.randn(len(qkv), 2 * features).bfloat16()
    starts = np.cumsum([0, *lengths[:-1]])
    packing = Packing(
        len(lengths), max(lengths), len(qkv), np.array(lengths), starts, torch.from_numpy(starts), None, None
    )
    seen, norms = heads.attend(qkv, packing, 2)
    gradients = heads.attend_back(qkv, norms, grad, packing, 2)
    exact, of_exact = exactly(qkv, lengths, grad)
    parts = zip(of_exact.chunk(3, 1), gradients.chunk(3, 1), strict=True)  # of queries, keys and values
    for right, ours in ((exact, seen), *parts):
        # Where queries see one key each, gradients of scores are what rounding leaves of differences.
        assert (ours - right).norm() <= 0.006 * max(right.norm(), 0.05 * grad.norm())


@HERE
@COMPILER
@pytest.mark.parametrize("lengths", [[5, 1, 8], [31, 33, 32], [257, 130, 200]])
def test_frozen_attention_with_it_is_that_of_float32(lengths: list[int]) -> None:
    """And padding gets no gradients."""
    torch.manual_seed(0)
    maps = [nn.Linear(64, 64) for _ in range(4)]
    given, wanted = torch.randn(2, sum(lengths), 64)
    exact = both_ways(Attention(*maps, 2, torch.float32), lengths, given, wanted)
    compiled = both_ways(Attention(*maps, 2, torch.bfloat16, compiled=True), lengths, given, wanted)
    for right, ours in zip(exact[:2], compiled, strict=False):
        assert (ours - right).norm() <= 0.02 * right.norm()
    assert not compiled[2].any()


@HERE
@COMPILER
def test_it_depends_on_no_other_row_and_no_thread() -> None:
    lengths, starts = [37, 80, 4], np.array([0, 37, 117])
    qkv, wanted = torch.randn(121, 192).bfloat16(), torch.randn(121, 64).bfloat16()
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            packing = Packing(3, 80, 121, np.array(lengths), starts, torch.from_numpy(starts), None, None)
            seen, norms = heads.attend(qkv, packing, 2)
            found.append((seen, norms, heads.attend_back(qkv, norms, wanted, packing, 2)))
    finally:
        torch.set_num_threads(before)
    for start, length in zip(starts, lengths, strict=True):  # packed, so one by one they are parts of it
        alone = Packing(1, length, length, np.array([length]), np.zeros(1, np.int64), torch.zeros(1), None, None)
        part = slice(start, start + length)
        seen, norms = heads.attend(qkv[part], alone, 2)
        found.append((seen, norms, heads.attend_back(qkv[part], norms, wanted[part], alone, 2)))
    first, *others = found
    for other in others[:2]:
        assert all(map(torch.equal, first, other))
    for index in range(3):
        assert torch.equal(first[index], torch.cat([each[index] for each in others[2:]]))


@HERE
@COMPILER
def test_what_is_no_number_stays_none() -> None:
    qkv = torch.randn(8, 192).bfloat16()
    qkv[3, 70] = torch.nan  # of a key
    packing = Packing(1, 8, 8, np.array([8]), np.zeros(1, np.int64), torch.zeros(1), None, None)
    seen, _ = heads.attend(qkv, packing, 2)
    assert seen[:, :32].isnan().all()
    assert seen[:, 32:].isfinite().all()


@COMPILER
@pytest.mark.skipif(platform.machine() != "x86_64", reason="it is for x86 processors")
def test_the_compiler_has_nothing_to_say(tmp_path: Path) -> None:
    """On any of them: what is compiled need not run here."""
    warnings = ["-Wall", "-Wextra", "-Wno-sign-compare", "-Werror"]
    command = ["cc", *heads.FLAGS, *warnings, str(heads.SOURCE), "-o", str(tmp_path / "heads.so"), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_its_source_is_part_of_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(digest.PACKAGE / "training", tmp_path / "training")
    monkeypatch.setattr(digest, "PACKAGE", tmp_path)
    before = digest.of_code("training"), digest.of_code("training/heads"), digest.of_code("training/frozen")
    with (tmp_path / "training" / "heads.c").open("a") as source:
        source.write("\n")
    after = digest.of_code("training"), digest.of_code("training/heads"), digest.of_code("training/frozen")
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, False, True]


@HERE
@COMPILER
class TestLibrary:
    def test_it_is_compiled_once_and_leaves_nothing(
        self, anew: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        assert heads.fits(CPU, torch.bfloat16, 32)
        monkeypatch.setattr(subprocess, "run", None)
        assert heads.fits(CPU, torch.bfloat16, 32)
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("compiler", "why"),
        [("false", "false: 1"), ("cc --nonsense", "--nonsense"), ("true", "cannot open shared object file")],
    )
    def test_where_it_cannot_be_compiled_torch_computes_and_why_is_told(
        self, compiler: str, why: str, anew: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("CC", compiler)
        assert not heads.fits(CPU, torch.bfloat16, 32)
        (told,) = caplog.messages
        assert told.startswith("attention is computed by torch")
        assert why in told
        assert not Attention(*(nn.Linear(64, 64) for _ in range(4)), 2, torch.bfloat16, compiled=True).compiled

    def test_it_is_for_cpus_few_bits_and_whole_tiles(self) -> None:
        assert heads.fits(CPU, torch.bfloat16, 64)
        assert not heads.fits(CPU, torch.float32, 64)
        assert not heads.fits(CPU, torch.bfloat16, 48)
        assert not heads.fits(torch.device("cuda"), torch.bfloat16, 64)


@pytest.mark.parametrize("lacks", ["compiler", "instructions"])
def test_where_something_is_missing_nothing_is_compiled_and_nothing_told(
    lacks: str, anew: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: lacks != "instructions")
    if lacks == "compiler":
        monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(subprocess, "run", None)
    assert not heads.fits(CPU, torch.bfloat16, 32)
    assert not caplog.messages
