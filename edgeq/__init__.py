"""edgeq: fit a fine-tuned language model onto the device you own.

    import edgeq

    package = edgeq.export("demo", profile="laptop-cpu", output="out/").package    # needs edgeq[export]
    with edgeq.load("out/") as session:                                            # device side: no torch
        print(session.generate("The capital of France is", max_tokens=16).text)

Importing edgeq is cheap: everything heavy loads inside the functions that need it.
"""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgeq.errors import EdgeqError

if TYPE_CHECKING:
    from edgeq.api import CutFile, ExportResult, Verification, bench, cut, evaluate, export, inspect, load, verify
    from edgeq.encoder_api import export_encoder, load_embedder

__all__ = [
    "CutFile",
    "EdgeqError",
    "ExportResult",
    "Verification",
    "__version__",
    "bench",
    "cut",
    "evaluate",
    "export",
    "export_encoder",
    "inspect",
    "load",
    "load_embedder",
    "verify",
]

_MODULES = {"export_encoder": "edgeq.encoder_api", "load_embedder": "edgeq.encoder_api"}  # of names that are not in edgeq.api


def __getattr__(name: str) -> Any:
    """Names of the API, when they are first used: cutting on a device starts without the rest."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES.get(name, "edgeq.api")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
