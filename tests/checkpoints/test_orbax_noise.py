"""Tracebacks of a failed read are dropped, those of anything else are not."""

import gc
import logging
import shutil
import sys
import types

import jax
import pytest

from shallow_pi.checkpoints import orbax_noise, weights


@pytest.fixture
def reported(monkeypatch):
    """The errors that reach the hook of before; nothing is silenced yet."""
    found = []
    monkeypatch.setattr(sys, "unraisablehook", found.append)
    for name in ("absl", "asyncio"):
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    return found


def test_a_checkpoint_whose_files_are_all_cut_short_prints_nothing(
    reported, tmp_path, caplog, capfd
):
    tree = {str(i): jax.numpy.arange(4000.0) + i for i in range(16)}
    weights.save_params(tmp_path / "whole", tree)
    sys.unraisablehook = reported.append
    logging.getLogger("asyncio").filters.clear()
    gc.freeze()  # What other tests have left takes seconds to go through.
    for attempt in range(5):  # Which tasks are dropped depends on the order of threads.
        folder = tmp_path / f"{attempt}" / "params"
        shutil.copytree(tmp_path / "whole", folder)
        for file in folder.glob("**/d/*"):
            file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(ValueError, match="could not be read"):
            weights.load_params(folder, jax.eval_shape(lambda: tree))
        gc.collect()
    gc.unfreeze()
    assert (reported, caplog.records, capfd.readouterr().err) == ([], [], "")


async def _ours() -> None: ...


def test_errors_of_others_are_still_reported(reported, caplog):
    orbax_noise.silence()
    coroutine = _ours()
    for owner, error in ((coroutine, ValueError("x")), (None, RuntimeError("y"))):
        sys.unraisablehook(types.SimpleNamespace(object=owner, exc_value=error))
    coroutine.close()
    logging.getLogger("asyncio").error("Task exception was never retrieved\nfuture: ours.py")
    assert [str(found.exc_value) for found in reported] == ["x", "y"]
    assert len(caplog.records) == 1


def test_a_closed_event_loop_and_orbaxs_tasks_are_not(reported, caplog):
    orbax_noise.silence()
    sys.unraisablehook(
        types.SimpleNamespace(object=None, exc_value=RuntimeError("Event loop is closed"))
    )
    for left in (
        "<Task coro=<_load() defined at /lib/orbax/checkpoint/x.py:3>>",
        "<Task coro=<_wrap_awaitable()> exception=ValueError('OUT_OF_RANGE [tensorstore={}]')>",
        "<Future finished exception=ValueError('NOT_FOUND [tensorstore_spec={}]')>",
    ):
        logging.getLogger("asyncio").error("Task exception was never retrieved\nfuture: %s", left)
    path, said = "/lib/orbax/checkpoint/checkpoint_manager.py", "File /run/7/metrics not found."
    logging.getLogger("absl").handle(logging.LogRecord("absl", 40, path, 1, said, (), None))
    assert not reported
    assert not caplog.records
