import os
import subprocess
import sys

import pytest

from edgeq.errors import OutputError
from edgeq.output import check_disk, check_target, staged_file, staged_folder


def test_folder_appears_whole_and_only_at_the_end(tmp_path):
    target = tmp_path / "out"
    with staged_folder(target) as stage:
        (stage / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ValueError), staged_folder(tmp_path / "out") as stage:
        (stage / "a").write_text("1")
        raise ValueError
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_kept_unless_forced(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(OutputError, match=r"exists and is kept.*--force"), staged_folder(target):
        pass
    assert (target / "old").read_text() == "old"
    with pytest.raises(RuntimeError), staged_folder(target, force=True):
        raise RuntimeError
    assert (target / "old").read_text() == "old"
    with staged_folder(target, force=True) as stage:
        (stage / "new").write_text("new")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with staged_folder(tmp_path / "out") as stage:
        (stage / "a").write_text("1")
    assert (tmp_path / "out" / "a").exists()


def test_output_must_not_swallow_an_input(tmp_path):
    model = tmp_path / "m" / "config.json"
    model.parent.mkdir()
    model.write_text("{}")
    for target in (model.parent, tmp_path):
        with pytest.raises(OutputError, match=r"would replace the input"):
            check_target(target, force=True, inputs=(model,))
    with pytest.raises(OutputError, match=r"same file as an input"), staged_file(model, force=True, inputs=(model,)):
        pass
    assert model.read_text() == "{}"


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(OutputError, match=r"is not a folder"):
        check_target(tmp_path / "f", force=True)
    with pytest.raises(OutputError, match=r"is a folder"), staged_file(tmp_path):
        pass


def test_staged_file_replaces_only_when_told(tmp_path):
    target = tmp_path / "f"
    with staged_file(target) as stage:
        stage.write_text("1")
    with pytest.raises(OutputError, match=r"exists and is kept"), staged_file(target):
        pass
    with staged_file(target, force=True) as stage:
        stage.write_text("2")
    assert target.read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_leftovers_of_dead_runs_are_swept_and_a_cut_short_replacement_is_undone(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".out.partial-{dead.pid}").mkdir()
    (tmp_path / f".out.old-{dead.pid}").mkdir()
    (tmp_path / f".out.old-{dead.pid}" / "kept").write_text("1")
    alive = tmp_path / f".out.partial-{os.getppid()}"
    alive.mkdir()
    with pytest.raises(ValueError), staged_folder(tmp_path / "out"):
        raise ValueError
    assert (tmp_path / "out" / "kept").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([alive.name, "out"])


def test_disk_is_checked_before_the_first_byte(tmp_path):
    check_disk(tmp_path / "not" / "there", 1)
    with pytest.raises(OutputError, match=r"only .* are free"):
        check_disk(tmp_path / "not" / "there", 1 << 60)


def test_unwritable_places_are_named(tmp_path):
    with pytest.raises(OutputError, match=r"cannot write there"), staged_folder(tmp_path / "out") as stage:
        raise PermissionError(13, "Permission denied", str(stage))
