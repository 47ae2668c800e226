"""Rows from made-up samples: what follows from them, what is flagged and what is not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import write_tiny_gguf

from edgeq.gguf_file import TensorLayout
from edgeq.grids import grid
from edgeq.runtime import bench_warnings as say
from edgeq.runtime.bench_fields import BenchResult
from edgeq.runtime.bench_kernels import kernel_reason
from edgeq.runtime.bench_plan import Configuration, Entry
from edgeq.runtime.bench_rows import Measured, Run, frequency_drift, rows_of
from edgeq.runtime.bench_stats import Ratio
from edgeq.runtime.gguf_facts import read_facts

AVX512 = ("avx2", "avx512f", "avx512_vnni", "f16c", "fma")
RUN = Run(device="cpu", repeat=5, before=0.0, waited_s=0.3, machine={"cpu": {"usable_cores": 2, "flags": AVX512}})


def sample(**changes: Any) -> dict[str, Any]:
    quiet = {"cold": False, "resident_fraction": 1.0, "load_s": 0.2, "rss_before_load_bytes": 50, "threads": 2, "description": "tiny"}
    timed = {"prefill_s": 0.5, "ttft_ms": 501.0, "decode_s": 0.1, "itl_ms": [10.0] * 10, "energy_j": None, "other_cores": 0.01}
    memory = {"steady_rss_bytes": 190, "peak_rss_bytes": 200, "vram_bytes": None, "model_bytes": 1000, "compute_bytes": 300}
    return {**quiet, **timed, **memory, "temperature_c": None, "frequency_mhz": None, "adapter_switch_ms": None, **changes}


def decoding(seconds: float, rounds: int = 5, **changes: Any) -> list[dict[str, Any]]:
    """Rounds of that decode time, a few percent up and down together for all who are measured in them."""
    weather = [1.0, 1.04, 0.98, 1.03, 0.99, 1.02, 0.97][:rounds]
    return [sample(decode_s=seconds * factor, itl_ms=[seconds * factor * 100] * 10, **changes) for factor in weather]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("rows") / "tiny.gguf")


def measured(path: Path, quant: str, samples: Sequence[Mapping[str, Any]], *, base: bool = False, **changes: Any) -> Measured:
    """A variant of the tiny model whose matrices are said to be in a format."""
    facts = read_facts(path)
    facts = replace(facts, tensors={"blk.0.ffn_up.weight": TensorLayout("blk.0.ffn_up.weight", (160, 256), grid(quant))})
    settings: dict[str, Any] = {"artifact": f"m-{quant}.gguf", "rate": None, "elastic_package": None, "sha256": quant * 8, "kv_type": "f16"}
    entry = Entry(path=path, files=(path,), quant=quant, facts=facts, **{**settings, **changes})
    configuration = Configuration(entry=entry, prompt_tokens=64, gen_tokens=10, batch=1, threads=2, base=base)
    return Measured(configuration=configuration, samples=samples, discarded=[])


def rows(*variants: Measured, run: Run = RUN) -> list[BenchResult]:
    found = rows_of(variants, run)
    for row in found:
        assert json.loads(json.dumps(row.to_json(), allow_nan=False)) == row.to_json()
    return found


def test_a_variant_slower_than_a_less_compressed_one_is_flagged_with_the_kernel_to_blame(path: Path) -> None:
    slow, fast = rows(measured(path, "Q4_1", decoding(0.10, model_bytes=500)), measured(path, "Q4_K", decoding(0.08, model_bytes=900)))
    assert slow.warnings == [
        "decodes 20% slower than m-Q4_K.gguf (ratio 0.80, 0.80 to 0.80), though smaller (500 B against 900 B): "
        "llama.cpp rearranges Q4_K blocks for this CPU's vector instructions, and Q4_1 blocks it does not"
    ]
    assert fast.warnings == []


def test_slow_prompts_are_flagged_too_and_the_fastest_is_named(path: Path) -> None:
    variants = [
        measured(path, "Q4_1", decoding(0.1, model_bytes=500, prefill_s=0.9)),
        measured(path, "Q5_0", decoding(0.1, model_bytes=600, prefill_s=0.7)),
        measured(path, "Q8_0", decoding(0.1, model_bytes=900, prefill_s=0.5)),
    ]
    smallest, middle, _ = rows(*variants)
    assert smallest.warnings == [
        "computes prompts 44% slower than m-Q8_0.gguf (ratio 0.56, 0.56 to 0.56), though smaller (500 B against 900 B): "
        "llama.cpp multiplies Q8_0 with several tokens at once on this CPU, and Q4_1 with one after another"
    ]
    assert "Q5_0 keeps the fifth bit of its weights apart from the others" in middle.warnings[0]


def test_a_variant_slower_than_its_size_accounts_for_is_flagged_where_the_kernels_say_why(path: Path) -> None:
    """Q4_1 beside Q4_0 on a CPU with AVX-512: a tenth more bytes, half the speed."""
    slow, fast = rows(measured(path, "Q4_1", decoding(0.10, model_bytes=550)), measured(path, "Q4_0", decoding(0.05, model_bytes=500)))
    assert slow.warnings == [
        "decodes 50% slower than m-Q4_0.gguf (ratio 0.50, 0.50 to 0.50), more than its size accounts for (550 B against 500 B): "
        "llama.cpp rearranges Q4_0 blocks for this CPU's vector instructions, and Q4_1 blocks it does not"
    ]
    assert fast.warnings == []
    explained = measured(path, "Q4_1", decoding(0.10, model_bytes=1000)), measured(path, "Q4_0", decoding(0.05, model_bytes=500))
    assert rows(*explained)[0].warnings == [], "twice the bytes, half the speed"
    unexplained = measured(path, "F16", decoding(0.10, model_bytes=550)), measured(path, "Q8_0", decoding(0.05, model_bytes=500))
    assert rows(*unexplained)[0].warnings == [], "no reason that is known"


def test_what_is_not_slower_for_sure_is_not_flagged(path: Path) -> None:
    base = measured(path, "Q8_0", decoding(0.100, model_bytes=900))
    assert rows(measured(path, "Q4_1", decoding(0.102, model_bytes=500)), base)[0].warnings == [], "2 % are as good as equal"
    erratic = [sample(decode_s=seconds, model_bytes=500) for seconds in (0.12, 0.09, 0.13, 0.08, 0.12)]
    assert not any("slower" in text for text in rows(measured(path, "Q4_1", erratic), base)[0].warnings), "the interval reaches beyond 1"
    assert rows(measured(path, "Q4_1", decoding(0.12, model_bytes=899)), base)[0].warnings == [], "not smaller by 1 %"
    other_threads = measured(path, "Q8_0", decoding(0.05, model_bytes=900))
    other_threads = replace(other_threads, configuration=replace(other_threads.configuration, threads=1))
    assert rows(measured(path, "Q4_1", decoding(0.12, model_bytes=500)), other_threads)[0].warnings == []
    stranger = write_tiny_gguf(path.parent / "deeper.gguf", n_layers=3)
    assert (
        rows(measured(path, "Q4_1", decoding(0.12, model_bytes=500)), measured(stranger, "Q8_0", decoding(0.05, model_bytes=900)))[
            0
        ].warnings
        == []
    ), "another model"


def test_a_cut_of_a_package_is_compared_with_the_package(path: Path) -> None:
    cut = measured(path, "Q4_0", decoding(0.12, model_bytes=500), artifact="p", rate=0.25)
    whole = measured(
        write_tiny_gguf(path.parent / "whole.gguf", n_layers=3), "Q4_0", decoding(0.10, model_bytes=900), artifact="p", rate=0.0
    )
    row, _ = rows(cut, whole)
    assert row.warnings == ["decodes 17% slower than p (ratio 0.83, 0.83 to 0.83), though smaller (500 B against 900 B)"], "no known reason"


@pytest.mark.parametrize(
    ("slow", "fast", "flags", "phase", "reason"),
    [
        ("Q4_1", "Q4_K", ("avx2",), "decode", "rearranges Q4_K blocks"),
        ("Q5_1", "IQ4_NL", ("avx2",), "prefill", "rearranges IQ4_NL blocks"),
        ("Q4_1", "Q8_0", ("avx2",), "decode", None),
        ("Q4_1", "Q8_0", ("avx2",), "prefill", "multiplies Q8_0 with several tokens at once"),
        ("Q4_1", "Q8_0", ("neon", "dotprod"), "decode", "rearranges Q8_0 blocks"),
        ("Q3_K", "Q4_0", ("neon", "dotprod"), "decode", "rearranges Q4_0 blocks"),
        ("Q3_K", "Q8_0", ("avx2",), "prefill", None),
        ("Q2_K", "Q3_K", ("avx2", "avx512f"), "decode", None),
        ("Q2_K", "Q4_K", ("avx2",), "decode", "rearranges Q4_K blocks"),
        ("Q2_K", "Q4_K", ("avx2", "avx512f"), "decode", None),
        ("Q5_1", "Q8_0", ("avx2",), "decode", "keeps the fifth bit"),
        ("Q5_1", "Q8_0", (), "decode", "keeps the fifth bit"),
        ("Q4_1", "F16", (), "prefill", None),
        ("Q4_0", "Q8_0", ("avx2",), "prefill", None),
    ],
)
def test_reasons_are_those_of_the_kernels(slow: str, fast: str, flags: Sequence[str], phase: Any, reason: str | None) -> None:
    found = kernel_reason(grid(slow), grid(fast), flags=flags, phase=phase)
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_ratios_to_the_base_are_paired(path: Path) -> None:
    base, other = rows(
        measured(path, "Q8_0", decoding(0.1, model_bytes=900), base=True),
        measured(path, "Q4_1", decoding(0.08, model_bytes=500, peak_rss_bytes=150)),
    )
    assert base.against is None
    assert other.against is not None
    assert other.against["decode_tok_s"] == {"ratio": pytest.approx(1.25), "low": pytest.approx(1.25), "high": pytest.approx(1.25)}
    assert other.against["peak_rss_bytes"]["ratio"] == 0.75
    assert "energy_j_per_token" not in other.against, "unknown on either side"
    assert rows(measured(path, "Q4_1", decoding(0.08)))[0].against is None


def test_energy_that_is_not_known_is_null_and_never_zero(path: Path) -> None:
    (row,) = rows(measured(path, "Q4_1", decoding(0.1)))
    assert row.energy_j_per_token is None and row.intervals["energy_j_per_token"] is None and row.spread["energy_j_per_token"] is None
    some = [sample(energy_j=joules) for joules in (2.0, None, 3.0, 4.0, None)]
    (row,) = rows(measured(path, "Q4_1", some))
    assert row.energy_j_per_token == 0.3, "per token of the batch"
    assert row.intervals["energy_j_per_token"] == (pytest.approx(0.2), pytest.approx(0.4))


def test_warm_and_cold_loads_are_told_apart(path: Path) -> None:
    samples = [sample(load_s=0.2 + 0.01 * i, cold=False) for i in range(3)] + [sample(load_s=1.5, cold=True, resident_fraction=0.0)] * 2
    (row,) = rows(measured(path, "Q4_1", samples))
    assert (row.load_s, row.load_cold_s) == (pytest.approx(0.21), 1.5)
    assert row.intervals["load_s"] is not None and row.intervals["load_cold_s"] is None, "two cold loads make no interval"
    assert row.warnings == []
    samples[0]["resident_fraction"] = 0.4
    (row,) = rows(measured(path, "Q4_1", samples))
    assert row.warnings == ["only 40% of the files fit the page cache, so load_s is not that of a cached file"]


def test_figures_of_a_batch_count_all_sequences(path: Path) -> None:
    one = measured(path, "Q4_1", decoding(0.1, energy_j=8.0))
    (row,) = rows(replace(one, configuration=replace(one.configuration, batch=4)))
    assert row.prefill_tok_s == 4 * 64 / 0.5
    assert row.decode_tok_s == pytest.approx(4 * 10 / 0.1)
    assert row.energy_j_per_token == 0.2
    (single,) = rows(one)
    assert row.kv_bytes == 4 * single.kv_bytes


def test_heat_and_drift(path: Path) -> None:
    hot = [sample(frequency_mhz=mhz, temperature_c=c) for mhz, c in ((2400.0, 55.0), (2300.0, 81.0), (2040.0, 79.0))]
    (row,) = rows(measured(path, "Q4_1", hot))
    assert row.frequency_drift == pytest.approx(-0.15) and row.temperature_c == 81.0
    assert row.warnings == [
        "the clock fell by 15% during the run at up to 81 °C; later repeats are slower. Cool the device, or pause before measuring"
    ]
    assert frequency_drift([sample(), sample(frequency_mhz=2000.0)]) is None
    slowing = [sample(decode_s=seconds) for seconds in (0.100, 0.101, 0.102, 0.110, 0.112)]
    (row,) = rows(measured(path, "Q4_1", slowing))
    assert (
        row.warnings == ["decoding slowed down by 9% from the first half of the repeats to the second; the device may be getting hot"]
        and row.frequency_drift is None
    )
    assert say.slowed_down([10.0, 9.0, 10.1, 9.1]) is None and say.slowed_down([10.0, 8.0, 7.0]) is None


def test_disturbed_rounds_and_busy_machines(path: Path) -> None:
    busy = replace(RUN, before=0.9, waited_s=12.0)
    (row,) = rows(measured(path, "Q4_1", decoding(0.1, other_cores=0.5)), run=busy)
    assert row.warnings == [
        "other processes used 0.90 of a core before the run after 12 s of waiting; end them, or wait for them with --wait",
        "other processes used up to 0.50 of a core in 5 of 5 repeats; timings may be too slow",
    ]
    assert say.is_disturbed(0.5, 1.0) and not say.is_disturbed(0.5, 0.05), "one tick of the clock in a short repeat is no neighbour"
    assert not say.is_disturbed(None, 1.0) and not say.is_disturbed(0.04, 100.0)


def test_more_threads_than_cores_and_unsteady_repeats(path: Path) -> None:
    (row,) = rows(measured(path, "Q4_1", decoding(0.1, threads=8)))
    assert row.warnings == ["8 threads on 2 usable cores wait for each other; give --threads 2 or fewer"]
    assert say.too_many_threads(8, 2, "cuda:0") is None
    unsteady = [sample(decode_s=seconds) for seconds in (0.1, 0.2, 0.1, 0.2, 0.1)]
    (row,) = rows(measured(path, "Q4_1", unsteady))
    assert row.warnings == [
        "decoding differs between repeats: their middle half spans 50% of the median; repeat more often, on a quiet machine"
    ]


def test_without_an_interval_a_ratio_has_to_be_clear() -> None:
    assert say.is_slower(Ratio(ratio=0.9, low=None, high=None)) and not say.is_slower(Ratio(ratio=0.98, low=None, high=None))
    assert not say.is_slower(Ratio(ratio=0.9, low=0.8, high=1.01)) and not say.is_slower(None)
    text = say.slower_though_smaller(
        "decode_tok_s", Ratio(ratio=0.9, low=None, high=None), other="b", n_bytes=1000, other_bytes=2000, reason=None
    )
    assert text == "decodes 10% slower than b (ratio 0.90), though smaller (1.0 kB against 2.0 kB)"
