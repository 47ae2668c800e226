import json
import re
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path

import pytest

from edgeq.errors import ProfileError
from edgeq.profile_keys import ARM_ISA, KEYS, KV_TYPES, QUANT_NAMES, X86_ISA, base_grid, key_table
from edgeq.profiles import load_profile, parse_profile, profile_names

DOCS = Path(__file__).parents[2] / "docs" / "profiles.md"
GOOD = """
name = "my-device"
description = "A device"
[cpu]
cores = 4
threads = 8
isa = ["avx2", "avx512"]
mem_bandwidth_gb_s = 51.2
[memory]
ram_mib = 16384
budget_mib = 8192
[accelerator]
kind = "cuda"
name = "Some GPU"
vram_mib = 12288
mem_bandwidth_gb_s = 360
unified = false
[runtime]
name = "llama.cpp"
device = "cuda"
gpu_layers = "all"
[export]
grids = ["Q8_0", "Q4_K_M", "Q4_0"]
adapters = "auto"
n_ctx = 4096
kv_type = "f16"
[targets]
model = "1B"
ttft_ms = 100
decode_tok_s = 50.5
"""


def shipped_text(name: str) -> str:
    return (resources.files("edgeq.device_profiles") / f"{name}.toml").read_text(encoding="utf-8")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "my.toml"
    path.write_text(text, encoding="utf-8")
    return path


def as_toml(document: dict) -> str:
    """A profile's JSON as TOML. JSON's spelling of these values is TOML's too; null is left out."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in document.items() if not isinstance(value, dict) and value is not None]
    for section, table in document.items():
        if isinstance(table, dict):
            lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None)]
    return "\n".join(lines)


def test_the_promised_devices_are_shipped():
    promised = {"laptop-4090", "laptop-cpu", "desktop-3060", "macbook-m3", "raspberry-pi-5", "jetson-orin-nano", "phone-8gb", "server-h100"}
    assert promised <= set(profile_names())


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profile_parses_and_round_trips(name, tmp_path):
    profile = load_profile(name)
    assert profile.name == name
    document = profile.to_json()
    json.dumps(document, allow_nan=False)
    if profile.runtime.device == "cpu":
        assert document["runtime"].pop("gpu_layers") == 0
    assert parse_profile(write(tmp_path, as_toml(document))) == profile


@pytest.mark.parametrize("name", profile_names())
def test_every_number_of_a_shipped_profile_has_its_source_beside_it(name):
    for line in shipped_text(name).splitlines():
        if re.match(r"\w+ = [\d.]+", line):
            assert re.search(r"  # \S.{3,}", line), f"{name}: {line}"


def test_grids_of_cpu_profiles_are_those_that_their_cpus_are_fast_with():
    from edgeq.footprint import is_repacked

    for profile in map(load_profile, profile_names()):
        if profile.runtime.device == "cpu":
            assert is_repacked(base_grid(profile.export.grids[0]), 64, profile.cpu.isa), profile.name


def test_a_file_works_like_a_name(tmp_path, monkeypatch):
    path = write(tmp_path, GOOD)
    monkeypatch.chdir(tmp_path)
    assert load_profile("./my.toml") == load_profile("my.toml") == load_profile(path) == parse_profile(path)
    profile = load_profile(path)
    assert profile.discrete is not None and profile.model_memory_mib == 12288
    assert profile.runtime.gpu_layers is None and profile.to_json()["runtime"]["gpu_layers"] == "all"


def test_unified_and_unused_accelerators_live_in_ram(tmp_path):
    unified = GOOD.replace("vram_mib = 12288\n", "").replace("unified = false", "unified = true")
    assert parse_profile(write(tmp_path, unified)).model_memory_mib == 16384
    unused = GOOD.replace('device = "cuda"\ngpu_layers = "all"', 'device = "cpu"')
    profile = parse_profile(write(tmp_path, unused))
    assert profile.discrete is None and profile.accelerator is not None and profile.runtime.gpu_layers == 0


def test_kind_none_is_no_accelerator(tmp_path):
    text = re.sub(r"\[accelerator\].*?\[runtime\]", '[accelerator]\nkind = "none"\n[runtime]', GOOD, flags=re.S)
    text = text.replace('device = "cuda"\ngpu_layers = "all"', 'device = "cpu"')
    assert parse_profile(write(tmp_path, text)).accelerator is None
    assert parse_profile(write(tmp_path, text.replace('[accelerator]\nkind = "none"\n', ""))).accelerator is None


def test_targets_may_be_left_out(tmp_path):
    assert parse_profile(write(tmp_path, GOOD[: GOOD.index("[targets]")])).targets is None


CPU_ONLY = ('device = "cuda"\ngpu_layers = "all"', 'device = "cpu"')

RULES = [
    # (text to replace, replacement, message after the file's name)
    ("cores = 4\n", "", r"cpu\.cores is missing\. Physical cores\."),
    ("cores = 4", "cores = 0", r"cpu\.cores is 0; expected a whole number of at least 1\."),
    ("cores = 4", "cores = 4.0", r"cpu\.cores is 4\.0; expected a whole number of at least 1\."),
    ("cores = 4", "cores = true", r"cpu\.cores is True; expected a whole number"),
    ("cores = 4", "coers = 4", r"cpu\.coers is not a key of a profile\. Did you mean cpu\.cores\?"),
    ("cores = 4", "cores = 4\nxyzzy = 1", r"cpu\.xyzzy is not a key of a profile\. Known there: cores, threads, isa, mem_bandwidth_gb_s\."),
    ("[targets]", "[target]", r"target is not a key of a profile\. Did you mean targets\?"),
    ("threads = 8", "threads = 2", r"cpu\.threads is 2; it must be at least the 4 of cpu\.cores\."),
    ('"avx2", "avx512"', '"avx2", "avx1024"', r"cpu\.isa is .*; 'avx1024' is not known; did you mean avx512\? Known: avx2, avx512"),
    ('"avx2", "avx512"', '"avx2", "sse"', r"cpu\.isa is .*; 'sse' is not known\. Known: avx2"),
    ('"avx2", "avx512"', '"avx2", "avx2"', r"cpu\.isa is .*; 'avx2' stands there twice\."),
    ('"avx2", "avx512"', '"avx2", "neon"', r"cpu\.isa mixes x86 \(avx2\) and ARM \(neon\); keep one\."),
    ('"avx2", "avx512"', '"avx512"', r"cpu\.isa has avx512 without avx2, which every such CPU has\. Add avx2\."),
    ('["avx2", "avx512"]', '"avx2"', r"cpu\.isa is 'avx2'; expected a list of texts\."),
    ("mem_bandwidth_gb_s = 51.2", "mem_bandwidth_gb_s = inf", r"cpu\.mem_bandwidth_gb_s is inf; expected a number above 0\."),
    ("mem_bandwidth_gb_s = 51.2", "mem_bandwidth_gb_s = -1", r"cpu\.mem_bandwidth_gb_s is -1; expected a number above 0\."),
    (
        "budget_mib = 8192",
        "budget_mib = 12289",
        r"memory\.budget_mib is 12289; it must not exceed the 12288 of accelerator\.vram_mib, where the model lives\.",
    ),
    ('name = "my-device"', 'name = "My Device"', r"name is 'My Device'; expected lower-case words, digits and hyphens"),
    ('description = "A device"', 'description = " "', r"description is ' '; expected a text\."),
    ('kind = "cuda"', 'kind = "rocm"', r"accelerator\.kind is 'rocm'; expected one of cuda, metal, vulkan, none\."),
    (
        'kind = "cuda"',
        'kind = "none"',
        r'accelerator\.mem_bandwidth_gb_s is given, but accelerator\.kind is "none"\. Remove it, or name the kind\.',
    ),
    ('kind = "cuda"', 'kind = "vulkan"', r'runtime\.device is "cuda", but accelerator\.kind is "vulkan"; both must be the same\.'),
    ("vram_mib = 12288\n", "", r"accelerator\.vram_mib is missing; an accelerator that is not unified needs it\."),
    (
        "unified = false",
        "unified = true",
        r"accelerator\.vram_mib is given, but a unified accelerator has the memory\.ram_mib only\. Remove it\.",
    ),
    ("unified = false", 'unified = "no"', r"accelerator\.unified is 'no'; expected true or false\."),
    ("unified = false\n", "", r'accelerator\.unified is missing; an accelerator of kind "cuda" needs it\.'),
    ('device = "cuda"', 'device = "tpu"', r"runtime\.device is 'tpu'; expected one of cpu, cuda, metal\."),
    (
        'device = "cuda"',
        'device = "cpu"',
        r"runtime\.gpu_layers is 'all', but runtime\.device is \"cpu\"\. Remove it, or name the device\.",
    ),
    ('gpu_layers = "all"\n', "", r'runtime\.gpu_layers is missing; device "cuda" needs it \("all", or a number of layers\)\.'),
    (
        'gpu_layers = "all"',
        "gpu_layers = 0",
        r'runtime\.gpu_layers is 0, but runtime\.device is "cuda"\. Use device "cpu", or put layers on it\.',
    ),
    ('gpu_layers = "all"', "gpu_layers = -1", r'runtime\.gpu_layers is -1; expected "all" or a whole number of at least 0\.'),
    ('name = "llama.cpp"', 'name = "vllm"', r"runtime\.name is 'vllm'; expected one of llama\.cpp, onnxruntime\."),
    ('"Q8_0", "Q4_K_M"', '"Q8_0", "q4_k_m"', r"export\.grids is .*; 'q4_k_m' is not known; did you mean Q4_K_M\? Known: F32, F16"),
    ('["Q8_0", "Q4_K_M", "Q4_0"]', "[]", r"export\.grids is empty; name at least one, such as Q4_K_M\."),
    (
        '"Q8_0", "Q4_K_M"',
        '"Q4_K_M", "Q8_0"',
        r"export\.grids has Q8_0 \(8\.5 bits\) after Q4_K_M \(4\.5 bits\); order them from most bits to fewest\.",
    ),
    ('adapters = "auto"', 'adapters = "fold"', r"export\.adapters is 'fold'; expected one of merge, keep, auto\."),
    ("n_ctx = 4096", "n_ctx = 0", r"export\.n_ctx is 0; expected a whole number of at least 1\."),
    ('kv_type = "f16"', 'kv_type = "int8"', r"export\.kv_type is 'int8'; expected one of f32, f16, bf16, q8_0"),
    ("ttft_ms = 100", "ttft_ms = 0", r"targets\.ttft_ms is 0; expected a number above 0\."),
    ("ttft_ms = 100\n", "", r"targets\.ttft_ms is missing; a file with \[targets\] says all three\."),
    ("[memory]\nram_mib = 16384\nbudget_mib = 8192\n", "", r"section \[memory\] is missing\. Needed there: ram_mib, budget_mib\."),
    ("[targets]\n", "[targets.model]\n", r"targets\.model is \{.*\}; expected a text\."),
    ("cores = 4", "cores = ", r"not valid TOML: .*line 5"),
    ("cores = 4", "cores = 4\ncores = 5", r"not valid TOML: .*line 6"),
]


@pytest.mark.parametrize(("old", "new", "message"), RULES)
def test_a_broken_rule_names_file_key_and_rule(old, new, message, tmp_path):
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(ProfileError, match=re.escape(str(path)) + ": " + message):
        parse_profile(path)


def test_a_budget_beyond_ram(tmp_path):
    path = write(tmp_path, GOOD.replace(*CPU_ONLY).replace("budget_mib = 8192", "budget_mib = 16385"))
    with pytest.raises(ProfileError, match=r"memory\.budget_mib is 16385; it must not exceed the 16384 of memory\.ram_mib\."):
        parse_profile(path)


def test_a_section_must_be_a_section(tmp_path):
    path = write(tmp_path, 'cpu = "fast"\n' + GOOD.replace("[cpu]\n", "[memory]\n").replace("[memory]\nram", "ram"))
    with pytest.raises(ProfileError, match=r"cpu is 'fast'; it must be a section: \[cpu\]\."):
        parse_profile(path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ProfileError, match=r"none\.toml does not exist\. Give a \.toml file, or a name from `edgeq profiles list`\."):
        load_profile(tmp_path / "none.toml")
    with pytest.raises(ProfileError, match=r"cannot be read \(Is a directory\)"):
        load_profile(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"')
    with pytest.raises(ProfileError, match=r"latin\.toml: not UTF-8 text \(byte 11\)\. Save it as UTF-8\."):
        load_profile(tmp_path / "latin.toml")


def test_an_unknown_name_lists_all_and_the_nearest():
    with pytest.raises(
        ProfileError, match=r"no profile is called 'laptop-4080'\. Did you mean laptop-4090\? Known: desktop-3060, .*server-h100; or"
    ):
        load_profile("laptop-4080")
    with pytest.raises(ProfileError, match=r"no profile is called 'zzz'\. Known: desktop-3060"):
        load_profile("zzz")


def test_quant_names_and_cache_types_are_those_of_the_carrier_and_the_runtime():
    mixes = pytest.importorskip("edgeq.converters.gguf.mixes")
    llama_context = pytest.importorskip("edgeq.runtime.llama_context")
    assert set(QUANT_NAMES) == set(mixes.QUANTS)
    assert all(base_grid(name) == row.base for name, row in mixes.QUANTS.items())
    assert set(KV_TYPES) == set(llama_context.KV_TYPES)


def test_docs_contain_the_format_and_their_example_parses(tmp_path):
    docs = DOCS.read_text(encoding="utf-8")
    table = re.search(r"<!-- keys:.*?-->\n(.*?)<!-- end of keys -->", docs, re.S)
    assert table and table.group(1) == key_table(), "paste the output of edgeq.profile_keys.key_table() into docs/profiles.md"
    example = re.search(r"```toml\n(.*?)```", docs, re.S)
    assert example and parse_profile(write(tmp_path, example.group(1))).name == "my-laptop"
    for isa in (*X86_ISA, *ARM_ISA):
        assert isa in docs
    assert {key.section for key in KEYS} == {"", *tomllib.loads(GOOD).keys()} - {"name", "description"}


def test_profiles_load_without_heavy_libraries():
    code = (
        "import sys, edgeq.profiles as p, edgeq.detect, edgeq.planning\n"
        "[p.load_profile(n) for n in p.profile_names()]; edgeq.detect.detect()\n"
        "print([m for m in ('torch', 'transformers', 'llama_cpp', 'onnx', 'gguf') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
