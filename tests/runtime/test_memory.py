from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
from tiny_gguf import write_tiny_gguf

from edgeq.runtime import memory
from edgeq.runtime.gguf_facts import read_facts
from edgeq.runtime.llama import LlamaModel
from edgeq.runtime.llama_context import LlamaContext
from edgeq.runtime.memory import kv_bytes, peak_rss_bytes, process_memory

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama", "head_dim": 32},
    "deci": {"arch": "deci", "n_layers": 3, "n_heads": [4, 6, 2], "n_kv_heads": [2, 3, 1], "head_dim": 32},
    "gemma3": {
        "arch": "gemma3",
        "n_layers": 7,
        "head_dim": 32,
        "fields": {"attention.sliding_window": 300},
    },
    "gemma3 pattern": {
        "arch": "gemma3",
        "n_layers": 4,
        "head_dim": 32,
        "fields": {"attention.sliding_window": 16, "attention.sliding_window_pattern": [True, False, True, True]},
    },
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n_ctx", [1, 256, 300, 1500])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_kv_bytes_are_what_llama_cpp_says_it_allocates(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, n_ctx: int, kv_type: str
) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", **MODELS[name])
    with (
        caplog.at_level(logging.DEBUG, logger="edgeq.runtime.llama"),
        LlamaModel.load(path) as model,
        LlamaContext(model, n_ctx=n_ctx, threads=1, kv_type=kv_type, flash_attention=True),
    ):
        expected = kv_bytes(model.facts, n_ctx, kv_type)
    said = [float(mib) for mib in re.findall(r"KV buffer size =\s+([\d.]+) MiB", caplog.text)]
    assert len(said) == (2 if any(model.facts.windowed) else 1)
    # The log rounds each buffer to 0.01 MiB.
    assert sum(said) == pytest.approx(expected / 2**20, abs=0.0051 * len(said))
    if n_ctx > 256:
        assert kv_bytes(model.facts, 256, kv_type) < expected


def test_kv_bytes_of_a_sequence_match_its_saved_state(tmp_path: Path) -> None:
    """The state holds the cells in use: their size must grow by exactly one cell's bytes per token."""
    path = write_tiny_gguf(tmp_path / "m.gguf")
    with LlamaModel.load(path) as model, LlamaContext(model, n_ctx=256, threads=1) as context:
        context.decode([1])
        first = len(context.state().data)
        context.decode([1] * 100)
        grown = len(context.state().data) - first
    per_cell = kv_bytes(model.facts, 256) // 256
    overhead = 100 * 12  # position, number of sequences, sequence id
    assert 100 * per_cell <= grown <= 100 * per_cell + overhead


def test_smollm2_shape_by_hand(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64)
    assert kv_bytes(read_facts(path), 512) == 30 * 512 * 2 * 3 * 64 * 2 == 11_796_480
    assert kv_bytes(read_facts(path), 513) == 30 * 768 * 2 * 3 * 64 * 2


def test_model_bytes_count_every_part(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    assert read_facts(path).tensor_bytes == sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


def test_process_memory_agrees_with_psutil() -> None:
    ballast = np.ones(32 << 20, dtype=np.uint8)
    found = process_memory(model_bytes=3, kv_bytes=4)
    assert (found.model_bytes, found.kv_bytes) == (3, 4)
    # Other allocations come and go between the two readings.
    assert found.rss == pytest.approx(psutil.Process().memory_info().rss, abs=8 << 20)
    assert found.rss >= ballast.nbytes
    assert set(found.to_json()) == {
        *("model_bytes", "kv_bytes", "cuts_bytes", "rss", "rss_anon", "rss_file", "rss_shmem", "pss", "peak_rss")
    }


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_parts_and_peak() -> None:
    ballast = np.ones(64 << 20, dtype=np.uint8)
    found = process_memory(model_bytes=0, kv_bytes=0)
    assert found.rss_anon is not None and found.rss_file is not None and found.pss is not None and found.peak_rss is not None
    assert found.rss_anon >= ballast.nbytes
    assert found.rss_anon + found.rss_file <= found.rss <= found.peak_rss
    assert found.pss <= found.rss
    del ballast
    after = process_memory(model_bytes=0, kv_bytes=0)
    assert after.rss < found.rss
    # The kernel keeps these counts per CPU and adds them up when it likes.
    assert after.peak_rss is not None and after.peak_rss >= found.peak_rss - (4 << 20), "the peak stays"


def test_mapped_pages_count_as_file_pages(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(16 << 20))
    before = process_memory(model_bytes=0, kv_bytes=0).rss_file
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    assert int(mapped[::4096].sum()) > 0
    after = process_memory(model_bytes=0, kv_bytes=0).rss_file
    if before is None or after is None:
        pytest.skip("the system does not tell file pages apart")
    assert after - before >= 15 << 20


def test_without_proc_psutil_and_getrusage_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "_SMAPS", tmp_path / "none")
    found = process_memory(model_bytes=0, kv_bytes=0)
    assert (found.rss_anon, found.rss_file, found.pss) == (None, None, None)
    assert found.rss == pytest.approx(psutil.Process().memory_info().rss, abs=8 << 20)
    peak = peak_rss_bytes()
    assert peak is not None and peak > 10 << 20
