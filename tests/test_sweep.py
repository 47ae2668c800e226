"""`edgeq sweep` on a tiny model: what is measured, what is kept, what is made again. Exports and quality are real; the bench, which has
tests of its own and takes its time, answers with made figures for the real artifacts, but for one test."""

import json
import shutil

import pytest
from made_results import bench_row
from tiny import hf_folder

from edgeq import api, quality_api
from edgeq.errors import MissingDependency, OutputError, PlanError, RuntimeFailure, UnsupportedError, UsageError
from edgeq.package import write_manifest
from edgeq.runtime.evaluation import opened
from edgeq.sweep import sweep

TEXT = "The harbour lights of the island were built between 1847 and 1902. " * 20
OPTIONS = {"profile": "laptop-cpu", "prompt_tokens": 8, "gen_tokens": 4, "repeat": 1, "threads": 1, "verify": False}


class Row:
    def __init__(self, artifact, rate):
        with opened(artifact, rate, None) as subject:
            figures = {"artifact_sha256": subject.sha256, "model_bytes": subject.path.stat().st_size}
            self.row = bench_row(subject.quant, rate=subject.rate, rss_mb=50) | {"artifact": str(artifact)} | figures

    def to_json(self):
        return self.row


def made_bench(artifacts, *, rates=None, progress, **settings):
    progress("bench", 1, 1)
    assert settings.keys() == {"prompt_tokens", "gen_tokens", "repeat", "device", "threads"}
    return [Row(artifact, rate) for artifact in artifacts for rate in (rates if rates is not None else [None])]


REAL_BENCH = api.bench


@pytest.fixture(autouse=True, scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "bench", made_bench)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "t.txt").write_text(TEXT)
    return hf_folder(folder / "my-model", "llama")


@pytest.fixture(scope="module")
def swept(model, tmp_path_factory):
    """One sweep of two quants at two rates, for all tests that look at it or go on from a copy."""
    out = tmp_path_factory.mktemp("swept") / "s"
    steps = []
    result = go(model, out, progress=lambda *step: steps.append(step))
    return out, result, steps


def go(model, out, quants=("Q8_0", "Q4_0"), **other):
    quality = {"text": model.parent / "t.txt", "ctx": 64, "chunks": 2}
    return sweep(model, output=out, quants=quants, **{"rates": (0.0, 0.2), **quality, **OPTIONS, **other})


@pytest.fixture
def copy(swept, tmp_path):
    shutil.copytree(swept[0], tmp_path / "s")
    return tmp_path / "s"


def test_the_grid_is_exported_measured_and_reported(swept):
    out, result, steps = swept
    assert (result.made, result.reused, result.failures) == (2 + 4 + 4, 0, ())
    assert list(result.packages) == ["Q8_0", "Q4_0"]
    assert [(v.quant, v.rate) for v in result.report.variants if v.setup] == [("Q8_0", 0), ("Q8_0", 0.2), ("Q4_0", 0), ("Q4_0", 0.2)]
    assert all("kl_mean t.txt" in v.quality for v in result.report.variants if v.setup)
    for name in ("report.html", "report.md", "report.json", "bench.json", "quality.json"):
        assert (out / name).is_file()
    assert "my-model for laptop-cpu" in (out / "report.md").read_text()
    shown = [(done, total) for step, done, total in steps if step == "sweep"]
    assert shown[0][0] == 0 and shown[-1] == (1, 1)
    parts = [done / total for done, total in shown]
    assert parts == sorted(parts)
    assert {"hash", "write", "bench", "eval"} <= {step for step, _, _ in steps}


def test_a_second_run_does_nothing_again(copy, model, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("done before")

    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    for module, name in ((api, "export"), (api, "bench"), (quality_api, "evaluate_tasks")):
        monkeypatch.setattr(module, name, never)
    result = go(model, copy)
    assert (result.made, result.reused) == (0, 10)
    after = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert after == before


def test_only_what_is_missing_is_made(copy, model, monkeypatch):
    """One measurement of each kind gone, and one rate more."""
    bench = api.bench
    asked = []
    monkeypatch.setattr(api, "bench", lambda artifacts, **kw: asked.append((len(artifacts), kw["rates"])) or bench(artifacts, **kw))
    (first, *_) = sorted((copy / "measured").glob("bench-*.json"))
    gone = json.loads(first.read_text())
    first.unlink()
    next(iter(sorted((copy / "measured").glob("quality-*.json")))).unlink()
    result = go(model, copy)
    assert (result.made, result.reused) == (2, 8)
    assert asked == [(1, [gone["rate"]])]
    asked.clear()
    result = go(model, copy, rates=(0.0, 0.1, 0.2))
    assert (result.made, result.reused) == (4, 10)
    assert asked == [(2, [0.1])]  # both packages in turns


def test_what_a_result_comes_from_counts(copy, model):
    (model.parent / "u.txt").write_text(TEXT[::-1])
    assert go(model, copy, text=model.parent / "u.txt").made == 4
    assert go(model, copy, repeat=2).made == 4
    assert go(model, copy, quants=("Q8_0",), verify=True).made == 1  # the same bytes come out, so its measurements hold


def test_an_interrupted_sweep_goes_on(model, tmp_path, monkeypatch):
    bench = api.bench
    monkeypatch.setattr(api, "bench", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeFailure("the machine stopped")))
    with pytest.raises(RuntimeFailure, match="the machine stopped"):
        go(model, tmp_path / "s", quants=("Q4_0",), rates=(0.0,), text=None)
    assert not (tmp_path / "s" / "report.md").exists()
    monkeypatch.setattr(api, "bench", bench)
    result = go(model, tmp_path / "s", quants=("Q4_0",), rates=(0.0,), text=None)
    assert (result.made, result.reused) == (1, 1)
    assert [v.quality for v in result.report.variants] == [{}]
    (package,) = result.packages.values()
    assert json.loads((package / "manifest.json").read_text())["export"].get("elastic") is not True  # no rates, so of one size


def test_memory_for_one_at_a_time(copy, model, monkeypatch):
    bench, asked = api.bench, []

    def small(artifacts, **kwargs):
        asked.append(len(artifacts))
        if len(artifacts) > 1:
            raise PlanError("2 artifacts side by side need more")
        return bench(artifacts, **kwargs)

    monkeypatch.setattr(api, "bench", small)
    for path in (copy / "measured").glob("bench-*"):
        path.unlink()
    assert go(model, copy).made == 4
    assert asked == [2, 1, 1]


def test_quants_that_cannot_be_are_left_out(copy, model):
    result = go(model, copy, quants=("nonsense", "Q8_0"))
    assert [(one.quant, one.reason[:31]) for one in result.failures] == [("nonsense", "unknown quantization 'nonsense'")]
    assert list(result.packages) == ["Q8_0"]
    with pytest.raises(UnsupportedError, match="unknown quantization 'nonsense'"):
        go(model, copy, quants=("nonsense",))


def test_packages_that_failed_their_gate_are_not_measured(copy, model):
    (package,) = (copy / "packages").glob("Q4_0-*")
    manifest = json.loads((package / "manifest.json").read_text())
    write_manifest(package, manifest | {"status": "failed"})
    result = go(model, copy)
    assert list(result.packages) == ["Q8_0"]
    assert result.failures[0].reason == f"{package} did not pass its gate, and was not measured."
    with pytest.raises(PlanError, match=r"no quant came to a package that passes its gate: .*Q4_0"):
        go(model, copy, quants=("Q4_0",))


def test_folders_of_something_else_are_left_alone(model, tmp_path, copy):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match=r"mine exists and holds no sweep\. Choose another folder"):
        go(model, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    for content in ("{", '{"format": "other"}', "[]"):
        (copy / "sweep.json").write_text(content)
        with pytest.raises(OutputError, match=r"sweep\.json is not that of a sweep of this edgeq"):
            go(model, copy)


def test_a_damaged_measurement_is_named(copy, model):
    (first, *_) = sorted((copy / "measured").glob("bench-*.json"))
    first.write_text("{")
    with pytest.raises(OutputError, match=rf"{first.name} is damaged .*Delete it and sweep again"):
        go(model, copy)


def test_calls_that_make_no_sense(model, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"no quants to try\. Name some, e\.g\. Q4_K_M,Q4_0"):
        go(model, tmp_path / "s", quants=())
    with pytest.raises(UsageError, match=r"rates to measure are 0\.9"):
        go(model, tmp_path / "s", rates=(0.9,))
    with pytest.raises(UsageError, match="'much' is not a size"):
        go(model, tmp_path / "s", budget="much")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else 1)
    with pytest.raises(MissingDependency, match=r"matplotlib is not installed\. Install it with: pip install 'edgeq\[report\]'"):
        go(model, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_with_the_real_bench(copy, model, monkeypatch):
    monkeypatch.setattr(api, "bench", REAL_BENCH)
    result = go(model, copy, repeat=2)
    assert (result.made, result.reused) == (4, 6)
    timed = [v for v in result.report.variants if v.setup]
    assert [(v.quant, v.rate) for v in timed] == [("Q8_0", 0), ("Q8_0", 0.2), ("Q4_0", 0), ("Q4_0", 0.2)]
    assert all(v.figure("decode_tok_s") and v.quality for v in timed)
    assert timed[0].size_bytes > timed[1].size_bytes > timed[3].size_bytes


def test_the_quants_of_the_profile_by_default(model):
    from edgeq.profiles import load_profile
    from edgeq.sweep import _usual_quants

    profile = load_profile("laptop-cpu")
    assert _usual_quants(profile, "auto") == profile.export.grids
    assert set(_usual_quants(profile, "onnx")) <= {"fp32", "fp16", "int8", "int4"}


def test_command_line(run, copy, model):
    options = ("--rates", "0,0.2", "--text", model.parent / "t.txt", "--ctx", 64, "--chunks", 2, "--no-verify")
    options = (*options, "--prompt-tokens", 8, "--gen-tokens", 4, "--repeat", 1, "--threads", 1)
    command = ("sweep", model, "-o", copy, "--profile", "laptop-cpu", "--quants", "Q8_0, Q4_0,nonsense", *options)
    status, out, err = run(*command, "--budget", "1MB")
    assert (status, err) == (0, "")
    assert "Nothing fits" in out and "missed: memory" in out
    assert "Left out nonsense: unknown quantization" in out
    assert "0 steps done, 10 were done before" in out
    assert f"Wrote {copy / 'report.html'}" in out
    status, out, _ = run(*command, "--json")
    document = json.loads(out)
    assert status == 0
    assert (document["made"], document["reused"], len(document["packages"]), len(document["failures"])) == (0, 10, 2, 1)
    assert {v["qualifies"] for v in document["variants"] if v["setup"]} <= {True, False}
