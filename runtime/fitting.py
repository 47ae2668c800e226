"""The largest model that fits the memory free now: which rate `rate="auto"` stands for.

What a cut will take, as `edgeq.footprint` predicts it for exports:

    its file               in memory (rate 0 is the artifact itself, mapped, of which the system may drop what is rearranged)
    rearranged weights     a second copy of matrices whose products llama.cpp speeds up that way on this processor
    KV cache               of the KV heads that stay, at the context that is asked for
    compute, process       as planned for the whole model at export; a cut takes no more

ONNX Runtime rearranges all matrices; see `edgeq.onnx_memory`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection
from dataclasses import replace
from itertools import chain
from math import prod

from edgeq.detect import available_ram, detect_machine
from edgeq.elastic import MAX_RATE
from edgeq.errors import PackageError, PlanError
from edgeq.footprint import N_UBATCH, is_repacked
from edgeq.onnx_memory import REARRANGED
from edgeq.profiles import Isa
from edgeq.runtime.cut_plan import plan_cut
from edgeq.runtime.elastic_package import ElasticGguf, ElasticPackage, Size
from edgeq.runtime.engine import Facts
from edgeq.runtime.memory import kv_bytes
from edgeq.runtime.onnx_facts import OnnxFacts
from edgeq.sizes import size as shown


def fitting_size(elastic: ElasticPackage, facts: Facts, *, n_ctx: int, kv_type: str) -> Size:
    """The first size of the ladder that fits. facts: of the artifact. Raises PlanError when even the smallest does not."""
    free, n_steps, isa = available_ram(), len(elastic.elastic.ladder.steps), detect_machine().isa

    def fits(n: int) -> bool:
        return needed_bytes(elastic, facts, elastic.at_steps(n), n_ctx=n_ctx, kv_type=kv_type, isa=isa) <= free

    if fits(0):
        return elastic.at_steps(0)
    last = min(n_steps, elastic.at_rate(MAX_RATE).n_steps)
    found = 1 + bisect_left(range(1, last + 1), True, key=fits)
    if found > last:
        least = needed_bytes(elastic, facts, elastic.at_steps(last), n_ctx=n_ctx, kv_type=kv_type, isa=isa)
        raise PlanError(
            f"{elastic.package.folder}: {shown(free)} of memory are free, but even the smallest cut needs {shown(least)} with {n_ctx:,} "
            "tokens of context. Close other programs, or give a smaller n_ctx."
        )
    return elastic.at_steps(found)


def needed_bytes(elastic: ElasticPackage, facts: Facts, size: Size, *, n_ctx: int, kv_type: str, isa: Collection[Isa]) -> int:
    """Prediction of the memory that a session on this cut takes on a CPU with these instruction sets."""
    try:
        planned = elastic.package.manifest["plan"]["memory"]
        fixed, planned_ctx = planned["compute_bytes"] + planned["runtime_bytes"], planned["n_ctx"]
    except (KeyError, TypeError) as err:
        raise PackageError(
            f"{elastic.package.folder}: the manifest has no plan of memory ({err}). Give a rate as a number, or export the package again."
        ) from err
    if isinstance(facts, OnnxFacts):
        return round(REARRANGED * elastic.bytes_of(size.kept)) + _cache_bytes(facts, size, n_ctx) + fixed
    masks = 4 * N_UBATCH * max(0, n_ctx - planned_ctx)  # of a full and a windowed cache, in half precision
    head_dim = size.kept.head_dim or facts.key_length
    left = replace(facts, n_kv_heads=size.kept.n_kv, key_length=head_dim, value_length=head_dim)
    assert isinstance(elastic, ElasticGguf), "facts are of the package's artifact"
    return elastic.bytes_of(size.kept) + _rearranged(elastic, size, isa) + kv_bytes(left, n_ctx, kv_type) + fixed + masks


def _cache_bytes(facts: OnnxFacts, size: Size, n_ctx: int) -> int:
    """Keys and values of the KV heads that stay."""
    caches = [
        replace(cache, n_kv_heads=n) for cache, n in zip(facts.caches, chain.from_iterable((n, n) for n in size.kept.n_kv), strict=True)
    ]
    return replace(facts, caches=tuple(caches)).kv_bytes(n_ctx)


def _rearranged(elastic: ElasticGguf, size: Size, isa: Collection[Isa]) -> int:
    if not size.n_steps:
        return 0
    matrices = (t.layout for t in plan_cut(elastic.header, size.kept).tensors if len(t.layout.shape) == 2)
    return sum(t.nbytes for t in matrices if is_repacked(t.grid, prod(t.shape[:-1]), isa))
