"""One command measures every kind of variant in processes that take turns."""

import dataclasses
import json
import sys
import time

import jax
import numpy as np
import pytest

from shallow_pi.commands import benchmark_all, benchmark_variant
from shallow_pi.inference import program, tuning
from shallow_pi.speed import host_path, made_up, summary, trace, turns, variants

# A process that is ready at once, writes what it was told after a line of input, and logs its turn.
WRITES = """
import pathlib, sys, time
output = pathlib.Path(sys.argv[1])
if sys.argv[2] == "never":
    time.sleep(60)
if sys.argv[2] == "fails":
    sys.exit("no such kernel")
output.with_suffix(".ready").touch()
sys.stdin.readline()
with output.with_name("turns").open("a") as file:
    file.write(f"{output.stem} {time.time()} ")
    time.sleep(0.05)
    file.write(f"{time.time()}\\n")
output.write_text("{}")
"""


def _jobs(folder, names):
    return [
        turns.Job(
            name,
            [sys.executable, "-c", WRITES, str(folder / f"{name}.json"), name],
            {},
            folder / f"{name}.json",
        )
        for name in names
    ]


def test_processes_have_the_device_to_themselves_in_order(tmp_path):
    reasons = {}
    turns.run(
        _jobs(tmp_path, ["first", "second", "fails", "third"]),
        together=3,
        budget_s=60,
        ended=lambda job, reason: reasons.update({job.name: reason}),
    )
    assert reasons == {
        "first": "",
        "second": "",
        "fails": "exit status 1: no such kernel",
        "third": "",
    }
    rows = [line.split() for line in (tmp_path / "turns").read_text().splitlines()]
    assert [name for name, _, _ in rows] == ["first", "second", "third"]
    ends = [0.0, *(float(end) for _, _, end in rows)]
    assert all(float(start) >= end for (_, start, _), end in zip(rows, ends, strict=False))


def test_the_budget_ends_what_is_not_compiled_and_starts_nothing_more(tmp_path):
    reasons, began = {}, time.monotonic()
    turns.run(
        _jobs(tmp_path, ["never", "later"]),
        together=1,
        budget_s=1.0,
        ended=lambda job, reason: reasons.update({job.name: reason}),
    )
    assert time.monotonic() - began < 20
    assert reasons == {
        "never": "not compiled or not measured when the time was up",
        "later": "not started: the budget of 1 s was used up",
    }


def _measured(name, **changes):
    """A variant of the list in miniature, measured in this process."""
    (found,) = variants.tiny([one for one in variants.VARIANTS if one.name == name])
    order = []
    content = benchmark_variant.measure(
        dataclasses.replace(found, **changes), True, lambda: order.append("ready")
    )
    assert order == ["ready"], "the device is asked for once"
    return json.loads(json.dumps(content))


@pytest.fixture(scope="module")
def found():
    options = {"unrolled_layers": True}
    return {
        "pi05_l6": _measured("pi05_l6"),
        "unrolled": _measured("pi05_l9", base="pi05_l6", options=options),
        "pi05_l6_policy": _measured("pi05_l6_policy"),
    }


@pytest.mark.slow
def test_every_kind_of_inference_is_measured(found):
    assert found["unrolled"]["timing"]["options"]["unrolled_layers"]
    assert not found["pi05_l6"]["timing"]["options"]["unrolled_layers"]
    assert set(found["pi05_l6_policy"]["batches"]) == {"1", "2"}
    stages = found["pi05_l6_policy"]["policy"]["stages_ms"]
    assert list(stages) == [
        *("check", "tokenize", "resize", "normalize", "pack", "transfer", "dispatch", "device"),
        *("fetch", "output"),
    ]
    assert list(found["pi05_l6"]["timing"]["stages_ms"]) == list(stages)[4:9]


@pytest.mark.slow
def test_a_folder_becomes_tables_and_plots(found, tmp_path):
    for name, content in found.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "other.json").write_text("{}")
    again = summary.read(tmp_path)
    assert set(again) == set(found)
    rows = {table.title: table.row_count for table in summary.tables(again)}
    assert list(rows.values()) == [2, 13, 2], "two timings, ten stages and three sums, two batches"
    assert len(summary.draw(tmp_path, again)) == 3
    for name in ("breakdown", "growth", "host_path"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_command_measures_in_processes_and_names_what_fails(tmp_path, monkeypatch, capsys):
    wrong = '{"name": "wrong", "kind": "step", "arguments": ["no_such_config"]}'
    arguments = ["--tiny", "--only", "pi05_l2", "--add", wrong, "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmark_all.py", *arguments])
    benchmark_all.main()
    said = capsys.readouterr().out
    assert "pi05_l2: measured" in said
    assert "failed: wrong: exit status" in said
    assert "no_such_config" in (tmp_path / "wrong.log").read_text()
    content = json.loads((tmp_path / "pi05_l2.json").read_text())
    assert content["timing"]["depth"] == content["variant"]["depth"] == 2
    assert content["timing"]["device_ms"] > 0
    assert "pi05_l2" in (tmp_path / "summary.txt").read_text()
    assert not list(tmp_path.glob("*.ready"))


def test_a_variant_of_json_changes_its_base():
    text = '{"name": "a", "base": "pi05_l18", "options": {"tower_attention": "cudnn"}}'
    found = variants.parse(text, variants.VARIANTS)
    assert (found.depth, found.parts) == (18, True)
    assert found.inference_options().tower_attention == "cudnn"
    given = benchmark_all.Arguments(add=(text,), only=("pi0_l6", "pi05_l6"))
    assert [one.name for one in given.variants()] == ["pi0_l6", "pi05_l6", "a"]


def test_every_choice_is_a_set_of_options_against_a_variant_of_the_list():
    usual = [one.name for one in benchmark_all.Arguments().variants()]
    chosen = benchmark_all.Arguments(choices=("inference", "training")).variants()
    assert [one.name for one in chosen[: len(usual)]] == usual
    inference, training = variants.CHOICES["inference"], variants.CHOICES["training"]
    assert chosen[len(usual) :] == [*inference, *training]
    for one in inference:
        assert one.inference_options() != tuning.default()
    bases = {one.name: one for one in variants.VARIANTS}
    for one in training:
        assert one.arguments[: len(bases[one.base].arguments)] == bases[one.base].arguments


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "--add must be JSON"),
        ('{"depth": 3}', "--add must be an object with a name"),
        ('{"name": "a", "depht": 3}', "no field 'depht'.*did you mean 'depth'"),
        ('{"name": "a", "options": {"fuse": true}}', "no field 'fuse'.*did you mean 'fused'"),
        ('{"name": "a", "base": "b"}', "no variant 'b' to change"),
        ('{"name": "a", "base": ["pi05_l6"]}', "base must be a string, got"),
        ('{"name": "a", "options": 3}', "options must be an object, got 3"),
        ('{"name": "a", "depth": "six"}', "depth must be a whole number, got 'six'"),
    ],
)
def test_a_wrong_variant_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        variants.parse(text, variants.VARIANTS)


def test_made_up_weights_are_noise_of_the_stated_size(tiny_config):
    config = tiny_config(pi05=True)
    found = np.asarray(made_up.noise((64, 64), "float32", np.uint32(3)))
    assert abs(found.mean()) < 1e-3
    np.testing.assert_allclose(found.std(), made_up.DEVIATION, rtol=0.05)
    made = made_up.prepared_program(config, 2, tuning.ALL_ON)
    real = program.Program.create(config, made_up.params(config), 2, tuning.ALL_ON)
    assert jax.tree.map(np.shape, made.arrays) == jax.tree.map(np.shape, real.arrays)
    assert made.shapes == real.shapes


def test_stages_of_a_policy_give_its_own_actions(monkeypatch):
    """The staged path packs what `infer` packs, and gives the actions it gives."""
    config = dataclasses.replace(variants.TINY, depth=1, cameras=variants.TINY.cameras[:1])
    with host_path.made_up_policy(config, 1) as policy:
        given, seen = host_path.observation(policy), []
        noise = np.zeros(policy.noise_shape, np.float32)
        expected = policy.infer(given, noise)["actions"]
        outputs = policy.assets.outputs()

        def kept(sample):
            seen.append(outputs(sample)["actions"][0])
            return {}

        inputs = policy.assets.inputs(resize=not policy.resize_on_device)
        laps = host_path.stages.Laps()
        host_path._staged(policy, inputs, kept, given, laps)
    np.testing.assert_allclose(seen[0], expected, atol=1e-6)
    assert set(laps.seconds) == {
        *host_path.stages.BEFORE,
        *host_path.stages.PROGRAM,
        *host_path.stages.AFTER,
    }


def test_kernels_are_added_up_and_overlaps_count_once():
    def event(name, start, duration):
        return {"ph": "X", "pid": 1, "tid": 2, "name": name, "ts": start, "dur": duration}

    events = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 2, "args": {"name": "Stream #1"}},
        *(event("a", 0, 4000), event("b", 3000, 4000), event("a", 9000, 1000)),
        {"ph": "X", "pid": 7, "tid": 2, "name": "host", "ts": 0, "dur": 1e6},
    ]
    found = trace.read(events, 2, 1)
    assert (found.count, found.busy_ms, found.sum_ms) == (1.5, 4.0, 4.5)
    assert found.longest == [("a", 1.0, 2.5)]
    assert trace.read(events[:2], 2, 1) is None
