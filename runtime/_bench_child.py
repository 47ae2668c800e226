"""The process in which one artifact is measured once. Started by `edgeq.runtime.bench`, never by hand; definitions are in `bench_fields`.

Requests, in order: {"op": "load", path, adapter, threads, device, n_ctx, kv_type, batch}, any number of {"op": "repeat", prompts,
gen_tokens}, {"op": "end"}. Between requests it waits for its stdin and uses no processor.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from edgeq.runtime.adapter_formats import AnyAdapter, load_adapter
from edgeq.runtime.child import serve
from edgeq.runtime.contention import others_meter
from edgeq.runtime.decoding import greedy_steps
from edgeq.runtime.device import parse_device
from edgeq.runtime.energy import cpu_meter, gpu_meter, vram_bytes
from edgeq.runtime.engine import Context, Model, load_model, new_context, prepare
from edgeq.runtime.likelihood import Floats
from edgeq.runtime.memory import peak_rss_bytes, process_memory
from edgeq.runtime.thermal import frequency_mhz, temperature_c

if TYPE_CHECKING:
    from edgeq.runtime.bench_sequences import LlamaSequences

_COMPUTE = re.compile(r"compute buffer size (?:is|of) +([\d.]+) MiB")


class _Loop(Protocol):
    """What is timed: prompts in, logits of their last tokens out; then one token of each after another."""

    threads: int

    def clear(self) -> None: ...
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Floats: ...
    def greedy_steps(self, tokens: npt.NDArray[np.int64], n_steps: int) -> npt.NDArray[np.int64]: ...
    def close(self) -> None: ...


class _Single:
    """One sequence, in either runtime."""

    def __init__(self, context: Context) -> None:
        self.context, self.threads = context, context.threads

    def clear(self) -> None:
        self.context.clear()

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Floats:
        (prompt,) = prompts
        return self.context.decode(prompt)  # reading logits waits for the device

    def greedy_steps(self, tokens: npt.NDArray[np.int64], n_steps: int) -> npt.NDArray[np.int64]:
        return greedy_steps(self.context, int(tokens[0]), n_steps)

    def close(self) -> None:
        self.context.close()


class Bench:
    """One artifact, loaded once. Methods are the operations."""

    def __init__(self) -> None:
        self.gpu: int | None = None

    def load(
        self, *, path: str, adapter: str | None, threads: int | None, device: str, n_ctx: int, kv_type: str, batch: int
    ) -> dict[str, Any]:
        self.gpu = parse_device(device)
        prepare(Path(path))
        before = process_memory(model_bytes=0, kv_bytes=0).rss
        began = time.perf_counter()
        self.model: Model = load_model(Path(path), gpu=self.gpu, threads=threads, adapted=adapter is not None)
        self.adapter: AnyAdapter | None = None if adapter is None else load_adapter(self.model, Path(adapter))
        self.loop: _Loop
        if batch == 1:
            context = new_context(self.model, n_ctx=n_ctx, threads=threads, kv_type=kv_type, max_outputs=1)
            if self.adapter is not None:
                context.set_adapters({self.adapter: 1.0})
            self.loop = _Single(context)
        else:
            self.loop = self._together(batch, n_ctx=n_ctx, threads=threads, kv_type=kv_type)
        load_s = time.perf_counter() - began
        return {"load_s": load_s, "rss_before_load_bytes": before, "threads": self.loop.threads, "description": self.model.description}

    def _together(self, batch: int, *, n_ctx: int, threads: int | None, kv_type: str) -> LlamaSequences:
        from edgeq.runtime.bench_sequences import LlamaSequences
        from edgeq.runtime.llama import LlamaAdapter, LlamaModel

        assert isinstance(self.model, LlamaModel)
        loop = LlamaSequences(self.model, n_sequences=batch, n_ctx=n_ctx, threads=threads, kv_type=kv_type)
        if isinstance(self.adapter, LlamaAdapter):
            loop.set_adapter(self.adapter)
        return loop

    def repeat(self, *, prompts: list[list[int]], gen_tokens: int) -> dict[str, Any]:
        others = others_meter()
        self.loop.clear()
        began = time.perf_counter_ns()
        logits = self.loop.prefill(prompts)
        prefilled = time.perf_counter_ns()
        tokens = logits.argmax(axis=1)
        first = time.perf_counter_ns()
        meter = cpu_meter() if self.gpu is None else gpu_meter(self.gpu)
        stamps = self.loop.greedy_steps(tokens, gen_tokens)
        energy = None if meter is None else meter()
        other_cores = others()
        return {
            "prefill_s": (prefilled - began) / 1e9,
            "ttft_ms": (first - began) / 1e6,
            "decode_s": int(stamps[-1] - stamps[0]) / 1e9,
            "itl_ms": ((stamps[1:] - stamps[:-1]) / 1e6).tolist(),
            "energy_j": energy or None,  # a counter that did not move in so short a time knows nothing
            "other_cores": other_cores,
            "steady_rss_bytes": process_memory(model_bytes=0, kv_bytes=0).rss,
            "temperature_c": temperature_c(self.gpu),
            "frequency_mhz": frequency_mhz(self.gpu),
        }

    def end(self) -> dict[str, Any]:
        vram = None if self.gpu is None else vram_bytes(self.gpu, os.getpid())
        found: dict[str, Any] = {
            "peak_rss_bytes": peak_rss_bytes(),
            "vram_bytes": vram,
            "model_bytes": self.model.size_bytes,
            "adapter_switch_ms": None,
        }
        if self.adapter is not None and isinstance(self.loop, _Single):
            from edgeq.runtime.switching import switch_seconds  # not before the peak is read: what it imports would count as the model's

            found["adapter_switch_ms"] = 1000 * switch_seconds(self.loop.context, self.adapter, repeat=3)
        return {**found, "compute_bytes": _compute_bytes(self.loop)}


def _compute_bytes(loop: _Loop) -> int | None:
    """Closes the context. llama.cpp states the size of its compute buffers, one per device, when it frees them."""
    found: list[float] = []

    class Reader(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.extend(float(size) for size in _COMPUTE.findall(record.getMessage()))

    logger, reader = logging.getLogger("edgeq.runtime.llama"), Reader()
    before = logger.level, logger.propagate
    logger.addHandler(reader)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        loop.close()
    finally:
        logger.removeHandler(reader)
        logger.setLevel(before[0])
        logger.propagate = before[1]
    return round(sum(found) * 2**20) if found else None


def main() -> None:
    bench = Bench()
    operations: dict[str, Callable[..., Any]] = {"load": bench.load, "repeat": bench.repeat, "end": bench.end}

    def handle(request: Mapping[str, Any]) -> Any:
        arguments = dict(request)
        return operations[arguments.pop("op")](**arguments)

    serve(handle)


if __name__ == "__main__":
    main()
