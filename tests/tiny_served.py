"""A tiny elastic package with two kept adapters, for servers: random weights, and a name for each."""

from __future__ import annotations

import json
from pathlib import Path

from lora_files import SHAPES, write_lora
from tiny_elastic import N_LAYERS, write_tiny_elastic

from edgeq.package import record_files

TARGETS = tuple(f"blk.{i}.{role}.weight" for i in range(N_LAYERS) for role in SHAPES)


def served_package(folder: Path) -> Path:
    """A package that holds the adapters "poems" and "sql"."""
    write_tiny_elastic(folder)
    (folder / "adapters").mkdir()
    for i, name in enumerate(("poems", "sql")):
        write_lora(folder / f"adapters/{name}.gguf", rank=3 + i, alpha=2.0, seed=i, targets=TARGETS, arch="deci")
    manifest = json.loads((folder / "manifest.json").read_text())
    records = record_files(folder, sorted((folder / "adapters").iterdir()))
    manifest["adapters"] = [{"name": Path(record.path).stem, **record.to_json()} for record in records]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
