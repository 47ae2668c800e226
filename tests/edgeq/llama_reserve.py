"""What llama.cpp itself says it allocates for a context, from its log. Run as a program, for its log callback is one per process.

stdin: a JSON list of {path, n_ctx, kv_type, flash, n_outputs, n_ubatch, swa_full}; stdout: a JSON list of {kv_mib, compute_mib}.
Nothing is loaded: llama.cpp plans its buffers without allocating them (no_alloc).
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import llama_cpp as c

LINES: list[str] = []


@c.llama_log_callback
def on_log(_level: int, text: bytes, _data: object) -> None:
    LINES.append(text.decode("utf-8", "replace"))


def reserve(case: dict[str, Any]) -> dict[str, float]:
    LINES.clear()
    model_params = c.llama_model_default_params()
    model_params.no_alloc, model_params.load_mode, model_params.use_extra_bufts = True, c.LLAMA_LOAD_MODE_NONE, False
    model = c.llama_model_load_from_file(case["path"].encode(), model_params)
    params = c.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = case["n_ctx"], 512, case["n_ubatch"]
    params.n_outputs_max, params.swa_full, params.flash_attn_type = case["n_outputs"], case["swa_full"], int(case["flash"])
    params.type_k = params.type_v = getattr(c, f"GGML_TYPE_{case['kv_type'].upper()}")
    context = c.llama_init_from_model(model, params) if model else None
    log = "".join(LINES)
    if not context:
        sys.exit(log)
    c.llama_free(context)
    c.llama_model_free(model)
    kv = re.findall(r"size =\s*([\d.]+) MiB \(\s*\d+ cells", log)
    compute = re.findall(r"compute buffer size =\s*([\d.]+) MiB", log)
    return {"kv_mib": sum(map(float, kv)), "compute_mib": sum(map(float, compute))}


if __name__ == "__main__":
    c.llama_log_set(on_log, None)
    c.llama_backend_init()
    json.dump([reserve(case) for case in json.load(sys.stdin)], sys.stdout)
