"""Every error a user of edgeq can meet, as one tree.

    EdgeqError
    ├── UsageError          the command or call itself makes no sense (exit 2)
    │   └── ContextOverflow a prompt, with what is to follow it, does not fit the context
    ├── SourceError         a model folder or file is missing, broken or contradicts itself
    ├── UnsupportedError    a family, tensor, config value or grid that no row of ours describes
    ├── TokenizerError      a tokenizer or chat template is missing, broken or not described
    ├── ShapeError          two shapes that must agree do not
    ├── AdapterError        an adapter or patch file is broken, or is not for the model in memory
    ├── ProfileError        a device profile does not parse or contradicts itself
    ├── PlanError           what was asked for cannot fit or cannot be laid out
    ├── OutputError         the output exists, equals an input, or cannot be written
    ├── PackageError        a package's manifest or artifact is broken or does not match its hash
    ├── RuntimeFailure      llama.cpp refused or died; carries what it said
    ├── QueueFull           as many requests wait as may; try again later
    ├── GateError           the exported model does not match its reference
    └── MissingDependency   an optional part of edgeq is not installed

A message names the thing, the value seen, what was expected and the next step.
"""

from __future__ import annotations


class EdgeqError(Exception):
    """Base of all errors that edgeq raises for bad input or a failed step; exit status 1."""

    exit_code = 1


class UsageError(EdgeqError):
    exit_code = 2


class ContextOverflow(UsageError):
    pass


class SourceError(EdgeqError):
    pass


class UnsupportedError(EdgeqError):
    pass


class TokenizerError(EdgeqError):
    pass


class ShapeError(EdgeqError):
    pass


class AdapterError(EdgeqError):
    pass


class ProfileError(EdgeqError):
    pass


class PlanError(EdgeqError):
    pass


class OutputError(EdgeqError):
    pass


class PackageError(EdgeqError):
    pass


class RuntimeFailure(EdgeqError):
    pass


class QueueFull(EdgeqError):
    pass


class GateError(EdgeqError):
    pass


class MissingDependency(EdgeqError):
    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed. Install it with: pip install 'edgeq[{extra}]'")
        self.module = module
        self.extra = extra
