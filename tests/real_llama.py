"""llama.cpp itself, in a child process: an abort() in C must not take the test run with it.

    python real_llama.py     reads a JSON list of requests on stdin, answers with a JSON list of the library's logs on stdout

Requests: {"do": "logits", "path", "n_ctx", "ids", "out", "adapter": path of a LoRA | null} writes float32 (n_ids, n_vocab) to `out`;
{"do": "quantize", "source", "target", "file_type", "imatrix": {tensor name: [floats]} | null, "dry_run"}.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def all_logits(
    paths: Sequence[Path], ids: Sequence[int], *, n_ctx: int, adapters: Sequence[Path | None] | None = None
) -> list[npt.NDArray[np.float32]]:
    """Logits of every position, (n_ids, n_vocab), for each file, with the adapter beside it; float32 KV cache, one thread."""
    beside = [None if path is None else str(path) for path in adapters or [None] * len(paths)]
    outs = [path.with_suffix(f".{i}.npy") for i, path in enumerate(paths)]
    files = zip(paths, outs, beside, strict=True)
    common = {"do": "logits", "n_ctx": n_ctx, "ids": list(ids)}
    _ask(*({**common, "path": str(path), "out": str(out), "adapter": adapter} for path, out, adapter in files))
    return [np.load(out) for out in outs]


def quantize(source: Path, targets: Mapping[Path, int], *, imatrix: Mapping[str, Sequence[float]] | None = None) -> None:
    """llama_model_quantize of a file into several, each with its file type; requantizing is allowed."""
    _ask(
        *(
            {"do": "quantize", "source": str(source), "target": str(path), "file_type": file_type, "imatrix": imatrix, "dry_run": False}
            for path, file_type in targets.items()
        )
    )


def quantized_types(source: Path, file_types: Sequence[int], *, imatrix: bool) -> list[dict[str, str]]:
    """Type of every tensor, upper case, that llama_model_quantize would give: its own dry run, read off its log."""
    requests = [
        {
            "do": "quantize",
            "source": str(source),
            "target": str(source) + ".unwritten",
            "file_type": file_type,
            "imatrix": {"no.such.tensor": [1.0]} if imatrix else None,
            "dry_run": True,
        }
        for file_type in file_types
    ]
    line = re.compile(r"\] +(\S+) +- \[[^\]]*\], type = +(\w+), size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\w+)\))?")
    answers = []
    for log in _ask(*requests):
        types = {name: (new or old).upper() for name, old, new in line.findall(log)}
        assert types, log
        answers.append(types)
    return answers


def _ask(*requests: Mapping[str, Any]) -> list[str]:
    """Run the requests in one child; the log of each. Fails the test with the child's output when it dies."""
    child = subprocess.run([sys.executable, __file__], input=json.dumps(requests), capture_output=True, text=True, check=False)
    assert child.returncode == 0, f"llama.cpp exited with {child.returncode}\n{child.stdout[-2000:]}\n{child.stderr[-2000:]}"
    return json.loads(child.stdout)


def _main() -> None:
    import llama_cpp as C

    lines: list[str] = []

    @C.llama_log_callback
    def note(level: int, text: bytes, user: ctypes.c_void_p) -> None:
        lines.append(text.decode("utf-8", "replace"))

    C.llama_log_set(note, ctypes.c_void_p(0))
    C.llama_backend_init()
    logs = []
    for request in json.load(sys.stdin):
        lines.clear()
        ok = {"logits": _logits, "quantize": _quantize}[request["do"]](C, request)
        log = "".join(lines)
        if not ok:
            sys.exit(f"{request['do']} failed:\n{log}")
        logs.append(log)
    print(json.dumps(logs))


def _logits(C: Any, request: Mapping[str, Any]) -> bool:
    ids = request["ids"]
    params = C.llama_model_default_params()
    params.n_gpu_layers = 0
    model = C.llama_model_load_from_file(request["path"].encode(), params)
    if not model:
        return False
    context_params = C.llama_context_default_params()
    context_params.n_ctx, context_params.n_batch, context_params.n_ubatch = request["n_ctx"], len(ids), len(ids)
    context_params.n_threads = context_params.n_threads_batch = 1
    context_params.flash_attn_type = 0
    context_params.type_k = context_params.type_v = 0  # float32
    context = C.llama_init_from_model(model, context_params)
    if not context:
        return False
    if request["adapter"] is not None:
        adapter = C.llama_adapter_lora_init(model, request["adapter"].encode())
        if not adapter or C.llama_set_adapters_lora(context, (C.llama_adapter_lora_p_ctypes * 1)(adapter), 1, (ctypes.c_float * 1)(1.0)):
            return False
    batch = C.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    if C.llama_decode(context, batch) != 0:
        return False
    n_vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(model))
    np.save(request["out"], np.ctypeslib.as_array(C.llama_get_logits(context), shape=(len(ids), n_vocab)))
    return True


def _quantize(C: Any, request: Mapping[str, Any]) -> bool:
    params = C.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = request["file_type"], 2, True
    params.dry_run = request["dry_run"]
    imatrix = request["imatrix"] or {}
    entries = (C.llama_model_imatrix_data * (len(imatrix) + 1))()
    kept = [(name.encode(), (ctypes.c_float * len(values))(*values)) for name, values in imatrix.items()]
    for entry, (name, values) in zip(entries, kept, strict=False):
        entry.name, entry.data, entry.size = name, values, len(values)
    if imatrix:
        params.imatrix = entries
    return C.llama_model_quantize(request["source"].encode(), request["target"].encode(), ctypes.byref(params)) == 0


if __name__ == "__main__":
    _main()
