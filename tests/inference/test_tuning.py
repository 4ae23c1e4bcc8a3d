"""A tuning result is found again for the same model, device and JAX, and for no other."""

import dataclasses
import json

import jax
import pytest

from shallow_pi.inference import tuning

CHOICE = dataclasses.replace(tuning.ALL_ON, unrolled_steps=False, fused=False)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SHALLOW_PI_CACHE", str(tmp_path))
    return tmp_path / "tuning"


def test_what_is_stored_is_the_best(tiny_config, folder):
    config = tiny_config()
    assert tuning.load(config) is None
    assert tuning.best(config) == tuning.default() != CHOICE
    file = tuning.store(config, CHOICE, {"loops": 2.0, "written out": 1.0})
    assert tuning.best(config) == CHOICE
    assert list(folder.iterdir()) == [file]
    assert json.loads(file.read_text())["milliseconds"] == {"loops": 2.0, "written out": 1.0}
    assert tuning.fastest_scheme(config) is None
    tuning.store(config, CHOICE, {}, "none")
    assert tuning.fastest_scheme(config) == "none"


def test_it_holds_for_the_sizes_whatever_is_seen(tiny_config):
    config = tiny_config()
    tuning.store(config, CHOICE, {})
    seen = dataclasses.replace(config, cameras=config.cameras[:1], max_token_len=3)
    assert tuning.load(seen) == CHOICE
    for change in ({"depth": 2}, {"pi05": True}, {"dtype": "bfloat16"}, {"action_horizon": 4}):
        assert tuning.load(dataclasses.replace(config, **change)) is None


def test_it_holds_for_a_pi05_with_and_without_its_state_in_the_prompt(tiny_config):
    config = tiny_config(pi05=True)
    tuning.store(config, CHOICE, {})
    assert tuning.load(dataclasses.replace(config, discrete_state_input=True)) == CHOICE


def test_it_holds_for_one_version_of_jax(tiny_config, monkeypatch):
    tuning.store(tiny_config(), CHOICE, {})
    monkeypatch.setattr(jax, "__version__", "99.0")
    assert tuning.load(tiny_config()) is None


def _changed(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fused": True}, "'options' must hold fused, time_tables"),
        (dataclasses.asdict(CHOICE) | {"fused": "no"}, "fused must be true or false"),
        (dataclasses.asdict(CHOICE) | {"tower_attention": "magic"}, "must be one of xla, cudnn"),
        (dataclasses.asdict(CHOICE) | {"step_attention": "cudnn"}, "needs an NVIDIA GPU"),
        (dataclasses.asdict(CHOICE) | {"step_buffers": "one"}, "step_buffers must be one of apart"),
        (dataclasses.asdict(CHOICE) | {"quantized": 3}, "not iterable"),
        (None, "'options' must hold"),
    ],
)
def test_a_choice_that_makes_no_sense_is_ignored_with_a_warning(tiny_config, options, message):
    config = tiny_config()
    _changed(tuning.store(config, CHOICE, {}), options=options)
    with pytest.warns(UserWarning, match=f"is ignored: .*{message}"):
        assert tuning.best(config) == tuning.default()


def test_a_damaged_file_is_ignored_with_a_warning(tiny_config):
    config = tiny_config()
    file = tuning.store(config, CHOICE, {})
    _changed(file, key={"device": "another"})
    with pytest.warns(UserWarning, match="another model, device or version"):
        assert tuning.load(config) is None
    for text in ("", "[]", file.read_text()[:40], "\x00"):
        file.write_text(text)
        with pytest.warns(UserWarning, match="is ignored"):
            assert tuning.load(config) is None


def test_joined_buffers_are_refused_for_kernels_that_cannot_read_them():
    with pytest.raises(ValueError, match="'joined' needs step_attention 'xla', got 'cudnn'"):
        dataclasses.replace(tuning.ALL_ON, step_buffers="joined", step_attention="cudnn")
