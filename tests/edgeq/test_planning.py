import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_shapes import layouts, shape_spec

from edgeq import planning
from edgeq.device_memory import estimate_memory
from edgeq.errors import PlanError, UnsupportedError
from edgeq.footprint import CUDA_BYTES, MIB, kv_bytes, process_bytes
from edgeq.planning import check_ram, export_bytes, make_plan, side_bytes, sorting_bytes
from edgeq.profiles import DeviceProfile, load_profile, profile_names


def profile_with(name: str, *, budget_mib: int | None = None, ram_mib: int | None = None, **export: object) -> DeviceProfile:
    profile = load_profile(name)
    memory = replace(profile.memory, budget_mib=budget_mib or profile.memory.budget_mib, ram_mib=ram_mib or profile.memory.ram_mib)
    return replace(profile, memory=memory, export=replace(profile.export, **export))


def plan_for(profile: DeviceProfile | str, shape: str, source: str, quant: str = "auto", **options: object):
    profile = load_profile(profile) if isinstance(profile, str) else profile
    spec = shape_spec(shape)
    return make_plan(profile, quant, layouts(spec, source=source), spec, **options)


# What auto chooses.


@pytest.mark.parametrize(
    ("profile", "shape", "source", "expected"),
    [
        # A float source takes the best that fits.
        ("desktop-3060", "smollm2-135m", "F16", "Q8_0"),
        ("desktop-3060", "llama-8b", "BF16", "Q8_0"),
        ("laptop-cpu", "llama-8b", "BF16", "Q4_K_M"),
        ("phone-8gb", "llama-8b", "BF16", "Q2_K"),
        ("server-h100", "llama-8b", "BF16", "BF16"),
        # BF16 in the list means the source's own 16-bit format.
        ("server-h100", "llama-8b", "F16", "F16"),
        # Rows of 576 do not divide into blocks of 256: Q4_K_M would be written as Q5_0, which x86 does not speed up.
        ("laptop-cpu", "smollm2-135m", "F16", "Q4_0"),
        # A 4-bit source is not inflated, and its own format is a copy.
        ("desktop-3060", "llama-8b", "Q4_0", "Q4_0"),
        ("desktop-3060", "smollm2-135m", "Q4_1", "Q4_1"),
        ("macbook-m3", "smollm2-135m", "Q4_0", "Q4_0"),
        # On CPUs the profile's fast formats go before the source's own.
        ("laptop-cpu", "smollm2-135m", "Q4_1", "Q4_0"),
        ("laptop-cpu", "llama-8b", "Q4_1", "Q4_K_M"),
        ("raspberry-pi-5", "smollm2-135m", "Q4_1", "Q4_0"),
        # The source's own format takes the place of what was struck off, before anything smaller.
        ("desktop-3060", "llama-8b", "IQ4_XS", "IQ4_XS"),
        ("desktop-3060", "llama-8b", "Q3_K", "Q3_K_M"),
        ("server-h100", "llama-8b", "Q4_1", "Q4_1"),
        # A format of the same base as the source's stays what the profile calls it.
        ("server-h100", "llama-8b", "Q4_K", "Q4_K_M"),
    ],
)
def test_auto(profile, shape, source, expected):
    assert plan_for(profile, shape, source).quant == expected


def test_a_copy_is_better_than_a_smaller_listed_format():
    profile = profile_with("desktop-3060", grids=("Q8_0", "Q3_K_M"))
    plan = plan_for(profile, "llama-8b", "Q4_0")
    assert plan.quant == "Q4_0" and {t.action for t in plan.tensors} == {"copy"} and not plan.needs_importance
    assert plan.notes == ("not considered, because more bits per weight than the source's 4.50 cannot improve it: Q8_0 (8.50)",)


def test_the_sources_own_format_is_passed_over_on_a_cpu_that_is_slow_with_it():
    notes = plan_for(profile_with("laptop-cpu", grids=("Q8_0", "Q4_0")), "smollm2-135m", "Q4_1").notes
    assert "Q4_1 is passed over, because llama.cpp has no fast path for it on this CPU (the source's own format)" in notes


def test_a_listed_format_without_a_fast_path_is_the_users_choice():
    profile = profile_with("laptop-cpu", grids=("Q8_0", "Q4_0"))
    assert plan_for(profile, "llama-1b", "F16").quant == "Q8_0"


def test_a_listed_format_that_loses_its_speed_is_passed_over():
    profile = profile_with("laptop-cpu", grids=("Q4_K_M", "Q4_0"))
    plan = plan_for(profile, "smollm2-135m", "F16")
    why = "this model's rows would make it Q5_0, Q4_K"
    assert plan.quant == "Q4_0"
    assert plan.notes == (f"Q4_K_M is passed over, because llama.cpp has no fast path for it on this CPU ({why})",)


def test_a_format_that_was_passed_over_is_used_when_nothing_else_fits():
    grids = ("Q8_0", "Q4_0")
    fast = plan_for(profile_with("laptop-cpu", grids=grids), "llama-1b", "IQ4_XS")
    assert fast.quant == "Q4_0" and any(note.startswith("IQ4_XS is passed over") for note in fast.notes)
    small = profile_with("laptop-cpu", grids=grids, budget_mib=fast.memory.total_bytes // MIB)
    plan = plan_for(small, "llama-1b", "IQ4_XS")
    assert plan.quant == "IQ4_XS" and not any("passed over" in note for note in plan.notes)


def test_a_source_smaller_than_everything_listed():
    profile = profile_with("desktop-3060", grids=("Q8_0", "Q6_K"))
    plan = plan_for(profile, "llama-8b", "IQ2_XXS")
    assert plan.quant == "Q6_K"
    assert "the source's own IQ2_XXS cannot be written" in plan.notes
    assert "Q6_K is the smallest in the list and is used although it has more bits than the source" in plan.notes


# What does not fit.


def test_nothing_fits():
    with pytest.raises(PlanError) as error:
        plan_for(profile_with("laptop-cpu", budget_mib=1500), "llama-8b", "F16")
    message = str(error.value)
    assert re.match(
        r"laptop-cpu: no format fits, not even the smallest, Q2_K: it needs [\d,]+ MiB \([\d,]+ bytes: weights ",
        message,
    )
    assert "cache 512 MiB at 4,096 tokens" in message and "the budget is 1,500 MiB (1,572,864,000 bytes)" in message
    assert message.endswith("No context is short enough; or use a profile with more memory, or a smaller model.")


def test_nothing_fits_but_a_shorter_context_would():
    profile = profile_with("laptop-cpu", budget_mib=3100)
    with pytest.raises(PlanError, match=r"With a context of ([\d,]+) tokens it fits; or use") as error:
        plan_for(profile, "llama-8b", "F16")
    found = re.search(r"With a context of ([\d,]+) tokens", str(error.value))
    assert found
    fitting = int(found.group(1).replace(",", ""))
    assert plan_for(profile, "llama-8b", "F16", n_ctx=fitting).quant == "Q2_K"
    with pytest.raises(PlanError):
        plan_for(profile, "llama-8b", "F16", n_ctx=fitting + 256)


def test_an_explicit_quant_must_fit_too():
    with pytest.raises(
        PlanError, match=r"^Q8_0 does not fit laptop-cpu: it needs .*\. --quant Q4_K_M fits\. With a context of [\d,]+ tokens it fits; or"
    ):
        plan_for(profile_with("laptop-cpu", budget_mib=8500), "llama-8b", "BF16", "Q8_0")
    with pytest.raises(
        PlanError, match=r"^F16 does not fit phone-8gb: .* No format in the profile's list fits either\. No context is short enough;"
    ):
        plan_for(profile_with("phone-8gb", budget_mib=1000), "llama-8b", "F16", "F16")


def test_an_explicit_quant_is_not_second_guessed():
    plan = plan_for("laptop-cpu", "smollm2-135m", "Q4_0", "F16")
    assert plan.quant == "F16" and not plan.needs_importance
    with pytest.raises(UnsupportedError, match="unknown quantization 'Q9_9'"):
        plan_for("laptop-cpu", "smollm2-135m", "Q4_0", "Q9_9")


def test_what_stays_in_ram_must_fit_the_ram():
    profile = profile_with("desktop-3060", ram_mib=512)
    with pytest.raises(
        PlanError,
        match=r"Q8_0 does not fit desktop-3060: [\d,]+ MiB \([\d,]+ bytes\) stay in RAM beside the accelerator, memory\.ram_mib is 512\.",
    ):
        plan_for(profile, "llama-8b", "F16", "Q8_0")


def test_a_context_must_be_positive():
    with pytest.raises(PlanError, match=r"a context of 0 tokens cannot be planned\. Use at least 1\."):
        plan_for("laptop-cpu", "tiny", "F16", n_ctx=0)


@settings(max_examples=30, deadline=None)
@given(
    budgets=st.tuples(st.integers(64, 20000), st.integers(64, 20000)),
    profile=st.sampled_from(profile_names()),
    shape=st.sampled_from(["smollm2-135m", "llama-1b", "qwen3-0.6b", "llama-8b"]),
    source=st.sampled_from(["F32", "BF16", "Q8_0", "Q6_K", "Q4_1", "Q4_0", "Q2_K"]),
)
def test_a_plan_fits_or_is_refused_and_more_memory_never_means_fewer_bits(budgets, profile, shape, source):
    low, high = sorted(budgets)
    plans = []
    for budget in (low, high):
        try:
            plans.append(plan_for(profile_with(profile, budget_mib=budget), shape, source))
        except PlanError:
            plans.append(None)
    for budget, plan in zip((low, high), plans, strict=True):
        if plan is not None:
            assert plan.memory.total_bytes <= plan.budget_bytes == budget * MIB
    if plans[0] is not None:
        assert plans[1] is not None
        assert plans[1].bits_per_weight >= plans[0].bits_per_weight


# What a plan says.


def test_plan_adds_up():
    plan = plan_for("laptop-cpu", "llama-8b", "F16")
    spec = shape_spec("llama-8b")
    assert plan.memory.model_bytes == sum(t.nbytes for t in plan.tensors) < plan.file_bytes
    assert plan.memory.kv_bytes == kv_bytes(spec, 4096, "f16") and plan.memory.runtime_bytes == process_bytes(spec)
    m = plan.memory
    assert m.total_bytes == m.model_bytes + m.kv_bytes + m.compute_bytes + m.runtime_bytes and m.host_bytes == 0
    rows = plan.summary()
    assert sum(r.count for r in rows) == len(plan.tensors) and sum(r.nbytes for r in rows) == m.model_bytes
    assert sum(r.share for r in rows) == pytest.approx(1)
    assert [(r.role, r.source_grid, r.grid, r.count) for r in rows if r.role in ("embed", "wq", "attn_norm")] == [
        ("embed", "F16", "Q4_K", 1),
        ("attn_norm", "F32", "F32", 32),
        ("wq", "F16", "Q4_K", 32),
    ]
    assert plan.bits_per_weight == pytest.approx(4.5, abs=0.01) and plan.needs_importance
    # embeddings are looked up, not read; the rest once per token
    read = m.model_bytes - next(t.nbytes for t in plan.tensors if t.role == "embed")
    assert plan.decode_bound_tok_s == pytest.approx(89.6e9 / read)
    assert plan.with_notes("one", "two").notes == (*plan.notes, "one", "two")


def test_plan_as_json():
    plan = plan_for("laptop-cpu", "tiny", "F16")
    document = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert document["quant"] == plan.quant and document["memory"]["total_bytes"] == plan.memory.total_bytes
    assert document["tensors"][0] == {
        "name": "token_embd.weight",
        "role": "embed",
        "layer": None,
        "shape": [320, 64],
        "source_grid": "F16",
        "grid": plan.tensors[0].grid.name,
        "bytes": plan.tensors[0].nbytes,
        "action": "encode",
    }


def test_context_is_cut_to_the_models():
    spec = shape_spec("llama-1b", n_ctx=2048)
    plan = make_plan(load_profile("laptop-cpu"), "auto", layouts(spec, source="F16"), spec)
    assert plan.memory.n_ctx == 2048
    assert "context: 4,096 tokens wanted, planned for the 2,048 that the model was trained for" in plan.notes
    short = make_plan(load_profile("laptop-cpu"), "auto", layouts(spec, source="F16"), spec, n_ctx=300)
    assert short.memory.n_ctx == 300 and short.notes == ()


def test_cache_type_gives_way_to_the_model_and_the_device():
    assert plan_for("phone-8gb", "llama-1b", "F16").memory.kv_type == "q8_0"
    plan = plan_for("phone-8gb", "tiny", "F16")
    assert plan.memory.kv_type == "f16"
    assert "cache: f16 in place of q8_0, because heads of 24 do not divide into blocks of 32" in plan.notes
    spec = shape_spec("llama-1b")
    odd = replace(spec, blocks=tuple(replace(b, head_dim=160) if hasattr(b, "head_dim") else b for b in spec.blocks))
    plan = make_plan(load_profile("jetson-orin-nano"), "auto", layouts(odd, source="F16"), odd)
    assert plan.memory.kv_type == "f16" and not plan.memory.flash_attention
    assert "cache: f16 in place of q8_0, because llama.cpp has no flash attention for heads of 160 on cuda" in plan.notes


def test_a_model_too_large_for_the_targets_gets_a_note():
    plan = plan_for("raspberry-pi-5", "llama-8b", "F16")
    assert any(
        re.fullmatch(r"speed: memory bandwidth allows at most 4\.\d+ tokens/s, raspberry-pi-5 aims at 12 \(for 1B .*\)", n)
        for n in plan.notes
    )
    assert not any(n.startswith("speed") for n in plan_for("raspberry-pi-5", "llama-1b", "F16").notes)


def test_memory_beside_a_discrete_accelerator():
    profile, spec = load_profile("desktop-3060"), shape_spec("llama-8b")
    tensors = layouts(spec, source="F16")("Q4_K_M").tensors
    embed, total = tensors[0].nbytes, sum(t.nbytes for t in tensors)
    m = estimate_memory(profile, spec, tensors, n_ctx=8192, kv_type="f16")
    assert (m.model_bytes, m.runtime_bytes, m.kv_bytes) == (total - embed, CUDA_BYTES, 1024 * MIB)
    assert m.host_bytes == embed + process_bytes(spec)
    tied = replace(spec, tied=True)
    tied_tensors = layouts(tied, source="F16")("Q4_K_M").tensors
    m = estimate_memory(profile, tied, tied_tensors, n_ctx=8192, kv_type="f16")
    assert m.model_bytes == sum(t.nbytes for t in tied_tensors) and m.host_bytes == embed + process_bytes(spec)


def test_memory_with_some_layers_on_the_accelerator():
    """llama.cpp takes the last layers, the head first."""
    profile, spec = load_profile("desktop-3060"), shape_spec("llama-8b")
    tensors = layouts(spec, source="F16")("Q4_K_M").tensors
    whole = estimate_memory(profile, spec, tensors, n_ctx=4096, kv_type="f16")
    head_only, nine = (
        estimate_memory(replace(profile, runtime=replace(profile.runtime, gpu_layers=n)), spec, tensors, n_ctx=4096, kv_type="f16")
        for n in (1, 9)
    )
    layer = sum(t.nbytes for t in tensors if t.layer == 31)
    outside = sum(t.nbytes for t in tensors if t.role in ("final_norm", "head"))
    assert (head_only.model_bytes, head_only.kv_bytes) == (outside, 0)
    assert (nine.model_bytes, nine.kv_bytes) == (outside + 8 * layer, whole.kv_bytes // 4)
    moved = whole.host_bytes + 24 * layer + whole.kv_bytes * 3 // 4 + whole.compute_bytes
    assert nine.host_bytes == moved
    more = estimate_memory(replace(profile, runtime=replace(profile.runtime, gpu_layers=99)), spec, tensors, n_ctx=4096, kv_type="f16")
    assert more == whole


def test_bound_of_a_split_model_lies_between():
    spec = shape_spec("llama-8b")
    profile = profile_with("desktop-3060", ram_mib=65536)
    lay_out = layouts(spec, source="F16")
    bounds = [
        make_plan(replace(profile, runtime=replace(profile.runtime, gpu_layers=n)), "Q4_K_M", lay_out, spec).decode_bound_tok_s
        for n in (None, 17, 1)
    ]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] > 3 * bounds[2]


def test_rearranged_weights_are_resident_twice():
    """SmolLM2-135M in Q4_0 at 512 tokens: llama.cpp reports 56.95 MiB rearranged, and 233 MiB were resident (measured on AVX-512)."""
    spec = shape_spec("smollm2-135m")
    tensors = layouts(spec, source="F16")("Q4_0").tensors
    # the demo's embedding is Q8_0
    embed = layouts(spec, source="F16")("Q8_0").tensors[0]
    m = estimate_memory(load_profile("laptop-cpu"), spec, (embed, *tensors[1:]), n_ctx=512, kv_type="f16")
    assert m.reclaimable_bytes / MIB == pytest.approx(56.95, abs=0.01)
    assert (m.total_bytes + m.reclaimable_bytes) / MIB == pytest.approx(233, rel=0.02)
    metal = estimate_memory(load_profile("macbook-m3"), spec, tensors, n_ctx=512, kv_type="f16")
    jetson = estimate_memory(load_profile("jetson-orin-nano"), spec, tensors, n_ctx=512, kv_type="f16")
    assert metal.reclaimable_bytes == 0 and jetson.reclaimable_bytes == jetson.model_bytes == metal.model_bytes
    assert jetson.runtime_bytes - metal.runtime_bytes == CUDA_BYTES


# The exporting machine.


def test_check_ram(monkeypatch):
    monkeypatch.setattr(planning, "available_ram", lambda: 100 * MIB)
    check_ram(100 * MIB)
    with pytest.raises(
        PlanError, match=r"the export needs about 101 MiB of memory, but only 100 MiB are available on this machine\. Close other"
    ):
        check_ram(101 * MIB)


def test_export_memory_is_a_layer_not_the_model():
    spec = shape_spec("llama-8b")
    assert export_bytes(shape_spec("smollm2-135m"), 8192) / MIB == pytest.approx(825, rel=0.02)  # measured, gate included
    weights = 2 * sum(t.n_values for t in layouts(spec, source="BF16")("BF16").tensors)
    assert export_bytes(spec, 8192) < weights / 4
    assert export_bytes(spec, 8192) > 4 * 3 * 4096 * 14336 + 2 * 4 * 4096 * 8192
    assert export_bytes(shape_spec("llama-1b"), 8192) < 4 << 30
    assert export_bytes(spec, 16384) > export_bytes(spec, 8192)


def test_sorting_takes_states_of_all_layers_and_one_layer_not_the_model():
    spec = shape_spec("llama-1b")
    states, layer = 4 * spec.n_embd * spec.n_layers, 4 * 3 * spec.n_embd * spec.mlps[0].n_ff
    assert sorting_bytes(spec, 16384) - sorting_bytes(spec, 8192) >= 8192 * states
    assert layer < sorting_bytes(spec, 8704) < 4 << 30
    assert sorting_bytes(shape_spec("smollm2-135m"), 8704) / MIB == pytest.approx(1373, rel=0.02)  # measured, gate included


def test_side_files_grow_with_the_channels_of_an_elastic_package():
    spec = shape_spec("smollm2-135m")
    assert side_bytes(spec, elastic=False) == 2 << 20
    assert side_bytes(spec, elastic=True) - (2 << 20) >= 30 * 1536 * (2 * 64 + 8)
