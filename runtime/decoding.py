"""The timed decode loop: greedy generation with nothing in it but the runtime, numpy's argmax, a clock and two array writes.

With llama.cpp the batch is built before the clock starts, and everything but llama_decode takes 4 microseconds per token of SmolLM2;
`benchmarks/overhead.py` compares with loops that have nothing of edgeq in them.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from edgeq.runtime.engine import Context


def greedy_steps(context: Context, token: int, n_steps: int) -> npt.NDArray[np.int64]:
    """Feed `token`, then the likeliest token after each, n_steps in all; end-of-generation tokens are fed like any other.

    Returns clock readings in ns, (n_steps + 1,): the start and the moment each new token is known.
    Raises UsageError when the steps do not fit the context, RuntimeFailure when the runtime fails.
    """
    step, clock = context.greedy_stepper(n_steps), time.perf_counter_ns
    stamps = np.empty(n_steps + 1, dtype=np.int64)
    stamps[0] = clock()
    for i in range(1, n_steps + 1):
        token = step(token)
        stamps[i] = clock()
    return stamps
