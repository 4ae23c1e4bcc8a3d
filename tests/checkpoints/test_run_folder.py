"""A run that exists is never overwritten, and resumed only with the config it was started with."""

import errno
import fcntl
import os
import pathlib
import tempfile

import pytest

from shallow_pi.checkpoints import run_folder


def test_an_existing_run_needs_resume_or_overwrite(tmp_path):
    run = tmp_path / "run"
    assert not run_folder.prepare(run, resume=True, overwrite=False)  # Nothing there yet.
    assert not run_folder.prepare(run, resume=False, overwrite=False)
    (run / "1").mkdir()
    with pytest.raises(ValueError, match=r"already holds a run: --resume .* --overwrite"):
        run_folder.prepare(run, resume=False, overwrite=False)
    with pytest.raises(ValueError, match="give only one"):
        run_folder.prepare(run, resume=True, overwrite=True)
    assert (run / "1").is_dir()
    (run / "config.json").write_text("{}")
    assert run_folder.prepare(run, resume=True, overwrite=False)
    assert (run / "1").is_dir()


def test_overwrite_puts_the_old_run_aside(tmp_path):
    run = tmp_path / "run"
    for number in ("1", "2"):
        (run / number).mkdir(parents=True)
        assert not run_folder.prepare(run, resume=False, overwrite=True)
        assert list(run.iterdir()) == []
    assert (tmp_path / "run.old-1" / "1").is_dir()
    assert (tmp_path / "run.old-2" / "2").is_dir()


def test_a_run_that_is_being_trained_is_not_put_aside(tmp_path):
    (tmp_path / "run" / "1").mkdir(parents=True)
    busy = pytest.raises(ValueError, match="another process works in")
    with run_folder.held(tmp_path / "run"), busy:
        run_folder.prepare(tmp_path / "run", resume=False, overwrite=True)
    assert [child.name for child in tmp_path.iterdir()] == ["run"]
    assert not run_folder.prepare(tmp_path / "run", resume=False, overwrite=True)


def test_another_process_that_tries_to_write_makes_no_run(tmp_path):
    with tempfile.TemporaryDirectory(prefix=".writable-", dir=tmp_path):
        assert not run_folder.check(tmp_path, resume=False, overwrite=False)


def test_a_run_folder_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(FileExistsError, match="is a file, expected a folder"):
        run_folder.prepare(tmp_path / "run", resume=False, overwrite=True)


def test_a_resumed_config_may_differ_in_safe_fields_alone(tmp_path):
    config = {"batch_size": 32, "losses": {"task": 1.0, "layers": (1, 2)}, "log": {"every": 10}}
    run_folder.save_config(tmp_path, config)
    run_folder.compare_config(tmp_path, config)
    changed = {"batch_size": 64, "losses": {"task": 0.5, "layers": (1, 2)}, "log": {"every": 20}}
    with pytest.raises(ValueError, match="another config") as caught:
        run_folder.compare_config(tmp_path, changed, safe={"log"})
    assert str(caught.value).splitlines()[1:3] == [
        "  batch_size: saved 32, now 64",
        "  losses.task: saved 1.0, now 0.5",
    ]
    run_folder.compare_config(tmp_path, changed, safe={"log", "batch_size", "losses.task"})
    with pytest.raises(ValueError, match="seed: saved 'absent', now 1"):
        run_folder.compare_config(tmp_path, {**config, "seed": 1})


def test_steps_without_their_config_are_not_resumed(tmp_path):
    (tmp_path / "20").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config.json is missing: .*use --overwrite or"):
        run_folder.check(tmp_path, resume=True, overwrite=False)
    assert run_folder.check(tmp_path, resume=False, overwrite=True)
    (tmp_path / "20").rmdir()  # Stopped before its first step, and before it saved a config.
    (tmp_path / "demonstrations").mkdir()
    assert run_folder.check(tmp_path, resume=True, overwrite=False)


def test_paths_move_with_the_folder_of_all_runs(tmp_path):
    def at(top, path):
        return {"checkpoint_dir": top, "data": {"path": path}}

    run_folder.save_config(tmp_path, at("runs", "runs/first/demonstrations"))
    moved = at("/moved", "/moved/first/demonstrations")
    run_folder.compare_config(tmp_path, moved, safe={"checkpoint_dir"})
    other = at("/moved", "runs/first/demonstrations")
    with pytest.raises(ValueError, match=r"data\.path: saved 'first/demonstrations', now 'runs/"):
        run_folder.compare_config(tmp_path, other, safe={"checkpoint_dir"})


def test_a_field_newer_than_the_run_may_have_its_default(tmp_path):
    config = {"seed": 1, "losses": {"task": 1.0}}
    run_folder.save_config(tmp_path, config)
    newer = {"seed": 1, "losses": {"task": 1.0, "bins": (1, 2)}}
    usual = {"seed": 42, "losses": {"task": 0.0, "bins": (1, 2)}}
    assert run_folder.compare_config(tmp_path, newer, defaults=usual) == ["losses.bins"]
    newer["losses"]["bins"] = (1, 3)
    with pytest.raises(ValueError, match=r"losses.bins: saved 'absent', now \[1, 3\]"):
        run_folder.compare_config(tmp_path, newer, defaults=usual)
    # A saved value counts, also where today's value is the default.
    with pytest.raises(ValueError, match="seed: saved 1, now 42"):
        run_folder.compare_config(tmp_path, {**config, "seed": 42}, defaults=usual)


def test_a_run_folder_is_held_by_one_training(tmp_path):
    first, second = (run_folder.held(tmp_path) for _ in range(2))
    with first, pytest.raises(ValueError, match="another process works in"), second:
        pass
    with run_folder.held(tmp_path):
        pass


def test_a_lock_of_a_folder_that_was_renamed_meanwhile_holds_nothing(tmp_path, monkeypatch):
    """Else two processes that both overwrite a run would both go on."""
    run, flock = tmp_path / "run", fcntl.flock
    run.mkdir()

    def renamed_first(opened, operation):
        run.rename(tmp_path / "run.old-1")
        run.mkdir()
        flock(opened, operation)

    monkeypatch.setattr(run_folder.fcntl, "flock", renamed_first)
    with pytest.raises(ValueError, match="another process works in"), run_folder.held(run):
        pass


def test_a_run_folder_is_held_on_a_file_system_that_locks_only_what_is_written(
    tmp_path, monkeypatch
):
    """As NFS, which gives an exclusive lock only on what is open for writing."""
    flock = fcntl.flock

    def of_nfs(opened, operation):
        if fcntl.fcntl(opened, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(opened, operation)

    monkeypatch.setattr(run_folder.fcntl, "flock", of_nfs)
    first, second = (run_folder.held(tmp_path) for _ in range(2))
    with first, pytest.raises(ValueError, match="another process works in"), second:
        pass


def test_a_lock_that_cannot_be_written_says_what_to_do(tmp_path):
    (tmp_path / ".lock").mkdir()
    message = (
        r"\.lock cannot be written \(Is a directory\): .*then start again, or give another --out"
    )
    with pytest.raises(run_folder.WriteError, match=message), run_folder.held(tmp_path, "--output"):
        pass


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_cannot_be_written_says_what_to_do(tmp_path, monkeypatch, overwrite):
    """As root every folder is writable, so the system call says it."""
    (tmp_path / "run").mkdir()
    if overwrite:
        (tmp_path / "run" / "1").mkdir()

    def refused(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "rename" if overwrite else "mkdir", refused)
    with pytest.raises(OSError, match=r"run cannot be written \(Permission denied\).*--checkpoint"):
        run_folder.prepare(tmp_path / "run", resume=False, overwrite=overwrite)


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_an_address_is_no_folder_to_write_in(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^gs:/.*bucket/new is an address, .*: give another"):
        run_folder.check_output(kind("gs://bucket/new"), "give another --output")
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_nothing_can_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="/file is a file, expected a folder: move it away"):
        run_folder.prepare(tmp_path / "file" / "run", resume=False, overwrite=False)
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "runs")
    with pytest.raises(FileExistsError, match=r"/runs is a link to nothing \(is its disk mounted"):
        run_folder.check(tmp_path / "runs" / "first", resume=False, overwrite=False)
    with pytest.raises(OSError, match=r"file/run/config.json cannot be written \(Not"):
        run_folder.save_config(tmp_path / "file" / "run", {})


def test_a_config_that_the_disk_has_no_room_for_names_its_file(tmp_path, small_disk):
    with (
        small_disk(10),
        pytest.raises(OSError, match=r"config.json cannot be written \(File too large\): free"),
    ):
        run_folder.save_config(tmp_path, {"seed": 42})
    assert not (tmp_path / "config.json").exists()


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged .*--overwrite"):
        run_folder.compare_config(tmp_path, {})


def test_a_run_that_would_be_saved_unreadable_is_refused(tmp_path):
    folder = tmp_path / "sweep [lr=1e-4]" / "first"
    with pytest.raises(ValueError, match=r"Orbax cannot read .*: 'sweep \[lr=1e-4\]' has"):
        run_folder.prepare(folder, resume=False, overwrite=False)
    assert not folder.parent.exists()


def test_a_text_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "settings.json").mkdir()
    with pytest.raises(run_folder.WriteError, match="cannot be written"):
        run_folder.write_text(tmp_path / "settings.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
