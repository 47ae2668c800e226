"""The choice between merging and keeping, and what it says."""

from __future__ import annotations

from edgeq.adapter_plan import AdapterPlan, Way, choose


def keep(noise: float, slowdown: float, *, fits: bool = True) -> Way:
    return Way(quant="Q4_0", noise=noise, bytes=110, adapter_bytes=10_000, rank=8, slowdown=slowdown, fits=fits)


def merge(noise: float) -> Way:
    return Way(quant="Q4_0", noise=noise, bytes=100)


def test_noise_is_weighed_against_speed() -> None:
    cost = "keeping makes tokens 20% slower and takes 10.0 kB"
    assert choose(merge(0.5), keep(0.5, 0.2)) == ("merge", f"a merge rounds no worse than the base is rounded anyway, {cost}")
    assert choose(merge(0.54), keep(0.5, 0.01))[0] == "merge", "so little noise is accepted whatever keeping costs"
    assert choose(merge(0.1), keep(0.0, 0.2)) == ("merge", f"a merge would add rounding noise of 0.1 times the change, but {cost}")
    assert choose(merge(0.3), keep(0.0, 0.2)) == ("keep", f"a merge would add rounding noise of 0.3 times the change; {cost}")


def test_what_does_not_fit_is_not_kept() -> None:
    way, reason = choose(merge(3.0), keep(0.0, 0.1, fits=False))
    assert way == "merge"
    assert reason.endswith("but with the adapter beside it the model does not fit the device's memory")


def test_what_is_not_possible_is_not_chosen() -> None:
    assert choose(merge(3.0), Way(reason="full rank")) == ("merge", "it cannot be kept (full rank)")
    assert choose(Way(reason="codes"), keep(0.0, 9.0)) == ("keep", "it cannot be merged (codes)")


def test_both_sides_are_in_the_json() -> None:
    plan = AdapterPlan(
        name="sql", kind="LORA", scale=0.5, disposition="merge", reason="as asked for", merge=merge(0.1), keep=Way(reason="no")
    )
    document = plan.to_json()
    assert document["keep"]["possible"] is False
    assert (document["keep"]["reason"], document["keep"]["noise"]) == ("no", None)
    assert (document["merge"]["possible"], document["merge"]["noise"], document["merge"]["bytes"]) == (True, 0.1, 100)
