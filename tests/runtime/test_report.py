"""Reports: the conclusions against cases worked out by hand, and the page against the results files it was made from."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from made_results import bench_row, digest, quality_rows, results, write

from edgeq.errors import MissingDependency, OutputError, SourceError, UsageError
from edgeq.report_api import limits_of, report
from edgeq.runtime.report.advice import Limits, frontier, judge, recommend, slow_variants, slower
from edgeq.runtime.report.document import to_json
from edgeq.runtime.report.figures import memory_parts, pictures
from edgeq.runtime.report.html import to_html
from edgeq.runtime.report.kernels import main_grid, reason
from edgeq.runtime.report.markdown import to_markdown
from edgeq.runtime.report.read import read_results

LIMITS = Limits(origin="a test", memory_bytes=250_000_000, ttft_ms=4000, decode_tok_s=20)


def variants_of(tmp_path, *rows, quality=()):
    return read_results([write(tmp_path / "b.json", "bench", rows), write(tmp_path / "q.json", "quality", quality)])[0]


@pytest.fixture
def seven(tmp_path):
    return read_results(results(tmp_path))[0]


# Reading


def test_rows_are_joined_by_hash_and_adapter(seven):
    assert [v.label for v in seven] == ["Q8_0", "Q4_1", "Q4_0", "Q4_0 cut 15 %", "Q4_0 cut 25 %", "Q2_K", "Q4_0 + sql", "F16"]
    assert [v.number for v in seven] == list(range(1, 9))
    by_label = {v.label: v for v in seven}
    assert by_label["Q4_0 cut 15 %"].quality["perplexity book.txt"].value == 24.0
    assert by_label["Q4_0 + sql"].quality == {}  # measured for the model without it
    assert by_label["F16"].setup is None
    assert by_label["F16"].quality["perplexity book.txt"].value == 17.0


def test_what_is_missing_is_unknown(tmp_path):
    (v,) = variants_of(tmp_path, {"artifact": "a.gguf"})
    assert (v.label, v.rate, v.size_bytes, v.memory_bytes, v.setup.threads, v.itl_ms) == ("a.gguf", None, None, None, None, ())
    assert all(value is None for value in v.figures.values())


def test_the_bare_list_of_bench_rows_is_read_and_old_fields_found(tmp_path):
    row = bench_row()
    for name in ("prompt_tokens", "threads", "artifact_sha256", "quant", "name", "intervals", "warnings"):
        del row[name]
    row["environment"] |= {"threads": 3, "prompt_tokens": 77, "contention": {"warning": "busy"}}
    path = tmp_path / "r.json"
    path.write_text(json.dumps([row]))
    ((v,), (source,)) = read_results([path])
    assert (v.setup.threads, v.setup.prompt_tokens, v.sha256, v.warnings) == (3, 77, digest("Q4_0", 0.0), ("busy",))
    assert (source.name, source.kind, source.rows) == ("r.json", "bench", 1)


def test_quality_gives_the_quant_where_the_bench_has_none(tmp_path):
    (v,) = variants_of(tmp_path, bench_row("Q4_0") | {"quant": None}, quality=quality_rows("Q4_0", kl_mean=0.1))
    assert v.quant == "Q4_0"


def test_labels_differ_where_setups_do(tmp_path):
    rows = [bench_row(threads=threads, prompt_tokens=n) for threads in (1, 2) for n in (128, 512)]
    labels = [v.label for v in variants_of(tmp_path, *rows)]
    assert labels[0] == "Q4_0, 128 prompt tokens, 1 threads"
    assert len(set(labels)) == 4


def test_ratios_to_a_base_are_shown(tmp_path):
    against = {"decode_tok_s": {"ratio": 1.25, "low": 1.2, "high": 1.3}}
    made = report([write(tmp_path / "b.json", "bench", [bench_row(), bench_row("Q4_1", against=against)])])
    table = to_json(made)["tables"][0]
    cells = [row["cells"][table["columns"].index("decode, of base")] for row in table["rows"]]
    assert cells == [None, {"value": 1.25, "shown": "1.250", "low": 1.2, "high": 1.3, "span": "1.200 to 1.300"}]


def test_on_a_gpu_memory_is_the_gpus(tmp_path):
    (v,) = variants_of(tmp_path, bench_row(device="cuda:0", vram_bytes=300_000_000))
    assert v.memory_bytes == 300_000_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("\udcff", "is not valid JSON"),
        ('{"a": 1}', r"r\.json is no results file\. Give one that `edgeq bench -o` or `edgeq eval -o` wrote"),
        ("3", "is no results file"),
        ('{"edgeq_results": 9}', r"results of version 9, this edgeq reads version 2\. Measure again, or update"),
        ('{"edgeq_results": 2, "kind": "x", "rows": []}', "results of kind 'x'; expected bench or quality"),
        ('{"edgeq_results": 2, "kind": "bench", "rows": [3]}', '"rows" is no list of objects. The file is damaged'),
        ('{"edgeq_results": 2, "kind": "bench", "rows": []}', r"r\.json: no rows\. Measure something with `edgeq bench -o`"),
        ('[{"artifact": "a", "decode_tok_s": "fast"}]', r"r\.json, row 1: decode_tok_s is 'fast'; expected a number or null"),
        ('[{"artifact": "a", "decode_tok_s": NaN}]', "decode_tok_s is nan; expected a number"),
        ('[{"artifact": "a", "itl_ms": 3}]', "row 1: itl_ms is 3; expected an object or null"),
        ('[{"artifact": "a", "itl_ms": {"p50": true}}]', "row 1, itl_ms: p50 is True; expected a number"),
        ('[{"artifact": "a", "samples": {"repeats": [1]}}]', "row 1, samples: repeats is no list of objects"),
        ('[{"artifact": "a", "intervals": {"ttft_ms": 1}}]', "row 1, intervals: ttft_ms is 1; expected a list of numbers or null"),
        ('[{"artifact": "a", "quant": 4}]', "row 1: quant is 4; expected a text or null"),
        ("[{}]", r"row 1: artifact is missing\. The file is damaged; measure again"),
        ('{"edgeq_results": 2, "kind": "quality", "rows": [{"artifact_sha256": "a"}]}', "row 1: value is missing"),
    ],
)
def test_files_that_are_none(tmp_path, content, message):
    path = tmp_path / "r.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(SourceError, match=message):
        read_results([path])
    with pytest.raises(SourceError, match=r"no\.json: cannot be read \(No such file"):
        read_results([tmp_path / "no.json"])


# Advice


def test_verdicts(tmp_path):
    good, bad, unknown = variants_of(
        tmp_path, bench_row(), bench_row("Q8_0", decode=5, prefill=50, rss_mb=400), bench_row("F16", rss_mb=None)
    )
    assert judge(good, LIMITS).qualifies
    assert judge(bad, LIMITS).misses == (
        "memory 400.0 MB, at most 250.0 MB",
        "time to first token 10,241 ms, at most 4,000 ms",
        "decode speed 5.0 tok/s, at least 20.0 tok/s",
    )
    assert judge(unknown, LIMITS).unknown == ("memory",)
    assert judge(bad, None).qualifies
    exact = Limits(origin="", memory_bytes=200_000_000, decode_tok_s=40.0)
    assert judge(good, exact).qualifies  # at a limit is within it


def test_the_fastest_of_those_that_lose_little(seven):
    plain, sql = recommend(seven, LIMITS)
    assert (plain.adapter, plain.variant) == (None, 3)
    assert plain.reasons == (
        "5 of 6 variants keep within the limits of a test.",
        "It loses little: mean KL 0.052, the best being 0.041 (Q4_1).",
        "Of the 2 that lose little it decodes fastest: 41.0 tok/s.",
    )
    assert (sql.adapter, sql.variant) == ("sql", 7)
    assert any("Their quality was not measured" in reason for reason in sql.reasons)


def test_a_faster_variant_that_loses_much_is_not_named(tmp_path):
    rows = [bench_row("Q8_0", decode=20, model_mb=150), bench_row("Q2_K", decode=90, model_mb=60)]
    good = variants_of(tmp_path, *rows, quality=[*quality_rows("Q8_0", kl_mean=0.01), *quality_rows("Q2_K", kl_mean=0.9)])
    assert recommend(good)[0].variant == 1
    alike = variants_of(tmp_path, *rows, quality=[*quality_rows("Q8_0", kl_mean=0.01), *quality_rows("Q2_K", kl_mean=0.05)])
    assert recommend(alike)[0].variant == 2


def test_of_equally_fast_ones_the_smallest(tmp_path):
    rows = [bench_row("Q4_K_M", decode=40.1, rss_mb=230), bench_row("Q4_0", decode=40, rss_mb=200)]
    quality = [*quality_rows("Q4_K_M", perplexity=10.0), *quality_rows("Q4_0", perplexity=10.2)]
    (found,) = recommend(variants_of(tmp_path, *rows, quality=quality))
    assert found.variant == 2
    assert found.reasons[-1] == "Of the 2 that lose little it takes least memory among those that decode as fast as Q4_K_M (40.0 tok/s)."


@pytest.mark.parametrize(("metric", "a", "b", "winner"), [("acc", 0.5, 0.3, 1), ("acc", 0.5, 0.49, 2), ("perplexity", 10.0, 10.6, 1)])
def test_directions_and_tolerances_of_metrics(tmp_path, metric, a, b, winner):
    """acc has a standard error of 1 % here: two of them are less than two points."""
    rows = [bench_row("Q8_0", decode=20), bench_row("Q4_0", decode=40)]
    quality = [*quality_rows("Q8_0", **{metric: a}), *quality_rows("Q4_0", **{metric: b})]
    assert recommend(variants_of(tmp_path, *rows, quality=quality))[0].variant == winner


def test_nothing_fits(tmp_path):
    (found,) = recommend(variants_of(tmp_path, bench_row("Q8_0", decode=5, rss_mb=900), bench_row(decode=10)), LIMITS)
    assert found.variant is None
    assert found.reasons == (
        "No variant keeps within the limits of a test.",
        "Q4_0 comes nearest and misses: decode speed 10.0 tok/s, at least 20.0 tok/s.",
    )


def test_without_quality_the_least_compressed_is_named(tmp_path):
    (found,) = recommend(variants_of(tmp_path, bench_row(), bench_row("Q8_0", decode=30, model_mb=140, rss_mb=None)), LIMITS)
    assert found.variant == 2
    assert found.reasons == (
        "All 2 variants keep within the limits of a test.",
        "Their quality was not measured, so Q8_0 is named as least compressed. Measure it with `edgeq eval -o`.",
        "Not measured, and so not checked: memory.",
    )


def test_only_the_usual_run_counts(tmp_path):
    """A prompt of 16 tokens and a batch of 8 are no measure of a conversation."""
    rows = [bench_row(decode=40), bench_row("Q8_0", decode=90, prompt_tokens=16), bench_row("Q8_0", decode=300, batch=8)]
    (found,) = recommend(variants_of(tmp_path, *rows))
    assert found.variant == 1


def test_slow_variants_are_flagged_with_reasons(seven):
    found = {(one.variant, one.text.split(" (")[0]): one.reason for one in slow_variants([v for v in seven if v.setup])}
    rearranged = "llama.cpp rearranges Q4_0 blocks for this CPU's vector instructions, and {} blocks it does not."
    assert found == {
        (2, "Q4_1 decodes 37 % slower than Q4_0"): rearranged.format("Q4_1"),
        (2, "Q4_1 computes prompts 52 % slower than Q4_0"): rearranged.format("Q4_1"),
        (6, "Q2_K computes prompts 48 % slower than Q4_0"): rearranged.format("Q2_K"),
    }


def test_a_deliberately_slow_variant_is_flagged_and_others_are_not(tmp_path):
    rows = [bench_row("Q8_0", decode=30, prefill=280, model_mb=145), bench_row("Q4_0", decode=20, prefill=300, model_mb=90)]
    (one,) = slow_variants(variants_of(tmp_path, *rows))
    assert one.variant == 2
    assert one.text == "Q4_0 decodes 33 % slower than Q8_0 (20.0 against 30.0 tok/s), though smaller: 90.0 MB against 145.0 MB."
    assert one.reason is None
    (one,) = slow_variants(variants_of(tmp_path, rows[0], rows[1] | {"warnings": ["busy"]}))
    assert one.reason == "The bench warned of this measurement: look there first."
    assert slow_variants(variants_of(tmp_path, rows[0], rows[1] | {"threads": 1})) == ()  # not run alike
    assert slow_variants(variants_of(tmp_path, rows[0], rows[1] | {"adapter": "sql"})) == ()
    larger_and_slower = [bench_row("Q8_0", decode=24, model_mb=145), bench_row("Q4_0", decode=40, model_mb=90)]
    assert slow_variants(variants_of(tmp_path, *larger_and_slower)) == ()
    cut = [bench_row(decode=40), bench_row(decode=35, rate=0.2, model_mb=70)]
    assert [one.variant for one in slow_variants(variants_of(tmp_path, *cut))] == [2]


def test_what_the_bench_says_of_slow_variants_is_said_once(tmp_path):
    said = "decodes 33% slower than Q8_0 (ratio 0.67), though smaller (90.0 MB against 145.0 MB)"
    rows = [bench_row("Q8_0", decode=30, prefill=280, model_mb=145), bench_row(decode=20, prefill=300, warnings=[said, "busy"])]
    content = to_json(report([write(tmp_path / "b.json", "bench", rows)]))
    assert [(one["kind"], one["text"][:12]) for one in content["warnings"]] == [("slow", "Q4_0 decodes"), ("bench", "busy")]


def test_the_bench_words_it_so():
    from edgeq.runtime.bench_stats import Ratio
    from edgeq.runtime.bench_warnings import slower_though_smaller

    ratio = Ratio(ratio=0.5, low=None, high=None)
    said = slower_though_smaller("decode_tok_s", ratio, other="a", n_bytes=1, other_bytes=2, reason=None)
    assert "though smaller (" in said  # by which the report knows it


def test_bytes_explain_some_slowness(tmp_path):
    """A tenth more bytes to read may cost a tenth of the decode speed, and none of the prefill's."""
    rows = [bench_row("Q4_0", decode=40, model_mb=90), bench_row("Q4_1", decode=36, model_mb=99)]
    assert slow_variants(variants_of(tmp_path, *rows)) == ()
    rows[1] |= {"prefill_tok_s": 150.0, "intervals": {}}
    assert [one.text.split(" by")[0][:25] for one in slow_variants(variants_of(tmp_path, *rows))] == ["Q4_1 computes prompts 50 "]


def test_slower_means_intervals_that_do_not_meet(tmp_path):
    span = {"decode_tok_s": [30.0, 45.0]}
    a, b, c = variants_of(
        tmp_path, bench_row(decode=40, intervals=span), bench_row("Q8_0", decode=50), bench_row("F16", decode=50, intervals={})
    )
    assert slower(a, b, "decode_tok_s")
    assert not slower(b, a, "decode_tok_s")
    assert slower(a, c, "decode_tok_s")  # one has no interval: by more than 3 %
    wide, _ = variants_of(tmp_path, bench_row(decode=40, intervals={"decode_tok_s": [30.0, 60.0]}), bench_row("Q8_0", decode=50))
    assert not slower(wide, b, "decode_tok_s")
    assert not slower(a, b, "ttft_ms_of_nothing")


def test_reasons_follow_the_instruction_set(tmp_path):
    def why(slow, fast, flags, **other):
        environment = {"cpu": {"flags": flags}}
        a, b = variants_of(tmp_path, bench_row(slow, environment=environment, **other), bench_row(fast, environment=environment, **other))
        return reason(a, b, "decode")

    assert why("Q6_K", "Q4_K_M", ["avx2"]) is not None
    assert why("Q2_K", "Q4_0", ["avx2"]) is not None
    assert why("Q2_K", "Q4_0", ["avx2", "avx512f"]) is None
    assert why("Q6_K", "Q4_0", ["dotprod"]) is None
    assert why("Q4_1", "Q4_0", ["neon"]) is None
    assert why("Q4_1", "Q4_0", ["avx2"], device="cuda:0") is None
    assert why("int4", "int8", ["avx2"], runtime="onnxruntime") is None
    assert [main_grid(name).name for name in ("Q4_K_M", "Q3_K_L", "Q4_0", "iq4_nl")] == ["Q4_K", "Q3_K", "Q4_0", "IQ4_NL"]
    assert main_grid("int4") is None and main_grid(None) is None


def test_frontier(seven, tmp_path):
    assert frontier([v for v in seven if v.setup]) == {1, 2, 3, 4, 5, 6, 7}  # each better in something, quality included
    rows = [bench_row(decode=40, rss_mb=200), bench_row("Q8_0", decode=30, rss_mb=300), bench_row("Q2_K", decode=20, rss_mb=100)]
    assert frontier(variants_of(tmp_path, *rows)) == {1, 3}
    same = [bench_row(decode=40, rss_mb=200), bench_row("Q8_0", decode=40, rss_mb=200)]
    assert frontier(variants_of(tmp_path, *same)) == {1, 2}


def test_limits_of_profiles_and_budgets():
    limits = limits_of("raspberry-pi-5", "250MB")
    assert limits is not None
    assert (limits.memory_bytes, limits.decode_tok_s) == (250_000_000, 12)
    assert "raspberry-pi-5 and the budget given" in limits.origin
    from edgeq.profiles import load_profile

    profile = load_profile("raspberry-pi-5")
    plain = limits_of(profile, None)
    assert plain is not None and plain.memory_bytes == profile.memory.budget_mib * 2**20
    assert limits_of(None, 1000) == Limits(origin="the budget given", memory_bytes=1000)
    assert limits_of(None, None) is None


# The page


class Page(HTMLParser):
    """Checks that tags nest, and collects tables, numbers, ids and addresses."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.tags: list[str] = []
        self.text: list[str] = []
        self._cell: list[str] | None = None
        self._value: str | None = None
        self._title = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        if "id" in given:
            self.ids.append(given["id"])
        self.addresses += [value for name, value in attrs if name in ("href", "src", "xlink:href", "action", "data", "srcset")]
        if tag in self.VOID:
            return
        self.open.append(tag)
        if tag == "section":
            self._title = given["aria-label"]
        if tag == "table":
            self.tables[self._title] = []
        if tag == "tr":
            self.tables[self._title].append([])
        if tag in ("td", "th"):
            self._cell, self._value = [], None
        if tag == "data":
            self._value = given["value"]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th") and self._cell is not None:
            self.tables[self._title][-1].append((" ".join("".join(self._cell).split()), self._value))
            self._cell = None

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)
        if self._cell is not None:
            self._cell.append(data)


@pytest.fixture
def page(tmp_path):
    report(results(tmp_path), output=tmp_path / "r.html", profile="raspberry-pi-5", budget="250MB")
    return Page((tmp_path / "r.html").read_text())


def test_the_numbers_of_the_page_are_those_of_the_results(page, tmp_path):
    bench = json.loads((tmp_path / "bench.json").read_text())["rows"]
    head, *rows = page.tables["Speed"]
    names = [name for name, _ in head]
    assert len(rows) == len(bench)
    for row, source in zip(rows, bench, strict=True):
        cells = dict(zip(names, row, strict=True))
        itl = {f"ITL {p} ms": value for p, value in source["itl_ms"].items()}
        expected = {"decode tok/s": source["decode_tok_s"], "prefill tok/s": source["prefill_tok_s"], "TTFT ms": source["ttft_ms"]} | itl
        for name, value in expected.items():
            shown, exact = cells[name]
            assert float(exact) == value
            digits = 2 if name.startswith("ITL") else 1
            assert shown.startswith(f"{value:,.{digits}f}")
        low, high = source["intervals"]["decode_tok_s"]
        assert cells["decode tok/s"][0].endswith(f"{low:,.1f} to {high:,.1f}")
        assert cells["energy J/token"] == ("-", None)  # unknown, and not 0
    head, *rows = page.tables["Memory"]
    for row, source in zip(rows, bench, strict=True):
        cells = dict(zip([name for name, _ in head], row, strict=True))
        for name, key in (("peak RSS MB", "peak_rss_bytes"), ("model MB", "model_bytes"), ("KV MB", "kv_bytes")):
            assert cells[name] == (f"{source[key] / 1e6:,.1f}", str(source[key]))
    quality = json.loads((tmp_path / "quality.json").read_text())["rows"]
    exact = {value for row in page.tables["Quality"][1:] for _, value in row[1:]}
    assert exact == {str(row["value"]) for row in quality}


def test_the_page_is_whole_offline_and_says_what_is_to_be_said(page):
    said = " ".join(page.text)
    assert "Use this without an adapter: Q4_0" in said
    assert "Use this with sql: Q4_0 + sql" in said
    assert "Q4_1 decodes 37 % slower than Q4_0" in said
    assert "other processes used 0.40 of a core" in said
    assert "A CPU" in said and "Inter-token latency" in said
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    assert all(address.startswith("#") for address in page.addresses)
    assert page.tags.count("svg") == 5
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses} <= set(page.ids)


def test_the_page_turns_dark_fits_a_phone_and_prints(tmp_path):
    text = to_html(report(results(tmp_path)))
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "@media print" in text and "@media (max-width: 480px)" in text
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w+)", text.split(start)[1].split("}")[0])) for start in (":root {", "dark) {"))
    assert light.keys() == dark.keys()
    assert all(light[name] != dark[name] for name in light)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert set(re.findall(r"url\(#([^)]+)\)", svg)) <= set(re.findall(r'\bid="([^"]+)"', svg))
        assert set(re.findall(r"var\(--([\w-]+)\)", svg)) <= light.keys()
        assert not re.findall(r"#[0-9a-f]{6}\b", svg)  # a colour of its own would not turn dark
        width = float(re.search(r'viewBox="0 0 ([\d.]+) ', svg)[1])
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
        assert min(sizes) * (375 - 2 * 12 - 2 * 17) / width >= 7  # on a phone, after the page's and the card's margins
        assert not re.search(r"<svg[^>]*\b(width|height)=", svg)
    for selector in (".scroll { overflow-x: auto", "minmax(min(100%, 420px), 1fr)"):
        assert selector in text


def test_contrast_of_text_is_at_least_4_5(tmp_path):
    """Of WCAG 2: text on cards, pages and tinted cards, light and dark."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    text = to_html(report(results(tmp_path)))
    for start in (":root {", "dark) {"):
        colours = dict(re.findall(r"--([\w-]+): (#\w+)", text.split(start)[1].split("}")[0]))
        for ink, page in [(ink, page) for ink in ("ink", "muted") for page in ("page", "card", "accent-soft", "bad-soft")] + [
            ("accent", "accent-soft"),
            ("bad", "bad-soft"),
            ("bad", "card"),
            ("accent", "card"),
        ]:
            high, low = sorted((luminance(colours[ink]), luminance(colours[page])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (start, ink, page)


HOSTILE = '<script>alert("1")</script>&amp; $x_1$ | ` \u202e {{ 7*7 }} --> ]]>'


def test_all_text_is_escaped(tmp_path):
    row = bench_row(HOSTILE, adapter=HOSTILE, warnings=[HOSTILE], artifact=HOSTILE, name=HOSTILE)
    row["environment"]["os"] = HOSTILE
    quality = [one | {"data": {"name": HOSTILE}, "reference": HOSTILE} for one in quality_rows(HOSTILE, kl_mean=0.1, adapter=HOSTILE)]
    made = report([write(tmp_path / "b.json", "bench", [row]), write(tmp_path / "q.json", "quality", quality)], title=HOSTILE)
    text = to_html(made)
    assert "<script" not in text
    page = Page(text)
    assert page.text.count(HOSTILE) >= 3
    assert "script" not in page.tags
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    markdown = to_markdown(made)
    assert "<script" not in markdown.replace("\\<", "")
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    json.loads(json.dumps(to_json(made)))


def test_svg_is_well_formed_and_names_its_points(seven, tmp_path):
    made = report(results(tmp_path))
    drawn = {one.name: one for one in pictures(made)}
    assert list(drawn) == ["speed", "quality", "quality-speed", "latency", "memory"]
    for one in drawn.values():
        root = ElementTree.fromstring(one.svg)
        assert root.get("role") == "img" and root.get("aria-label") == one.alt
    titles = re.findall(r"<title>(.*?)</title>", drawn["speed"].svg)
    assert sorted(titles) == [f"{v.number}. {v.label}" for v in made.variants if v.setup]
    for v in made.variants[:7]:
        assert f"{v.label}: {v.memory_bytes / 1e6:.4g}, {v.figures['decode_tok_s']:.4g}" in drawn["speed"].alt


def test_limits_are_drawn_in(tmp_path):
    files = results(tmp_path)
    near = {one.name: one.svg for one in pictures(report(files, budget="250MB"))}
    assert "at most 250" in near["speed"] and "at most 250" in near["memory"]
    far = {one.name: one.svg for one in pictures(report(files, budget="8GB"))}
    assert "limit at most 8,000 →" in far["speed"]
    without = {one.name: one.svg for one in pictures(report(files))}
    assert "at most" not in without["speed"]


def test_figures_of_little(tmp_path):
    made = report([write(tmp_path / "q.json", "quality", quality_rows("Q4_0", kl_mean=0.1))])
    assert pictures(made) == []
    assert "Quality" in Page(to_html(made)).tables
    made = report([write(tmp_path / "b.json", "bench", [{"artifact": "a.gguf"}])])
    assert pictures(made) == []
    Page(to_html(made))


def test_parts_of_memory_come_to_the_peak(seven):
    parts = dict(memory_parts(seven[0]))
    assert sum(parts.values()) == seven[0].memory_bytes
    assert parts["model"] == 145e6 and parts["rest of the process"] > 0


def test_the_same_input_gives_the_same_bytes(tmp_path):
    files = results(tmp_path)
    for name in ("r.html", "r.md", "r.json"):
        texts = []
        for folder in ("a", "b"):
            report(files, output=tmp_path / folder / name, profile="laptop-cpu")
            texts.append((tmp_path / folder / name).read_bytes())
        assert texts[0] == texts[1]
        assert not re.search(rb"20\d\d-\d\d-\d\d", texts[0])  # no clock


def test_markdown_and_json_say_the_same(tmp_path):
    files = results(tmp_path)
    made = report(files, output=[tmp_path / "r.md", tmp_path / "r.json"], profile="laptop-cpu")
    content = json.loads((tmp_path / "r.json").read_text())
    assert content == json.loads(json.dumps(to_json(made)))
    markdown = (tmp_path / "r.md").read_text().replace("\\", "")
    for one in content["recommendations"]:
        assert one["heading"] in markdown
        assert all(reason in markdown for reason in one["reasons"])
    for table in content["tables"]:
        for row in table["rows"]:
            assert f"| {row['variant']}. {row['label']} |" in markdown
            for cell in row["cells"]:
                assert (cell["shown"] if isinstance(cell, dict) else cell or "-") in markdown
    assert [v["qualifies"] for v in content["variants"]][-1] is None  # not timed
    assert content["variants"][0]["figures"]["decode_tok_s"] == 30


def test_outputs_that_cannot_be(tmp_path, monkeypatch):
    files = results(tmp_path)
    with pytest.raises(UsageError, match=r"r\.pdf: a report is a file that ends in \.html, \.md, \.json"):
        report(files, output=tmp_path / "r.pdf")
    with pytest.raises(OutputError, match="the output is the same file as an input"):
        report(files, output=files[0], force=True)
    (tmp_path / "r.md").write_text("mine")
    with pytest.raises(OutputError, match="exists and is kept"):
        report(files, output=[tmp_path / "r.json", tmp_path / "r.md"])
    assert not (tmp_path / "r.json").exists()
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match=r"matplotlib is not installed. Install it with: pip install 'edgeq\[report\]'"):
        report(files, output=tmp_path / "r.html")
    report(files, output=tmp_path / "new.md")  # which needs none


def test_environments_are_told_apart(tmp_path):
    other = bench_row("Q8_0")
    other["environment"] = other["environment"] | {"os": "Darwin", "gpus": [{"name": "A GPU", "memory_bytes": 1}]}
    made = report([write(tmp_path / "b.json", "bench", [bench_row(), bench_row("Q4_1"), other])])
    content = to_json(made)["environments"]
    assert [one["variants"] for one in content] == [[1, 2], [3]]
    assert content[1]["facts"]["gpus"] == "name A GPU, memory bytes 1"
    assert content[0]["facts"]["cpu governor"] == "unknown"


def test_command_line(run, tmp_path: Path):
    files = results(tmp_path)
    status, out, err = run("report", *files, "--profile", "raspberry-pi-5", "--budget", "250MB")
    assert (status, err) == (0, "")
    for shown in ("Use this without an adapter: Q4_0", "decode tok/s", "perplexity", "Warning: Q4_1 decodes", "Q4_0 cut 15 %"):
        assert shown in out
    status, out, _ = run("report", *files, "-o", tmp_path / "r.html", "-o", tmp_path / "r.md", "--title", "Mine")
    assert status == 0 and f"Wrote {tmp_path / 'r.html'}" in out
    assert (tmp_path / "r.md").read_text().startswith("# Mine\n")
    status, out, _ = run("report", *files, "--json")
    assert status == 0 and json.loads(out)["edgeq_report"] == 1
    status, _, err = run("report", *files, "-o", tmp_path / "r.html")
    assert status == 1 and "exists and is kept" in err
    assert run("report", *files, "-o", tmp_path / "r.html", "--force")[0] == 0
    status, _, err = run("report", *files, "--budget", "much")
    assert status == 2 and "'much' is not a size" in err
