"""The order of samples is a function of the seed: shards, prefetch and resume cannot change it."""

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import jax
import numpy as np
import pytest

from shallow_pi.data import loader, sources
from shallow_pi.models import pi0

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "lerobot"


class Numbers:
    """A source whose sample `i` says which it is, and which counts how often it is read."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.reads = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        self.reads += 1
        return {"index": np.int32(i), "vector": {"x": np.full(3, i, np.float32)}}


def _indices(batches, count: int) -> list[list[int]]:
    return [batch["index"].tolist() for batch in itertools.islice(batches, count)]


def test_every_epoch_shows_each_sample_once_in_another_order() -> None:
    order = list(itertools.chain(*_indices(loader.Loader(Numbers(12), 4, seed=1), 6)))
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12))
    assert order[:12] != order[12:]
    assert order[:12] != list(range(12))


def test_same_seed_same_batches_other_seed_other_batches() -> None:
    first, again, other = (
        _indices(loader.Loader(Numbers(50), 8, seed=seed, num_threads=threads), 10)
        for seed, threads in ((3, 0), (3, 4), (4, 0))
    )
    assert first == again
    assert first != other


def test_batches_stack_nested_samples() -> None:
    batch = next(loader.Loader(Numbers(10), 4))
    assert batch["vector"]["x"].shape == (4, 3)
    np.testing.assert_array_equal(batch["vector"]["x"][:, 0], batch["index"])


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("consumed", [0, 1, 5])
def test_restore_continues_with_the_very_next_batch(threads: int, consumed: int) -> None:
    source = sources.Cached(Numbers(20))
    straight = loader.Loader(source, 6, seed=7, num_threads=threads)
    _indices(straight, consumed)
    state = json.loads(json.dumps(straight.state()))
    expected = _indices(straight, 8)
    resumed = loader.Loader(source, 6, seed=7, num_threads=threads)
    resumed.restore(state)
    assert _indices(resumed, 8) == expected
    straight.restore(state)
    assert _indices(straight, 8) == expected


def test_processes_share_each_global_batch_disjointly() -> None:
    whole = _indices(loader.Loader(Numbers(24), 8, process_index=0, process_count=1), 6)
    shards = [
        _indices(loader.Loader(Numbers(24), 8, process_index=p, process_count=2), 6) for p in (0, 1)
    ]
    for k, batch in enumerate(whole):
        assert len(shards[0][k]) == len(shards[1][k]) == 4
        assert not set(shards[0][k]) & set(shards[1][k])
        assert sorted(shards[0][k] + shards[1][k]) == sorted(batch)
    epoch = itertools.chain(*shards[0][:3], *shards[1][:3])
    assert sorted(epoch) == list(range(24))


def test_resume_on_another_number_of_processes_sees_the_same_global_batch() -> None:
    one = loader.Loader(Numbers(24), 8, process_index=0, process_count=1)
    _indices(one, 4)
    state, expected = one.state(), _indices(one, 1)[0]
    seen = []
    for process in range(4):
        part = loader.Loader(Numbers(24), 8, process_index=process, process_count=4)
        part.restore(state)
        seen += _indices(part, 1)[0]
    assert sorted(seen) == sorted(expected)


def test_prefetch_state_counts_what_was_handed_out() -> None:
    sharding = jax.sharding.NamedSharding(
        jax.sharding.Mesh(np.array(jax.devices()), ("data",)), jax.sharding.PartitionSpec("data")
    )
    source = Numbers(40)
    expected = _indices(loader.Loader(source, 8, seed=5), 8)
    ahead = loader.Prefetch(loader.Loader(source, 8, seed=5), sharding, depth=3)
    start = ahead.state()
    assert _indices(ahead, 4) == expected[:4]
    batch = next(ahead)
    assert batch["vector"]["x"].sharding.is_equivalent_to(sharding, 2)
    assert batch["index"].shape == (8,)
    state = ahead.state()
    resumed = loader.Loader(source, 8, seed=5)
    resumed.restore(state)
    assert _indices(resumed, 3) == expected[5:8]
    _indices(ahead, 2)
    ahead.restore(state)
    assert _indices(ahead, 3) == expected[5:8]
    ahead.restore(start)
    assert _indices(ahead, 8) == expected


def test_errors_of_the_source_reach_the_caller() -> None:
    class Broken(Numbers):
        def __getitem__(self, i: int) -> dict:
            raise ValueError(f"cannot decode sample {i} in {threading.current_thread().name}")

    with pytest.raises(ValueError, match="cannot decode sample"):
        next(loader.Loader(Broken(5), 2, num_threads=2))


def test_bad_input_raises() -> None:
    with pytest.raises(
        ValueError, match="--batch-size 6 must be a positive multiple of the 4 proc"
    ):
        loader.Loader(Numbers(20), 6, process_index=0, process_count=4)
    with pytest.raises(ValueError, match="the data source is empty"):
        loader.Loader(Numbers(0), 4)
    state = loader.Loader(Numbers(20), 4, seed=1).state()
    with pytest.raises(ValueError, match=r"differ in \{'seed': \(1, 2\)\}"):
        loader.Loader(Numbers(20), 4, seed=2).restore(state)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ValueError, match="prefetch depth must be at least 1"):
        loader.Prefetch(loader.Loader(Numbers(20), 4), device, depth=0)


def _worker_loader(workers: int, threads: int = 0, **changes) -> loader.Loader:
    model = pi0.Pi0Config(image_size=14, action_dim=3, action_horizon=2, max_token_len=4)
    source = sources.SyntheticSource(model, length=20)
    return loader.Loader(source, 4, seed=3, num_workers=workers, num_threads=threads, **changes)


def _states(batches, count: int) -> np.ndarray:
    return np.stack([batch.observation.state for batch in itertools.islice(batches, count)])


def test_workers_give_the_same_batches_and_positions_as_threads() -> None:
    expected = _states(_worker_loader(0), 12)
    threads = _worker_loader(0, threads=2)
    _states(threads, 3)
    with contextlib.closing(_worker_loader(2)) as workers:
        workers.restore(json.loads(json.dumps(threads.state())))
        np.testing.assert_array_equal(_states(workers, 5), expected[3:8])
        assert multiprocessing.active_children(), "read by processes"
        state = json.loads(json.dumps(workers.state()))
    assert not multiprocessing.active_children(), "closed"
    threads.restore(state)
    np.testing.assert_array_equal(_states(threads, 4), expected[8:])


SCRIPT = """
import os, signal, sys, time
from shallow_pi.data import loader, sources
from shallow_pi.models import pi0

def main():
    source = sources.SyntheticSource(pi0.Pi0Config(cameras=("base_0_rgb",), image_size=14))
    batches = loader.Loader(source, 4, num_workers=1)
    next(batches)
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        for _ in range(5):
            next(batches)
        print("went on", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    main()
"""


class Deadly(Numbers):
    """Ends its process as the kernel does where shared memory is full."""

    def __getitem__(self, i: int) -> dict:
        os.kill(os.getpid(), signal.SIGBUS)
        return super().__getitem__(i)


def test_a_worker_that_finds_no_shared_memory_is_told_as_such(monkeypatch) -> None:
    batches = loader.Loader(Deadly(20), 4, num_workers=1)
    with pytest.raises(
        OSError, match=r"/dev/shm, .* is full: .*--shm-size .*num-workers 0\)"
    ) as got:
        next(batches)
    for error, message in (
        (OSError(errno.ENOSPC, "no space"), "/dev/shm"),
        (RuntimeError(str(got.value.__cause__).replace("-7", "-9")), "a worker was killed, as if"),
        (OSError(errno.EIO, "disk"), "disk"),
    ):
        failing = mock.MagicMock(__next__=mock.Mock(side_effect=error))
        monkeypatch.setattr(batches, "_iterator", failing)
        with pytest.raises(OSError, match=message):
            next(batches)


def _children(pid: int) -> set[int]:
    found = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child) for child in found}


def _runs(pid: int) -> bool:
    """True if a process exists and has not ended."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_workers_of_a_script_outlive_ctrl_c_but_not_the_script(tmp_path) -> None:
    """Ctrl-C reaches the whole group; a script that is killed cannot clean up."""
    (tmp_path / "script.py").write_text(SCRIPT)
    script = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with script:
        assert script.stdout.readline() == "ready\n"
        workers = _children(script.pid)
        assert workers
        os.killpg(script.pid, signal.SIGINT)
        assert script.stdout.readline() == "went on\n"
        script.kill()
    deadline = time.monotonic() + 10
    while (left := [pid for pid in workers if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


class Parts(Numbers):
    """Sources of 6, 3 and 9 samples, drawn as 2 to 1 to 1."""

    def __init__(self, weights=(2, 1, 1)) -> None:
        super().__init__(18)
        self.shares = list(zip((6, 3, 9), weights, strict=True))


def _part(i: int) -> int:
    return 0 if i < 6 else 1 if i < 9 else 2


def test_a_mixture_is_drawn_in_its_shares_and_every_part_shuffled_by_epochs() -> None:
    stream = list(itertools.chain(*_indices(loader.Loader(Parts(), 4, seed=1), 27)))
    for k in range(0, 108, 4):
        assert sorted(map(_part, stream[k : k + 4])) == [0, 0, 1, 2]
    for part, samples in enumerate((range(6), range(6, 9), range(9, 18))):
        own = [i for i in stream if _part(i) == part]
        epochs = [own[k : k + len(samples)] for k in range(0, len(own), len(samples))]
        whole = [epoch for epoch in epochs if len(epoch) == len(samples)]
        assert all(sorted(epoch) == list(samples) for epoch in whole)
        assert len(set(map(tuple, whole))) > 1, "another order in every epoch"


@pytest.mark.parametrize(
    ("weights", "expected"),
    [((0.7, 0.2, 0.1), (7, 2, 1)), ((1 / 3, 1 / 3, 1 / 3), (1, 1, 1)), ((3, 7.5, 1.5), (2, 5, 1))],
)
def test_shares_are_exact_for_any_weights(weights, expected) -> None:
    stream = loader.order(Parts(weights).shares, seed=0)
    period = sum(expected)
    counts = np.bincount([_part(stream[k]) for k in range(5 * period)])
    np.testing.assert_array_equal(counts, 5 * np.array(expected))


def test_a_mixture_resumes_and_is_shared_by_processes() -> None:
    whole = _indices(loader.Loader(Parts(), 8, seed=2), 12)
    shards = [
        _indices(loader.Loader(Parts(), 8, seed=2, process_index=p, process_count=4), 12)
        for p in range(4)
    ]
    for k, batch in enumerate(whole):
        assert sorted(itertools.chain(*(shard[k] for shard in shards))) == sorted(batch)
    first = loader.Loader(Parts(), 8, seed=2)
    _indices(first, 5)
    resumed = loader.Loader(Parts(), 8, seed=2, num_threads=0)
    resumed.restore(json.loads(json.dumps(first.state())))
    assert _indices(resumed, 7) == whole[5:]
    with pytest.raises(ValueError, match=r"differ in \{'weights': \(\[2, 1, 1\], \[1, 1, 1\]\)"):
        loader.Loader(Parts((1, 1, 1)), 8, seed=2).restore(first.state())


def test_workers_and_a_memory_cache_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"2 workers would each fill .*--data.cache disk"):
        loader.Loader(sources.Cached(Numbers(20)), 4, num_workers=2)
