"""Hub ids, against a hub of our own on this machine: what is fetched, and what is said when it cannot be."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from edgeq.converters.sources.hub import download, hub_name, is_hub_id, progress_bar
from edgeq.errors import MissingDependency, SourceError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """The few answers of the hub that a download needs. files: content by path. refuse: X-Error-Code by status for every request."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files
        self.refuse: tuple[int, str] | None = None
        self.fetched: list[str] = []


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        if self.server.refuse:
            status, code = self.server.refuse
            return self.send(status, b"{}", {"X-Error-Code": code}, body=body)
        if path.startswith("/api/models/org/tiny/revision/"):
            return self.send(200, json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": []}).encode(), body=body)
        if path.startswith("/api/models/org/tiny/tree/"):
            return self.send(200, json.dumps([self.listed(name) for name in self.server.files]).encode(), body=body)
        name = path.split(f"/resolve/{COMMIT}/")[-1]
        if name not in self.server.files:
            return self.send(404, b"{}", body=body)
        content = self.server.files[name]
        if body:
            self.server.fetched.append(name)
        return self.send(200, content, {"ETag": f'"{etag(content)}"', "X-Repo-Commit": COMMIT}, body=body)

    def listed(self, name: str) -> dict[str, Any]:
        content = self.server.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": etag(content)}

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None, *, body: bool) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub({"config.json": b"1", "model.safetensors": bytes(100_000), "tokenizer.json": b"2", "README.md": b"3"})
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # the suite runs offline; this hub is on the loopback
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def test_download_fetches_what_a_source_reads(hub: Hub) -> None:
    hub.files |= {"consolidated.safetensors": b"x", "original/model.safetensors": b"x", "pytorch_model.bin": b"x", "model.onnx": b"x"}
    hub.files |= {"generation_config.json": b"4", "tokenizer_config.json": b"5", "chat_template.jinja": b"6"}
    folder = download("org/tiny")
    expected = {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    expected |= {"generation_config.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in folder.iterdir()} == expected == set(hub.fetched)
    assert (folder / "model.safetensors").read_bytes() == bytes(100_000)


def test_a_cached_model_needs_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = download("org/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert download("org/tiny") == folder


def test_progress_hears_of_the_bytes(hub: Hub) -> None:
    heard: list[tuple[str, float, float]] = []
    download("org/tiny", progress=lambda step, done, total: heard.append((step, done, total)))
    assert {step for step, _, _ in heard} == {"download"}
    assert all(0 <= done <= total for _, done, total in heard)
    assert [done for _, done, _ in heard] == sorted(done for _, done, _ in heard)


def test_progress_bar_passes_bytes_on_and_draws_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[tuple[str, float, float]] = []
    bar = progress_bar(lambda step, done, total: heard.append((step, done, total)))
    with bar(total=3, desc="files") as files, bar(total=100, unit="B", mininterval=0) as part:
        files.update(1)
        part.update(40)
        part.update(60)
    assert heard[-1] == ("download", 100, 100)
    assert ("download", 40, 100) in heard
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("refuse", "ref", "message"),
    [
        ((404, "RepoNotFound"), "org/tiny", "org/tiny is neither a path here nor a public model on the hub. Check the spelling; log in"),
        ((404, "RevisionNotFound"), "org/tiny@v9", "org/tiny has no revision 'v9'. Name a branch, a tag or a commit after the @"),
        ((403, "GatedRepo"), "org/tiny", r"org/tiny is gated: accept its terms .* \(hf auth login\), or download it elsewhere"),
    ],
)
def test_refused_by_the_hub(hub: Hub, refuse: tuple[int, str], ref: str, message: str) -> None:
    hub.refuse = refuse
    with pytest.raises(SourceError, match=message):
        download(ref)


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match=r"org/tiny is not a path here, and the hub cannot be reached \(.*refused.*\). Check the"):
        download("org/tiny")


def test_disk_full_while_downloading(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(SourceError, match=r"org/tiny could not be downloaded \(.*No space left on device\). Try again, or download"):
        download("org/tiny")


def test_no_safetensors(hub: Hub) -> None:
    del hub.files["model.safetensors"]
    with pytest.raises(SourceError, match=r"org/tiny has no safetensors weights at its top level. Convert it to safetensors first"):
        download("org/tiny")


def test_offline(tmp_path: Path) -> None:
    """The variable is read when huggingface_hub is imported, hence a process of its own."""
    code = "from edgeq.converters.sources.hub import download; download('org/tiny@main')"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    expected = (
        "edgeq.errors.SourceError: org/tiny@main is neither a path here nor in the hub's cache, and HF_HUB_OFFLINE is set. Unset it, or "
        "download it elsewhere (hf download org/tiny --local-dir DIR), copy the folder here and pass its path."
    )
    assert done.stderr.strip().splitlines()[-1] == expected


def test_without_the_hub_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependency, match=r"huggingface_hub is not installed. Install it with: pip install 'edgeq\[export\]'"):
        download("org/tiny")


def test_impossible_id() -> None:
    with pytest.raises(SourceError, match=r"a/b..c is neither a path here nor a valid hub id \(.*\)"):
        download("a/b..c")


@pytest.mark.parametrize("ref", ["org/name", "Qwen/Qwen2.5-0.5B-Instruct", "a/b@main", "a/b@refs/pr/1", "0x/y_z@v1.0"])
def test_hub_ids(ref: str) -> None:
    assert is_hub_id(ref)


@pytest.mark.parametrize("ref", ["name", "./org/name", "/org/name", "a/b/c", "a/b@", "a b/c", "", "a/", "~/m", "../m", "a\\b"])
def test_not_hub_ids(ref: str) -> None:
    assert not is_hub_id(ref)


def test_hub_name() -> None:
    assert hub_name("HuggingFaceTB/SmolLM2-135M@main") == "SmolLM2-135M"
