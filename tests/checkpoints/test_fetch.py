"""Addresses to local paths: fetched once, complete or absent, and resumed."""

import base64
import hashlib
import pathlib
import sys
import threading
import types

import filelock
import fsspec
import pytest

from shallow_pi.checkpoints import fetch

FILES = {"params/a": b"0123456789" * 10, "params/empty": b"", "assets/b": b"two"}


class Bucket:
    """fsspec's memory file system, counting the bytes it serves; `break_after` cuts the line."""

    def __init__(self, files=FILES, name="bucket/model", break_after=None, md5=None):
        self.memory = fsspec.filesystem("memory")
        self.memory.pipe({f"/{name}/{path}": content for path, content in files.items()})
        self.served = []
        self.break_after = break_after
        self.md5 = md5 or {}

    def find(self, path, detail):
        found = self.memory.find(path, detail=detail)
        for name, entry in found.items():
            for end, digest in self.md5.items():
                if name.endswith(end):
                    entry["md5Hash"] = digest
        return found

    def cat_file(self, name, start, end):
        if self.break_after is not None and len(self.served) >= self.break_after:
            raise ConnectionError("connection reset")
        self.served.append((name.rpartition("/")[2], start, end))
        return self.memory.cat_file(name, start=start, end=end)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The download folder; the previous test's bucket is emptied, blocks are small."""
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(fetch, "BLOCK", 32)
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    return tmp_path


def _read(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_file_that_git_lfs_has_not_fetched_is_told(tmp_path):
    file = tmp_path / "params" / "d" / "0"
    file.parent.mkdir(parents=True)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for path, named in ((file, "it"), (tmp_path / "params", str(file))):
        assert fetch.lfs_advice(path) == (
            f"; {named} is a Git LFS pointer, not the file: run `git lfs pull`"
        )
    file.write_text("whole")
    assert not fetch.lfs_advice(tmp_path)
    assert not fetch.lfs_advice(tmp_path / "absent")


def test_local_paths_are_left_alone_and_other_addresses_refused(tmp_path):
    assert fetch.locate(tmp_path) == tmp_path
    assert fetch.locate("~/model") == pathlib.Path("~/model").expanduser()
    with pytest.raises(ValueError, match=r"'s3://bucket/model': expected a local path, gs://"):
        fetch.locate("s3://bucket/model")


def test_what_openpi_has_fetched_is_found_without_a_look_at_the_bucket(home):
    (home / "bucket" / "model").mkdir(parents=True)
    assert fetch.locate("gs://bucket/model/", filesystem=object()) == home / "bucket" / "model"


def test_a_folder_or_a_file_is_downloaded_once(home):
    bucket = Bucket()
    folder = fetch.locate("gs://bucket/model", filesystem=bucket)
    assert folder == home / "bucket" / "model"
    assert _read(folder) == FILES
    served = len(bucket.served)
    assert fetch.locate("gs://bucket/model", filesystem=bucket) == folder
    assert len(bucket.served) == served
    other = Bucket(FILES, "bucket/other")
    file = fetch.locate("gs://bucket/other/params/a", filesystem=other)
    assert file.read_bytes() == FILES["params/a"]
    names = {path.name for path in (home / "bucket").rglob("*") if "unfinished" in path.name}
    assert not names


def test_an_interrupted_download_looks_absent_and_resumes(home):
    bucket = Bucket(break_after=3)  # assets/b, then two of the four blocks of params/a
    with pytest.raises(FileNotFoundError, match=r"(?s)connection reset.*model\.unfinished is kept"):
        fetch.locate("gs://bucket/model", filesystem=bucket)
    assert not (home / "bucket" / "model").exists()
    bucket.break_after = None
    del bucket.served[:]
    assert _read(fetch.locate("gs://bucket/model", filesystem=bucket)) == FILES
    assert bucket.served == [("a", 64, 96), ("a", 96, 100)]


def test_half_a_block_is_not_trusted_and_a_file_that_is_too_long_is_fetched_anew(home):
    partial = home / "bucket" / "model.unfinished"
    (partial / "params").mkdir(parents=True)
    (partial / "assets").mkdir()
    (partial / "params" / "a").write_bytes(FILES["params/a"][:40] + bytes(5))
    (partial / "assets" / "b").write_bytes(b"longer than in the bucket")
    (partial / "params" / "gone").write_bytes(b"no longer in the bucket")
    bucket = Bucket()
    assert _read(fetch.locate("gs://bucket/model", filesystem=bucket)) == FILES
    assert ("a", 0, 32) not in bucket.served
    assert ("a", 32, 64) in bucket.served


def test_a_file_that_arrives_damaged_is_removed_and_named(home):
    def md5(content):
        return base64.b64encode(hashlib.md5(content).digest()).decode()

    wrong = Bucket(md5={"params/a": md5(b"something else")})
    with pytest.raises(FileNotFoundError, match="a arrived damaged"):
        fetch.locate("gs://bucket/model", filesystem=wrong)
    assert not (home / "bucket" / "model.unfinished" / "params" / "a").exists()
    right = Bucket(md5={"params/a": md5(FILES["params/a"])})
    assert _read(fetch.locate("gs://bucket/model", filesystem=right)) == FILES


def test_an_answer_that_is_too_short_is_an_error(home, monkeypatch):
    bucket = Bucket()
    monkeypatch.setattr(bucket, "cat_file", lambda name, start, end: b"x")
    with pytest.raises(FileNotFoundError, match=r"ended at byte 1 of"):
        fetch.locate("gs://bucket/model", filesystem=bucket)


def test_two_processes_fetch_it_once(home):
    """The second waits for the first and takes what it left."""
    lock = filelock.FileLock(home / "bucket" / "model.lock")
    (home / "bucket").mkdir()
    bucket, found = Bucket(), []
    with lock:
        second = threading.Thread(
            target=lambda: found.append(fetch.locate("gs://bucket/model", filesystem=bucket))
        )
        second.start()
        second.join(timeout=0.5)
        assert second.is_alive()
        assert not bucket.served
        (home / "bucket" / "model").mkdir()
    second.join(timeout=30)
    assert found == [home / "bucket" / "model"]
    assert not bucket.served


def test_an_empty_address_of_a_bucket_is_an_error(home):
    with pytest.raises(FileNotFoundError, match="gs://bucket/nowhere holds no files"):
        fetch.locate("gs://bucket/nowhere", filesystem=Bucket())


def test_without_gcsfs_or_network_it_says_what_to_do_by_hand(home, monkeypatch):
    def no_gcsfs(protocol, **_):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", no_gcsfs)
    by_hand = (
        r"(?s)install gcsfs.*uv sync --extra gcs.*gsutil cp -r gs://b/pi0_base .*put it at .*b/pi"
    )
    with pytest.raises(FileNotFoundError, match=by_hand):
        fetch.locate("gs://b/pi0_base")


def test_where_nothing_can_be_written_it_names_the_folder(home, monkeypatch):
    (home / "file").write_text("in the way")
    monkeypatch.setenv("OPENPI_DATA_HOME", str(home / "file"))
    with pytest.raises(OSError, match=r"cannot write .*file/bucket/model.*OPENPI_DATA_HOME"):
        fetch.locate("gs://bucket/model", filesystem=Bucket())


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for huggingface_hub: a snapshot with one folder, and the calls it got."""
    calls = []
    (tmp_path / "snapshot" / "30000").mkdir(parents=True)

    def snapshot_download(repo, revision, allow_patterns):
        calls.append((repo, revision, allow_patterns))
        if repo == "owner/absent":
            raise ConnectionError("no route to host")
        return str(tmp_path / "snapshot")

    module = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_an_address_on_the_hub_is_a_snapshots_folder(hub, tmp_path):
    assert fetch.locate("hf://owner/repo") == tmp_path / "snapshot"
    assert fetch.locate("hf://owner/repo@v1.0/30000") == tmp_path / "snapshot" / "30000"
    patterns = ["30000", "30000/*"]
    assert hub == [("owner/repo", None, None), ("owner/repo", "v1.0", patterns)]


def test_a_hub_that_cannot_be_reached_says_what_to_do_by_hand(hub):
    by_hand = (
        r"(?s)no route to host.*HF_HOME.*hf download owner/absent --include 'a' 'a/\*'.*give DIR/a"
    )
    with pytest.raises(FileNotFoundError, match=by_hand):
        fetch.locate("hf://owner/absent/a")
    with pytest.raises(FileNotFoundError, match="owner/repo has no '7'"):
        fetch.locate("hf://owner/repo/7")
    with pytest.raises(
        ValueError, match=r"'hf://owner' is no address.*expected hf://<owner>/<repo"
    ):
        fetch.locate("hf://owner")


def test_without_huggingface_hub_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"uv sync --extra hf"):
        fetch.locate("hf://owner/repo")


def test_a_part_is_not_taken_for_the_whole(home):
    """Statistics fetched alone, then the checkpoint they belong to."""
    part = fetch.locate("gs://bucket/model/assets", filesystem=Bucket())
    assert _read(part) == {"b": b"two"}
    assert fetch.kept("gs://bucket/model/assets") == part
    assert fetch.kept("gs://bucket/model") is None
    (home / "bucket" / "model.part" / "left").mkdir(parents=True)  # By a process that was killed.
    bucket = Bucket()
    whole = fetch.locate("gs://bucket/model", filesystem=bucket)
    assert _read(whole) == FILES
    # What was there is not fetched again, and nothing is left beside it.
    assert "b" not in {name for name, _, _ in bucket.served}
    assert [path.name for path in (home / "bucket").iterdir() if path.suffix != ".lock"] == [
        "model"
    ]
    assert fetch.kept("gs://bucket/model") == whole
    assert fetch.locate("gs://bucket/model", filesystem=object()) == whole


def test_what_is_on_this_machine_is_found_without_fetching(home, tmp_path):
    assert fetch.kept(tmp_path) == tmp_path
    assert fetch.kept(tmp_path / "no") is None
    assert fetch.kept("gs://bucket/other") is None
    assert fetch.kept("hf://lerobot/pi05_base") is None
