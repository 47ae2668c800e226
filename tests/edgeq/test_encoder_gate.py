"""The gate of embedding packages: metrics, limits, and what is kept of a verdict."""

import json
from dataclasses import replace

import numpy as np
import pytest

from edgeq.encoder_gate import LIMITS, OWN_LIMITS, EncoderGate, compare, gate_texts, judge
from edgeq.errors import PackageError, UsageError


def vectors(n=45, width=16, seed=0):
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


def test_metrics_against_their_definition():
    a, b = vectors(), vectors() + 0.1 * vectors(seed=1)
    found, worst = compare(b * 3, a)  # lengths do not count
    cosines = [float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)) for x, y in zip(a, b, strict=True)]
    assert found.texts == 45
    assert found.cosine_mean == pytest.approx(np.mean(cosines), abs=1e-6)
    assert found.cosine_min == pytest.approx(min(cosines), abs=1e-6)
    assert worst == int(np.argmin(cosines))
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b)]
    assert found.similarity_error == pytest.approx(np.abs(unit[0] @ unit[0].T - unit[1] @ unit[1].T).max(), abs=1e-6)


def test_equal_embeddings_pass_every_format():
    for name, limits in LIMITS.items():
        verdict = judge(vectors(), vectors(), format=name, runtime="r", own=vectors() if name in OWN_LIMITS else None)
        assert verdict.passed and verdict.limits == limits
        assert verdict.found.cosine_min == pytest.approx(1)


@pytest.mark.parametrize("name", LIMITS)
def test_every_limit_can_fail(name):
    noise = (1 / LIMITS[name].cosine_mean ** 2 - 1) ** 0.5
    for times, passed in ((0.3, True), (3, False)):
        off = vectors() + times * noise * vectors(seed=1)
        verdict = judge(off, vectors(), format=name, runtime="r")
        assert verdict.passed is passed, (times, verdict.found)
    assert any(f"mean cosine to the source is {verdict.found.cosine_mean:.5f}; at least" in fault for fault in verdict.failures)
    assert all(fault.endswith(f"is expected of {name}") for fault in verdict.failures)


def test_a_single_text_that_is_off_fails():
    off = vectors()
    off[7] = -off[7]
    verdict = judge(off, vectors(), format="int4", runtime="r")
    assert verdict.found.cosine_mean > LIMITS["int4"].cosine_mean
    assert verdict.failures == ("least cosine to the source is -1.00000; at least 0.75 is expected of int4",)
    assert f"least cosine ({verdict.worst})" in [name for name, *_ in verdict.rows()]


def test_a_fault_of_the_graph_is_found_behind_a_coarse_format():
    source = vectors()
    rounded = source + 0.25 * vectors(seed=1)  # what int4 may lose
    broken = rounded + 0.15 * vectors(seed=2)
    assert judge(rounded, source, format="int4", runtime="r", own=rounded).passed
    verdict = judge(broken, source, format="int4", runtime="r", own=rounded)
    assert verdict.failures and all("to the reference on its own weights is" in fault for fault in verdict.failures)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_fails(value):
    off = vectors()
    off[3, 2] = value
    verdict = judge(off, vectors(), format="int4", runtime="r")
    assert not verdict.passed and verdict.found.cosine_min == -1
    json.dumps(verdict.to_json(), allow_nan=False)


def test_json_and_back():
    verdict = judge(vectors() + 0.1, vectors(), format="int8", runtime="onnxruntime 1 on CPU", own=vectors())
    document = json.loads(json.dumps(verdict.to_json()))
    assert EncoderGate.from_json(document) == verdict
    assert document["passed"] is verdict.passed
    for broken in ({**document, "more": 1}, {k: v for k, v in document.items() if k != "found"}, {**document, "limits": {}}):
        with pytest.raises(PackageError, match=r"the gate result lacks or misspells"):
            EncoderGate.from_json(broken)


def test_rows_show_the_own_weights_only_where_they_were_compared():
    verdict = judge(vectors(), vectors(), format="int8", runtime="r", own=vectors())
    assert [name for name, *_ in verdict.rows()][-1] == "mean cosine, own weights"
    assert "own weights" not in str(replace(verdict, own=None).rows())
    assert verdict.compared == "45 texts"


def test_other_shapes_are_refused():
    with pytest.raises(UsageError, match=r"shape \[45, 16\] cannot be compared with others of shape \[45, 17\]"):
        compare(vectors(), vectors(width=17))


def test_texts_are_many_and_differ():
    assert len(gate_texts()) == len(set(gate_texts())) == 45


def test_the_limits_in_the_docs_are_those_of_the_code():
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "embeddings.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.split("## The gate")[1].splitlines() if line.startswith("|")
    ]
    assert rows[2:] == [[name, f"{limits.cosine_mean:g}", f"{limits.cosine_min:g}"] for name, limits in LIMITS.items()]
