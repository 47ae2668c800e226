"""The process in which one artifact is measured. Started by `edgeq.runtime.bench`, never by hand; definitions are there.

Requests, in order: {"op": "load", path, adapter, threads, device, n_ctx, kv_type}, any number of {"op": "repeat", prompt, gen_tokens},
{"op": "end", repeat}. Between requests it waits for its stdin and uses no processor.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgeq.runtime.adapter_formats import AnyAdapter, load_adapter
from edgeq.runtime.child import serve
from edgeq.runtime.contention import others_meter
from edgeq.runtime.decoding import greedy_steps
from edgeq.runtime.device import parse_device
from edgeq.runtime.energy import cpu_meter, gpu_meter, vram_bytes
from edgeq.runtime.engine import load_model, new_context, prepare
from edgeq.runtime.memory import peak_rss_bytes, process_memory


class Bench:
    """One artifact, loaded once. Methods are the operations."""

    def __init__(self) -> None:
        self.gpu: int | None = None

    def load(self, *, path: str, adapter: str | None, threads: int | None, device: str, n_ctx: int, kv_type: str) -> dict[str, Any]:
        self.gpu = parse_device(device)
        prepare(Path(path))
        before = process_memory(model_bytes=0, kv_bytes=0).rss
        began = time.perf_counter()
        self.model = load_model(Path(path), gpu=self.gpu, threads=threads)
        self.context = new_context(self.model, n_ctx=n_ctx, threads=threads, kv_type=kv_type, max_outputs=1)
        self.adapter: AnyAdapter | None = None
        if adapter is not None:
            self.adapter = load_adapter(self.model, Path(adapter))
            self.context.set_adapters({self.adapter: 1.0})
        load_s = time.perf_counter() - began
        return {"load_s": load_s, "rss_before_load_bytes": before, "threads": self.context.threads, "description": self.model.description}

    def repeat(self, *, prompt: list[int], gen_tokens: int) -> dict[str, Any]:
        others = others_meter()
        self.context.clear()
        began = time.perf_counter_ns()
        logits = self.context.decode(prompt)  # reading them waits for the device
        prefilled = time.perf_counter_ns()
        token = int(logits[0].argmax())
        first = time.perf_counter_ns()
        meter = cpu_meter() if self.gpu is None else gpu_meter(self.gpu)
        stamps = greedy_steps(self.context, token, gen_tokens)
        energy = None if meter is None else meter()
        return {
            "prefill_s": (prefilled - began) / 1e9,
            "ttft_ms": (first - began) / 1e6,
            "decode_s": int(stamps[-1] - stamps[0]) / 1e9,
            "itl_ms": ((stamps[1:] - stamps[:-1]) / 1e6).tolist(),
            "energy_j": energy,
            "other_cores": others(),
        }

    def end(self, *, repeat: int) -> dict[str, Any]:
        vram = None if self.gpu is None else vram_bytes(self.gpu, os.getpid())
        memory = {"peak_rss_bytes": peak_rss_bytes(), "vram_bytes": vram, "model_bytes": self.model.size_bytes}
        if self.adapter is None:
            return {**memory, "adapter_switch_ms": None}
        from edgeq.runtime.switching import switch_seconds  # not before the model is loaded: what it imports would count as the model's

        return {**memory, "adapter_switch_ms": 1000 * switch_seconds(self.context, self.adapter, repeat=repeat)}


def main() -> None:
    bench = Bench()
    operations: dict[str, Callable[..., Any]] = {"load": bench.load, "repeat": bench.repeat, "end": bench.end}

    def handle(request: Mapping[str, Any]) -> Any:
        arguments = dict(request)
        return operations[arguments.pop("op")](**arguments)

    serve(handle)


if __name__ == "__main__":
    main()
