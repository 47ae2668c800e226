"""Embedding on a device: batches, cuts, prompts, and packages that are damaged."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from tiny_encoders import hf_encoder, hf_oracle, token_vectors

import edgeq
from edgeq.errors import PackageError, RuntimeFailure, TokenizerError, UsageError
from edgeq.package import record_files
from edgeq.runtime.embedder import BATCH_TOKENS, Embedder, batches, cosine_similarity, run_graph

TEXTS = ["The quick brown fox", "", "dog " * 40, "In the end there are ways to count; here, there and then.", "weather"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return hf_encoder(tmp_path_factory.mktemp("models") / "tiny", max_seq_length=33, prompts={"query": "the dog: "})


@pytest.fixture(scope="module")
def package(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("packages") / "p"
    assert edgeq.export_encoder(source, profile="laptop-cpu", output=out, quant="fp32").gate.passed
    return out


@pytest.fixture(scope="module")
def embedder(package):
    with Embedder.load(package, threads=1) as loaded:
        yield loaded


def expected(source, ids):
    mean = token_vectors(hf_oracle(source), ids).mean(0)
    return torch.nn.functional.normalize(mean, dim=0).numpy()


def test_embeddings_are_those_of_transformers(embedder, source):
    found = embedder.embed(TEXTS)
    assert found.shape == (5, 36) == (5, embedder.n_out) and found.dtype == np.float32
    for vector, ids in zip(found, embedder.tokenize(TEXTS), strict=True):
        np.testing.assert_allclose(vector, expected(source, ids), atol=1e-5)


def test_texts_are_cut_where_the_model_says_and_not_where_the_tokenizer_file_does(embedder):
    lengths = [len(ids) for ids in embedder.tokenize(TEXTS)]
    assert embedder.max_tokens == max(lengths) == 33  # tokenizer.json says 9
    assert lengths[1] == 2  # [CLS] [SEP]; tokenizer.json pads to 12
    assert embedder.tokenize(["dog " * 40])[0][-1] == embedder.tokenize(["dog"])[0][-1]  # [SEP] stays


def test_batches_change_nothing(embedder):
    together = embedder.embed(TEXTS)
    for batch_size in (1, 2):
        np.testing.assert_allclose(embedder.embed(TEXTS, batch_size=batch_size), together, atol=1e-6)
    np.testing.assert_allclose(embedder.embed(TEXTS[3]), together[3], atol=1e-6)
    np.testing.assert_array_equal(embedder.embed(TEXTS[::-1])[::-1], together)
    assert embedder.embed([]).shape == (0, 36)


def test_batches_are_sorted_and_bounded():
    lengths = [5, 900, 7, 2000, 3, 900]
    groups = batches(lengths, batch_size=2)
    assert sorted(i for group in groups for i in group) == list(range(6))
    assert all(len(group) <= 2 for group in groups)
    for group in batches([700] * 20, batch_size=32):
        assert len(group) * 700 <= BATCH_TOKENS
    assert batches([BATCH_TOKENS + 1], batch_size=4) == [[0]]  # one text runs however long it is


def test_prompts(embedder):
    assert dict(embedder.prompts) == {"query": "the dog: "}
    np.testing.assert_array_equal(embedder.embed(["fox"], prompt="query"), embedder.embed(["the dog: fox"]))
    assert np.abs(embedder.embed(["fox"], prompt="query") - embedder.embed(["fox"], prompt="")).max() > 1e-3
    with pytest.raises(UsageError, match=r"prompt 'passage' is not one of the model's; it has 'query'"):
        embedder.embed(["fox"], prompt="passage")


def test_a_default_prompt_and_lower_case(tmp_path):
    folder = hf_encoder(tmp_path / "m", prompts={"query": "the dog: "}, max_seq_length=20)
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"q": "The dog: "}, "default_prompt_name": "q"}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20, "do_lower_case": True}))
    edgeq.export_encoder(folder, profile="laptop-cpu", output=tmp_path / "p", quant="fp32", verify=False)
    with edgeq.load_embedder(tmp_path / "p") as loaded:
        plain = loaded.tokenize(["fox"], prompt="")
        assert loaded.tokenize(["fox"]) == loaded.tokenize(["the dog: FOX"], prompt="") != plain


def test_similarity(embedder):
    a, b = embedder.embed(TEXTS[:2]), embedder.embed(TEXTS[2:])
    found = embedder.similarity(a, b)
    assert found.shape == (2, 3)
    np.testing.assert_allclose(found, a @ b.T, atol=1e-6)  # of unit length already
    np.testing.assert_allclose(cosine_similarity(5 * a, b), found, atol=1e-6)
    assert float(embedder.similarity(a[0], a[0])) == pytest.approx(1)
    np.testing.assert_array_equal(cosine_similarity(np.zeros((1, 36), np.float32), b), 0)


def test_threads_share_an_embedder(embedder):
    together, found = embedder.embed(TEXTS), {}
    runs = [threading.Thread(target=lambda i=i: found.setdefault(i, embedder.embed(TEXTS))) for i in range(4)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    assert len(found) == 4
    for vectors in found.values():
        np.testing.assert_array_equal(vectors, together)


def test_usage(embedder, package):
    with pytest.raises(UsageError, match=r"batch_size is 0"):
        embedder.embed(TEXTS, batch_size=0)
    with pytest.raises(TokenizerError, match=r"text cannot be tokenized"):
        embedder.embed(["\ud800"])
    with pytest.raises(TokenizerError, match=r"text cannot be tokenized"):
        embedder.embed([3])
    with pytest.raises(UsageError, match=r"threads is 0"):
        Embedder.load(package, threads=0)
    with pytest.raises(UsageError, match=r"device 'tpu' is not known"):
        Embedder.load(package, device="tpu")
    closed = Embedder.load(package)
    closed.close()
    closed.close()
    with pytest.raises(RuntimeFailure, match=r"the embedder is closed"):
        closed.embed(["fox"])


def test_cuda_that_is_not_there(package):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this build has CUDA")
    with pytest.raises(RuntimeFailure, match=r"cannot use CUDA. Install onnxruntime-gpu in its place, or use cpu"):
        Embedder.load(package, device="cuda")


def copy(package, target):
    import shutil

    shutil.copytree(package, target)
    return target


def resign(folder):
    """Make the manifest's hashes those of the files."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for kind in ("artifacts", "side_files"):
        for record in manifest[kind]:
            record.update(record_files(folder, [folder / record["path"]])[0].to_json())
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_changed_bytes_are_found_before_the_runtime_sees_them(package, tmp_path):
    for name in ("model.onnx", "model.onnx.data", "tokenizer.json"):
        folder = copy(package, tmp_path / name)
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(PackageError, match=f"{name} does not match its hash"):
            Embedder.load(folder)


def test_files_that_are_wrong_in_other_ways(package, tmp_path):
    folder = copy(package, tmp_path / "cut")
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:200])
    resign(folder)
    with pytest.raises(RuntimeFailure, match=r"onnxruntime .* cannot load it. It said: "):
        Embedder.load(folder)
    folder = copy(package, tmp_path / "tokenizer")
    (folder / "tokenizer.json").write_text("{}")
    resign(folder)
    with pytest.raises(TokenizerError, match=r"tokenizer.json: the tokenizers library cannot load it"):
        Embedder.load(folder)
    folder = copy(package, tmp_path / "manifest")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["encoder"]["spec"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PackageError, match=r"encoder section lacks or misspells 'spec'"):
        Embedder.load(folder)


def test_other_packages_are_refused(package, tmp_path):
    from tiny_elastic import write_tiny_elastic

    decoder = write_tiny_elastic(tmp_path / "decoder")
    with pytest.raises(PackageError, match=r"is not a package of an encoder: it generates text"):
        Embedder.load(decoder)
    with pytest.raises(PackageError, match=r"is the package of an encoder, which embeds texts. Use `edgeq embed`, or edgeq.load_embedder"):
        edgeq.load(package)


def test_graphs_of_something_else(package, tmp_path):
    import onnx

    folder = copy(package, tmp_path / "other")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        node.input[:] = ["pixels" if name == "input_ids" else name for name in node.input]
    model.graph.input[0].name = "pixels"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    resign(folder)
    with pytest.raises(PackageError, match=r"the graph is not one of an encoder's: it wants \['pixels'\]"):
        Embedder.load(folder)
    with pytest.raises(UsageError, match=r"the graph asks for pixels; known inputs are input_ids, "):
        run_graph(folder / "model.onnx", [[1, 2]])


def test_a_failing_run_is_told(embedder, package):
    with pytest.raises(RuntimeFailure, match=r"model.onnx: "):
        embedder._run([[10**6]])  # outside the vocabulary
    with pytest.raises(RuntimeFailure, match=r"model.onnx: "):
        run_graph(package / "model.onnx", [[10**6]])


def test_no_torch_on_the_device(package):
    code = (
        "import sys, edgeq\n"
        f"with edgeq.load_embedder({str(package)!r}) as e: assert e.embed(['fox']).shape == (1, 36)\n"
        "assert not {'torch', 'transformers', 'onnx', 'onnx_ir', 'llama_cpp'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
