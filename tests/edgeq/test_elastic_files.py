"""Side files of an elastic package: written, found whole or refused, and read back."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.compensation import HiddenModel
from edgeq.elastic import Ladder, Step
from edgeq.elastic_files import ARRAYS_FILE, LADDER_FILE, read_elastic, write_elastic
from edgeq.errors import PackageError
from edgeq.package import read_package, record_files, write_manifest

LADDER = Ladder(
    n_ff=(96, 0, 64),
    n_kv=(2, 0, 2),
    block_params=1000,
    steps=(
        Step(layer=0, port="ffn", start=96, stop=64, removed=300, damage=0.1),
        Step(layer=2, port="kv_group", start=2, stop=1, removed=100, damage=0.5),
    ),
)
ORDERS = [np.arange(n)[::-1] for n in (2, 96, 2, 64)]


def hidden_model(n_ff: int, *, rank: int, scale: float = 1.0, seed: int = 0) -> HiddenModel:
    rng = np.random.default_rng(seed)
    size = np.exp(rng.standard_normal(n_ff)) * scale
    draw = [rng.standard_normal(shape) for shape in ((n_ff,), (n_ff, rank))]
    factors = draw[1] / rank**0.5 * size[:, None]
    mean, noise = draw[0] * size, (0.1 + rng.random(n_ff)) * size**2
    noise[5], factors[5] = 0.0, 0.0  # a channel that is always the same
    return HiddenModel(mean=mean.astype(np.float32), factors=factors.astype(np.float32), noise=noise.astype(np.float32))


HIDDEN = {0: hidden_model(96, rank=8), 2: hidden_model(64, rank=5, scale=3e4, seed=1)}


def write_package(folder: Path, *, elastic: bool = True, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    settings: dict[str, Any] = {"ladder": LADDER, "hidden": HIDDEN, "orders": ORDERS, "sort": "edgeq", "compensation": {"ridge": 0.5}}
    side = record_files(folder, write_elastic(folder, **settings | changes)) if elastic else []
    artifact = record_files(folder, [folder / "m.gguf"])[0]
    manifest = {
        "status": "passed",
        "export": {"profile": "laptop-cpu", "elastic": elastic},
        "artifacts": [{**artifact.to_json(), "format": "gguf"}],
        "side_files": [record.to_json() for record in side],
    }
    write_manifest(folder, manifest)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_package(tmp_path / "p")


def sign(folder: Path) -> None:
    """Let the manifest vouch for the side files as they are now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["side_files"] = [r.to_json() for r in record_files(folder, [folder / LADDER_FILE, folder / ARRAYS_FILE])]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_is_written_is_read(folder: Path) -> None:
    elastic = read_elastic(read_package(folder))
    assert elastic.ladder == LADDER
    assert elastic.sort == "edgeq"
    assert elastic.compensation == {"rank": 8, "ridge": 0.5}
    assert [order.tolist() for order in elastic.orders] == [order.tolist() for order in ORDERS]
    assert elastic.orders[-1].tolist() == ORDERS[-1].tolist()
    assert len(elastic.orders[1:3]) == 2
    assert list(elastic.hidden) == [0, 2]
    assert elastic.head == {}


def test_hidden_models_keep_half_precision_whatever_their_units(folder: Path) -> None:
    """Half precision alone would hold no factor of layer 2, whose activations are of the order of 1e5: relative error 2^-11 at most."""
    found = read_elastic(read_package(folder)).hidden
    for layer, model in HIDDEN.items():
        rank = model.factors.shape[1]
        assert np.array_equal(found[layer].mean, model.mean)
        assert np.array_equal(found[layer].noise, model.noise)
        np.testing.assert_allclose(found[layer].factors[:, :rank], model.factors, rtol=6e-4, atol=1e-7 * np.abs(model.factors).max())
        assert not found[layer].factors[:, rank:].any()
        assert found[layer].factors.dtype == np.float32
    assert np.abs(HIDDEN[2].factors).max() > 65504


def test_what_is_said_about_heads_comes_back(tmp_path: Path) -> None:
    pairs = np.arange(12, dtype=np.int32)
    found = read_elastic(read_package(write_package(tmp_path / "p", head={"pairs": pairs})))
    assert {name: array.tolist() for name, array in found.head.items()} == {"pairs": pairs.tolist()}


def test_nothing_needs_to_be_compensated(tmp_path: Path) -> None:
    found = read_elastic(read_package(write_package(tmp_path / "p", hidden={}, sort="none")))
    assert not found.hidden
    assert (found.sort, len(found.orders)) == ("none", 4)


def test_the_same_content_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = write_package(tmp_path / "again")
    for name in (LADDER_FILE, ARRAYS_FILE):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_numpy_opens_the_arrays(folder: Path) -> None:
    with np.load(folder / ARRAYS_FILE) as arrays:
        assert {name: (str(arrays[name].dtype), arrays[name].shape) for name in arrays} == {
            **{f"order.{i}": ("int32", (len(order),)) for i, order in enumerate(ORDERS)},
            "mean": ("float32", (160,)),
            "noise": ("float32", (160,)),
            "factors": ("float16", (160, 8)),
        }


def test_factors_far_beyond_their_noise_are_refused(tmp_path: Path) -> None:
    model = HIDDEN[0]
    broken = HiddenModel(mean=model.mean, factors=model.factors, noise=model.noise * np.float32(1e-12))
    with pytest.raises(PackageError, match=r"factors beyond 65504 times its noise. Calibrate with another text"):
        write_elastic(tmp_path, ladder=LADDER, hidden=HIDDEN | {0: broken}, orders=ORDERS, sort="edgeq")


def test_a_package_of_one_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"is not elastic: it has one size. Export the model again with --elastic to cut it"):
        read_elastic(read_package(write_package(tmp_path / "p", elastic=False)))


@pytest.mark.parametrize("name", [LADDER_FILE, ARRAYS_FILE])
def test_missing_and_damaged_files_are_refused(folder: Path, name: str) -> None:
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[:-7] + bytes([data[-7] ^ 1]) + data[-6:])
    with pytest.raises(PackageError, match=rf"{name} does not match its hash .*Copy it again"):
        read_elastic(read_package(folder))
    path.write_bytes(data[:-1])
    with pytest.raises(PackageError, match=rf"{name} has .* bytes, the manifest says .*copy it again"):
        read_elastic(read_package(folder))
    path.unlink()
    with pytest.raises(PackageError, match=rf"{name} is missing. The package is damaged; copy it again"):
        read_elastic(read_package(folder))


def test_a_manifest_without_them_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["side_files"] = manifest["side_files"][:1]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PackageError, match=r"the manifest does not list elastic.npz. The package is damaged; copy it again"):
        read_elastic(read_package(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-5], r"elastic.json is not valid JSON .*export it again"),
        (lambda text: "[]", r"elastic.json: version None, expected 1. Use the edgeq that wrote the package"),
        (lambda text: text.replace('{"version":1', '{"version":2', 1), r"elastic.json: version 2, expected 1"),
        (lambda text: text.replace('"sort":"edgeq"', '"sort":"up"'), r"elastic.json: lacks or misspells ladder, sort or compensation"),
        (lambda text: text.replace('"ladder"', '"leiter"'), r"elastic.json: lacks or misspells ladder"),
        (lambda text: text.replace('"block_params"', '"params"'), r"the ladder lacks or misspells 'block_params'"),
    ],
)  # fmt: skip
def test_a_ladder_file_that_says_something_else_is_refused(folder: Path, change: Callable[[str], str], message: str) -> None:
    path = folder / LADDER_FILE
    path.write_text(change(path.read_text()))
    sign(folder)
    with pytest.raises(PackageError, match=message):
        read_elastic(read_package(folder))


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    with np.load(path) as arrays:
        content = dict(arrays)
    change(content)
    np.savez(path, **content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(mean=a["mean"][:-1]), r"array mean is float32 \[159\], which does not fit the ladder"),
        (lambda a: a.update(factors=a["factors"].astype(np.float32)), r"array factors is float32 \[160, 8\], which does not fit"),
        (lambda a: a.pop("noise"), r"elastic.npz cannot be read \(.*noise"),
        (lambda a: a["noise"].__setitem__(3, -1), r"some values are not finite, or a noise is negative"),
        (lambda a: a["mean"].__setitem__(3, np.nan), r"some values are not finite"),
        (lambda a: a["factors"].__setitem__(3, np.inf), r"some values are not finite"),
        (lambda a: a.update(factors=np.asfortranarray(a["factors"])), r"elastic.npz cannot be read"),
        (lambda a: a.update(mean=np.array([{}] * 160)), r"array mean is object \[160\], which does not fit the ladder"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(folder: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    rewrite(folder / ARRAYS_FILE, change)
    sign(folder)
    with pytest.raises(PackageError, match=message):
        read_elastic(read_package(folder)).hidden[0]


def test_a_file_that_is_no_archive_is_refused(folder: Path) -> None:
    (folder / ARRAYS_FILE).write_bytes(b"PK\3\4 but nothing more")
    sign(folder)
    with pytest.raises(PackageError, match=r"elastic.npz cannot be read .*copy it again, or export it again"):
        read_elastic(read_package(folder))
    with zipfile.ZipFile(folder / ARRAYS_FILE, "w") as archive:
        archive.writestr("factors.npy", b"\x93NUMPY")
    sign(folder)
    with pytest.raises(PackageError, match=r"elastic.npz cannot be read"):
        read_elastic(read_package(folder))
