"""Save, restore and resume are the identity; a failed save costs nothing that was there before."""

import errno
import json
import shutil
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from shallow_pi import progress
from shallow_pi.checkpoints import weights
from shallow_pi.parallel import sharding
from shallow_pi.training import checkpoint, optimizer


@flax.struct.dataclass
class State:
    step: object
    params: object
    opt_state: object
    ema_params: object = None


TRANSFORM = optimizer.AdamW().create(
    optimizer.CosineSchedule(warmup_steps=2, peak_lr=0.1, decay_steps=9).create()
)


def _init(ema=True):
    key = jax.random.key(0)
    params = {
        "PaliGemma": {"llm": {"layers": {"mlp": {"linear": jax.random.normal(key, (2, 16, 8))}}}},
        "norm": {"scale": jax.random.normal(key, (8,))},
    }
    # A copy: the step donates the state, and no buffer can be donated twice.
    average = jax.tree.map(jnp.copy, params) if ema else None
    return State(jnp.int32(0), params, TRANSFORM.init(params), average)


def _mlp(params):
    return params["PaliGemma"]["llm"]["layers"]["mlp"]


def _shardings(config):
    mesh = config.create()
    return sharding.param_sharding(mesh, jax.eval_shape(_init))


def _sharded_init(config):
    return jax.jit(_init, out_shardings=_shardings(config))()


def _abstract(config):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(_init),
        _shardings(config),
    )


def _step(state):
    # As in training: the state is donated and comes out as it went in (another layout rounds
    # otherwise).
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(_update, out_shardings=shardings, donate_argnums=0)(state)


def _update(state):
    def loss(params):
        x = jax.random.normal(jax.random.fold_in(jax.random.key(1), state.step), (4, 16))
        return jnp.mean((x @ _mlp(params)["linear"][0] * params["norm"]["scale"]) ** 2)

    updates, opt_state = TRANSFORM.update(
        jax.grad(loss)(state.params), state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state.ema_params, params)
    return State(state.step + 1, params, opt_state, ema)


def _assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def _assets(folder):
    (folder / "turntable").mkdir()
    (folder / "turntable" / "norm_stats.json").write_text('{"norm_stats": {}}')


def _nothing(folder):
    del folder


MESH = sharding.MeshConfig(fsdp=2, tensor=2)
OTHER_MESH = sharding.MeshConfig(fsdp=8)


def test_two_steps_and_two_resumed_steps_equal_four(tmp_path):
    state = _sharded_init(MESH)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        for _ in range(2):
            state = _step(state)
        before = jax.tree.map(np.array, state)
        assert checkpoints.save(2, state, {"position": [2, "a"]}, _assets)
        straight = _step(_step(state))  # While the save goes on: it must not see this.
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        resumed, data_state = checkpoints.restore(_abstract(MESH))
    assert data_state == {"position": [2, "a"]}
    _assert_same(resumed, before)
    _assert_same(_step(_step(resumed)), straight)


def test_a_state_is_restored_to_another_mesh(tmp_path):
    state = _sharded_init(MESH)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, None, _nothing)
        checkpoints.wait()
        restored, data_state = checkpoints.restore(_abstract(OTHER_MESH))
    assert data_state is None
    _assert_same(restored, state)
    linear = _mlp(restored.opt_state[1][0].mu)["linear"]
    assert linear.sharding.is_equivalent_to(_mlp(_shardings(OTHER_MESH).params)["linear"], 3)
    assert linear.addressable_shards[0].data.shape == (2, 16, 1)


def test_a_save_compiles_nothing_and_reads_what_every_device_wrote(tmp_path, caplog):
    state = _sharded_init(MESH)  # Its arrays are replicated over two devices or all eight.
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        with jax.log_compiles():
            checkpoints.save(1, state, None, _nothing)
            checkpoints.wait()
        assert "XLA compilation" not in caplog.text
        shutil.rmtree(tmp_path / "1" / "train_state")
        _, rest = checkpoints._split(state)
        with ocp.PyTreeCheckpointer() as checkpointer:  # As several processes write it.
            checkpointer.save(tmp_path / "1" / "train_state", rest)
        _assert_same(checkpoints.restore(_abstract(MESH))[0], state)


@pytest.mark.parametrize("ema", [True, False])
def test_a_step_folder_is_deployable_and_holds_nothing_twice(tmp_path, ema):
    state = _init(ema).replace(step=jnp.int32(7))
    if ema:
        state = state.replace(ema_params=jax.tree.map(lambda x: x + 1, state.params))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, None, _assets)
    deployed = state.ema_params if ema else state.params
    _assert_same(weights.load_params(tmp_path / "7", jax.eval_shape(lambda: deployed)), deployed)
    assert json.loads((tmp_path / "7/assets/turntable/norm_stats.json").read_text()) == {
        "norm_stats": {}
    }
    stored = weights.leaves(weights.stored_shapes(tmp_path / "7" / "train_state"))
    assert "opt_state/1/0/mu/PaliGemma/llm/layers/mlp/linear" in stored
    assert ("params/PaliGemma/llm/layers/mlp/linear" in stored) == ema
    assert not any(path.startswith("ema_params") for path in stored)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(state)
    _assert_same(restored, state)


def test_saving_keeps_what_it_was_told_to(tmp_path):
    state = _init(ema=False)
    with checkpoint.Checkpoints(tmp_path, keep=2, keep_period=4) as checkpoints:
        for step in (2, 4, 6, 8, 9):
            assert checkpoints.save(step, state, None, _nothing)
        assert not checkpoints.save(9, state, None, _nothing)
    assert sorted(int(child.name) for child in tmp_path.iterdir()) == [4, 8, 9]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Steps 1, the best, and 2."""
    folder, state = tmp_path_factory.mktemp("two"), _init(ema=False)
    with checkpoint.Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(1, state, "one", _nothing, error=0.1)
        checkpoints.save(2, state, "two", _nothing, error=0.3)
    return folder, state


@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled"])
def test_a_damaged_old_step_stops_no_resume(two_steps, tmp_path, order, capsys):
    """Its entries go one at a time, as in a deletion that was killed."""
    source, state = two_steps
    folder = shutil.copytree(source, tmp_path / "run", symlinks=True)
    old = sorted((folder / "1").rglob("*"))
    if order == "shuffled":
        np.random.default_rng(0).shuffle(old)
    for path in old[::-1] if order == "backwards" else old:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        with checkpoint.Checkpoints(folder) as checkpoints:
            assert checkpoints.restore(state)[1] == "two"
            whole = all((folder / "1" / part).exists() for part in checkpoint._PARTS)
            assert checkpoints.best == ((1, 0.1) if whole else (2, 0.3))
    assert f"warning: {folder}/1 is damaged and left alone (it lacks params" in (
        capsys.readouterr().err
    )


def test_a_step_is_never_seen_half_deleted(two_steps, tmp_path, monkeypatch):
    """A kill after any number of removals leaves a folder that the next start removes."""
    source, _ = two_steps
    folder = shutil.copytree(source, tmp_path / "run", symlinks=True)

    class Killed(BaseException):
        pass

    def killed(path):
        next(entry for entry in path.rglob("*") if entry.is_file()).unlink()
        raise Killed

    checkpoints = checkpoint.Checkpoints(folder)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            checkpoint._delete(folder / "1")
    checkpoints.close()
    assert len(list(folder.glob("1.orbax*"))) == 1
    with checkpoint.Checkpoints(folder) as checkpoints:
        assert checkpoints.best == (2, 0.3)
    assert [path.name for path in folder.glob("[0-9]*")] == ["2"]


def test_a_step_whose_data_cannot_be_read_is_not_the_best(two_steps, tmp_path, capsys):
    folder = shutil.copytree(two_steps[0], tmp_path / "run", symlinks=True)
    (folder / "1" / "data" / "metadata").write_text("{")
    with checkpoint.Checkpoints(folder) as checkpoints:
        assert checkpoints.best == (2, 0.3)
        checkpoints.save(3, two_steps[1], None, _nothing, error=0.2)
    # Its parameters may be whole, and the best.
    assert [path.name for path in sorted(folder.glob("[0-9]*"))] == ["1", "3"]
    assert f"warning: {folder}/1 is damaged and left alone (JSON" in capsys.readouterr().err


def test_the_best_step_stays_and_is_pointed_to(tmp_path):
    state = _init(ema=False)
    errors = {1: 0.5, 2: 0.2, 3: None, 4: 0.3, 5: float("nan"), 6: 0.2}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        for step, error in errors.items():
            assert checkpoints.is_best(error) == (step in (1, 2))
            checkpoints.save(step, state, None, _nothing, error=error)
    assert checkpoints.best == (2, 0.2)
    assert [step for step in range(9) if (tmp_path / str(step)).exists()] == [2, 6]
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 2, "error": 0.2}
    assert (tmp_path / "best").resolve() == tmp_path / "2"
    assert checkpoints.best_path == tmp_path / "best"
    deployed = weights.load_params(tmp_path / "best", jax.eval_shape(lambda: state.params))
    _assert_same(deployed, state.params)


@pytest.mark.parametrize("strict", [False, True])
def test_where_no_link_can_be_made_the_file_names_the_best_step(
    tmp_path, capsys, monkeypatch, strict
):
    """Also in a run whose warnings are errors (--strict)."""
    monkeypatch.setattr(progress, "_strict", strict)
    (tmp_path / "best.partial").mkdir()  # In the way of the link.
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _init(ema=False), None, _nothing, error=0.5)
        checkpoints.save(2, _init(ema=False), None, _nothing, error=0.2)
    assert checkpoints.best_path == tmp_path / "best.json"
    assert json.loads(checkpoints.best_path.read_text())["step"] == 2
    assert capsys.readouterr().err.count(f"warning: {tmp_path / 'best'} cannot be linked") == 1


def test_a_resumed_run_knows_the_best_step_from_the_steps_themselves(tmp_path):
    """Also where it was killed before anything pointed to that step."""
    state = _init(ema=False)
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, state, None, _nothing, error=0.5)
        checkpoints.save(2, state, None, _nothing, error=0.1)
    (tmp_path / "best.json").unlink()
    (tmp_path / "best").unlink()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best == (2, 0.1)
        assert (tmp_path / "best").resolve() == tmp_path / "2", "also if nothing more is saved"
        assert json.loads((tmp_path / "best.json").read_text())["step"] == 2
        assert not checkpoints.is_best(0.4)
        checkpoints.save(3, state, None, _nothing, error=0.4)
        checkpoints.save(4, state, None, _nothing, error=0.05)
        checkpoints.save(5, state, None, _nothing)
    assert {int(child.name) for child in tmp_path.iterdir() if child.name.isdigit()} == {4, 5}
    assert (tmp_path / "best").resolve() == tmp_path / "4"


def test_a_step_saved_without_an_error_is_never_the_best(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _init(ema=False), None, _nothing)
    assert checkpoints.best is None
    assert [child.name for child in tmp_path.iterdir()] == ["1"]


def test_a_disk_that_fills_up_while_assets_are_written_costs_only_that_step(tmp_path):
    def full(folder):
        (folder / "norm_stats.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    state = _init()
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, state, {"position": 1}, _assets)
    with pytest.raises(
        checkpoint.SaveError, match=r"/2 could not .*No space left.*step 1 is intact.*--resume"
    ):
        checkpoints.save(2, state, None, full)
    assert checkpoints.latest_step() == 1
    _assert_same(checkpoints.restore(state)[0], state)
    checkpoints.close()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert [child.name for child in tmp_path.iterdir()] == ["1"]
        assert checkpoints.restore(state)[1] == {"position": 1}
        assert checkpoints.save(2, state, None, _assets)


def test_a_disk_that_fills_up_in_the_background_costs_only_that_step(
    tmp_path, small_disk, capfd, caplog
):
    """In TensorStore's threads too; Orbax's tracebacks do not bury the one line."""
    small = _init(ema=False)
    # Noise does not compress: the file must exceed the limit.
    noise = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    large = small.replace(params={"noise": jnp.asarray(noise)})
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, small, None, _assets)
    checkpoints.wait()
    with small_disk(1 << 16):
        checkpoints.save(2, large, None, _assets)
        with pytest.raises(checkpoint.SaveError) as error:
            checkpoints.wait()
    assert str(error.value) == (
        f"checkpoint {tmp_path}/2 could not be written (File too large); step 1 is intact. Free "
        "space there or make it writable, then go on with --resume"
    )
    assert checkpoints.latest_step() == 1
    _assert_same(checkpoints.restore(small)[0], small)
    checkpoints.close()
    assert "Traceback" not in capfd.readouterr().err + caplog.text
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert [child.name for child in tmp_path.iterdir()] == ["1"]


def _poll(checkpoints):
    """As the steps of a run do, until the save in the background has ended."""
    while checkpoints._unsettled:
        checkpoints.poll()
        time.sleep(0.01)


def test_a_save_in_the_background_is_settled_or_its_error_raised_once_it_has_ended(
    two_steps, tmp_path, small_disk
):
    folder = shutil.copytree(two_steps[0], tmp_path / "run", symlinks=True)
    with checkpoint.Checkpoints(folder) as checkpoints:
        checkpoints.save(3, two_steps[1], None, _nothing, error=0.01)
        _poll(checkpoints)
        assert (folder / "best").resolve() == folder / "3"
        noise = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
        large = two_steps[1].replace(params={"noise": jnp.asarray(noise)})
        with small_disk(1 << 16):
            checkpoints.save(4, large, None, _nothing)
            with pytest.raises(checkpoint.SaveError, match=r"/4 .*step 3 is intact"):
                _poll(checkpoints)


def test_what_a_failed_save_still_writes_is_removed_too(tmp_path, monkeypatch):
    unfinished = tmp_path / "3.orbax-checkpoint-tmp-1"
    unfinished.mkdir()
    calls, rmtree = [], shutil.rmtree

    def busy(folder):
        calls.append(folder)
        if len(calls) < 3:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))
        rmtree(folder)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    with checkpoint.Checkpoints(tmp_path):
        assert len(calls) == 3
        assert not unfinished.exists()


def test_an_old_step_that_cannot_be_deleted_costs_no_run(two_steps, tmp_path, monkeypatch, capsys):
    """NFS keeps files that somebody has open, such as a policy server."""
    folder = shutil.copytree(two_steps[0], tmp_path / "run", symlinks=True)

    def busy(folder):
        raise OSError(errno.EBUSY, "Device or resource busy", str(folder))

    with monkeypatch.context() as patch, checkpoint.Checkpoints(folder) as checkpoints:
        patch.setattr(checkpoint.shutil, "rmtree", busy)
        checkpoints.save(3, two_steps[1], None, _nothing)
    left = folder / "2.orbax-checkpoint-tmp-superseded"
    assert left.is_dir()
    said = capsys.readouterr().err
    assert f"warning: {left} is not needed and cannot be deleted (Device or resource busy)" in said
    with checkpoint.Checkpoints(folder) as checkpoints:
        assert checkpoints.latest_step() == 3
    assert not left.exists()


def test_the_best_step_of_a_job_is_the_one_that_process_0_sees(two_steps, tmp_path, monkeypatch):
    """Else one process would save a step, and wait for another that does not."""
    folder = shutil.copytree(two_steps[0], tmp_path / "run", symlinks=True)
    monkeypatch.setattr(checkpoint.processes, "gather", lambda value: [[2, 0.05], value])
    with checkpoint.Checkpoints(folder) as checkpoints:
        assert checkpoints.best == (2, 0.05)
        assert not checkpoints.is_best(0.07)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(checkpoint.SaveError, match="file/run cannot hold checkpoints"):
        checkpoint.Checkpoints(tmp_path / "file" / "run")


def test_a_state_of_another_shape_names_its_paths(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, _init(), None, _nothing)
        checkpoints.wait()
        other = jax.eval_shape(_init)
        _mlp(other.params)["linear"] = jax.ShapeDtypeStruct((6, 16, 8), jnp.float32)
        with pytest.raises(
            ValueError,
            match=r"3/train_state.*\n.*params/PaliGemma/llm/layers/mlp/linear: expected \(6,",
        ):
            checkpoints.restore(other)


def test_a_checkpoint_that_is_absent_lists_those_there_are(tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(FileNotFoundError, match=r"complete steps: none"):
            checkpoints.restore(_init())
        checkpoints.save(3, _init(), None, _nothing)
        checkpoints.wait()
        with pytest.raises(FileNotFoundError, match=r"no checkpoint 4 \(complete steps: 3\)"):
            checkpoints.restore(_init(), step=4)


@pytest.mark.parametrize("lost", ["", "params/manifest.ocdbt", "data/metadata"])
def test_a_damaged_last_step_names_the_step_before_it(two_steps, tmp_path, lost):
    source, state = two_steps
    folder = shutil.copytree(source, tmp_path / "run", symlinks=True)
    for path in [folder / "2" / lost] if lost else list((folder / "2").iterdir()):
        (shutil.rmtree if path.is_dir() else type(path).unlink)(path)
    advice = rf"step 2 is damaged .*move {folder}/2 elsewhere, and --resume goes on from step 1"
    with (
        checkpoint.Checkpoints(folder) as checkpoints,
        pytest.raises(ValueError, match=advice),
    ):
        checkpoints.restore(state)
    shutil.move(folder / "2", tmp_path / "elsewhere")
    with checkpoint.Checkpoints(folder) as checkpoints:
        assert checkpoints.restore(state)[1] == "one"


def test_a_bad_number_of_checkpoints_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="keep must be 1 or more, got 0"):
        checkpoint.Checkpoints(tmp_path, keep=0)
