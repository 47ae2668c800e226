"""edgeq: fit a fine-tuned language model onto the device you own.

    import edgeq

    package = edgeq.export("demo", profile="laptop-cpu", output="out/").package    # needs edgeq[export]
    with edgeq.load("out/") as session:                                            # device side: no torch
        print(session.generate("The capital of France is", max_tokens=16).text)

Importing edgeq is cheap: everything heavy loads inside the functions that need it.
"""

__version__ = "0.1.0"

from edgeq.api import ExportResult, Verification, bench, evaluate, export, inspect, load, verify
from edgeq.errors import EdgeqError

__all__ = [
    "EdgeqError",
    "ExportResult",
    "Verification",
    "__version__",
    "bench",
    "evaluate",
    "export",
    "inspect",
    "load",
    "verify",
]
