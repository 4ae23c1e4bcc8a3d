"""Exports: what is given back is the student, and what cannot be given back is refused."""

import dataclasses
import importlib.util
import json
import os
import platform
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from shallow_pi.checkpoints import safetensors_file, sizes, weights
from shallow_pi.data.robots import assets, normalize, robot
from shallow_pi.deploy import policy
from shallow_pi.deploy.export import (
    card,
    export,
    formats,
    openpi,
    openpi_padded,
    openpi_pytorch,
    student,
)
from shallow_pi.models import gemma, parameters, pi0, siglip

FORMATS = ("openpi", "openpi-padded", "openpi-pytorch", "lerobot")
LAYERS, TEACHER_DEPTH = [1, 3], 5


@pytest.fixture(scope="module", autouse=True)
def small_classes():
    """openpi's depths in miniature: compiling 18 layers takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student, "DEPTH", 4)
        patch.setattr(student, "TOWER_DEPTH", 2)
        yield


@pytest.fixture(scope="module")
def run(own, params, tmp_path_factory):
    """A run's folder with two steps; tests must not change it."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    negative = jax.tree.map(lambda x: -np.asarray(x), params)
    for step, of_step in (("2", params), ("10", negative)):
        weights.save_params(folder / step / "params", of_step)
        own.save(folder / step / "assets")
        (folder / step / "data").mkdir()
        (folder / step / "data" / "metadata").write_text('{"data": {}, "error": 0.125}')
    content = {
        "name": "pi0_tiny_l2",
        "layer_map": LAYERS,
        "model": {"depth": TEACHER_DEPTH},
        "teacher": {"path": "gs://bucket/pi0_tiny"},
        "data": {"path": "/home/somebody/recordings/cups", "more": ["owner/cups"]},
        "num_train_steps": 10,
        "validation": {"against": "teacher"},
    }
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """Each format once; tests must not change them."""
    folder = tmp_path_factory.mktemp("exports")
    return {name: export.export(run / "2", name, folder / name, any_size=True) for name in FORMATS}


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_is_a_policy_with_the_students_actions(run, exported, name):
    generator = np.random.default_rng(3)
    found = {
        key: generator.integers(0, 256, (24, 24, 3), np.uint8)
        for key in robot.TURNTABLE.cameras.values()
    }
    found |= {"observation.state": np.ones(3, np.float32), "task": "touch the red block"}
    noise = generator.standard_normal((5, 6)).astype(np.float32)
    student = policy.Policy.from_checkpoint(run / "2", warm_up=False)
    other = policy.Policy.from_checkpoint(exported[name], warm_up=False)
    actions = student.infer(found, noise)["actions"]
    np.testing.assert_allclose(other.infer(found, noise)["actions"], actions, rtol=1e-5, atol=1e-6)
    assert np.abs(actions).max() > 0.1


def test_openpis_folder_has_parameters_and_statistics_where_openpi_looks(params, exported):
    stored = weights.stored_shapes(exported["openpi"] / "params")
    assert set(stored) == {"params"}
    assert set(weights.leaves(stored["params"])) == set(weights.leaves(params))
    stats = json.loads((exported["openpi"] / "assets/turntable/norm_stats.json").read_text())
    np.testing.assert_allclose(stats["norm_stats"]["state"]["mean"], np.linspace(0.5, 2, 3))


@pytest.mark.parametrize(("name", "depth"), [("openpi-padded", 4), ("openpi-pytorch", 2)])
def test_zeros_behind_the_layers_fill_the_classes_depths(params, exported, name, depth):
    model = assets.load(exported[name]).model
    read = weights.leaves(weights.load_params(exported[name], pi0.abstract_params(model)))
    for path, leaf in weights.leaves(params).items():
        stack = parameters.stack(path)
        filled = {"layers": depth, "image_layers": 2}.get(stack, len(leaf))
        assert len(read[path]) == filled, path
        np.testing.assert_array_equal(read[path][: len(leaf)], leaf)
        assert not np.any(read[path][len(leaf) :])


@pytest.mark.parametrize("pi05", [False, True])
def test_a_padded_model_is_the_same_function(tiny_config, tiny_params, tiny_observation, pi05):
    config = tiny_config(pi05=pi05, depth=2)
    params, observation = tiny_params(config), tiny_observation(config)
    deep = pi0.at_depth(config, 4)
    padded = jax.tree.map(jnp.asarray, student.pad(params, "layers", 4))
    x_t = jax.random.normal(jax.random.key(0), (2, 5, 6))
    t = jnp.array([0.3, 0.9])
    shallow, _ = jax.jit(pi0.velocity, static_argnums=0)(config, params, observation, x_t, t)
    same, _ = jax.jit(pi0.velocity, static_argnums=0)(deep, padded, observation, x_t, t)
    np.testing.assert_allclose(same, shallow, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_pooled_image_tokens_are_refused_where_nothing_can_pool(name, own, params, tmp_path):
    model = dataclasses.replace(own.model, pooled_tokens=1)
    weights.save_params(tmp_path / "2" / "params", params)
    dataclasses.replace(own, model=model).save(tmp_path / "2" / "assets")
    with pytest.raises(ValueError, match=r"(?s)pools a camera's 4 image tokens to 1 .*--format on"):
        export.export(tmp_path / "2", name, any_size=True)
    assert policy.Policy.from_checkpoint(tmp_path / "2", warm_up=False).assets.model == model


@pytest.mark.parametrize("name", FORMATS)
def test_a_scorer_is_refused_where_there_is_no_place_for_it(name, own, tiny_params, tmp_path):
    model = dataclasses.replace(own.model, scored_tokens=1)
    weights.save_params(tmp_path / "2" / "params", tiny_params(model))
    dataclasses.replace(own, model=model).save(tmp_path / "2" / "assets")
    with pytest.raises(
        ValueError, match=r"chooses 1 of a camera's 4 image tokens by a scorer .*\(image_scorer/…\)"
    ):
        export.export(tmp_path / "2", name, any_size=True)
    loaded = policy.Policy.from_checkpoint(tmp_path / "2", warm_up=False)
    assert loaded.assets.model == model
    assert ", 1 chosen image tokens a camera, " in loaded.description


@pytest.mark.parametrize("name", FORMATS)
def test_a_scorer_that_keeps_every_token_is_left_out(name, own, params, tiny_params, tmp_path):
    """The export compares the actions; without the scorer, its own parameters would be unknown."""
    model = dataclasses.replace(own.model, scored_tokens=own.model.patches)
    scorer = tiny_params(model)["image_scorer"]
    weights.save_params(tmp_path / "2" / "params", {**params, "image_scorer": scorer})
    dataclasses.replace(own, model=model).save(tmp_path / "2" / "assets")
    folder = export.export(tmp_path / "2", name, any_size=True)
    assert assets.load(folder).model.scored_tokens == 0


@pytest.fixture(scope="module")
def uneven(own, tiny_params, tmp_path_factory):
    """The step of a student that is cut further in the backbone, the expert and the image tower."""
    model = dataclasses.replace(
        own.model,
        depth=3,
        backbone_layers=("whole", "whole", "keys_values"),
        expert_layers=("whole", "absent", "whole"),
    )
    folder = tmp_path_factory.mktemp("uneven")
    weights.save_params(folder / "2" / "params", tiny_params(model))
    dataclasses.replace(own, model=model).save(folder / "2" / "assets")
    return folder / "2"


@pytest.mark.parametrize(("name", "tower"), [("openpi", 1), ("openpi-padded", 2), ("lerobot", 2)])
def test_a_student_of_several_depths_is_the_same_function_in_whole_layers(
    name, tower, uneven, tmp_path
):
    """Actions are compared by the export, over the whole layers of the padded one."""
    made = export.export(uneven, name, tmp_path / name, any_size=True)
    stored = sizes.of(weights.stored_params(made))
    padded = name == "openpi-padded"
    assert (stored["depth"], stored["image"].depth) == (4 if padded else 3, tower)
    model = assets.load(made).model
    assert model.is_even == padded
    read = weights.load_params(made, pi0.abstract_params(model))["PaliGemma"]
    layers = read["llm"]["layers"]
    assert not np.any(layers["mlp"]["linear"][2])
    assert not np.any(layers["attn"]["attn_vec_einsum_1"]["w"][1])
    assert np.any(layers["attn"]["kv_einsum"]["w"][2])
    card = (made / "README.md").read_text()
    assert "# π0 with 3 layers (backbone 2, action expert 2)" in card


@pytest.mark.parametrize("name", ["openpi", "lerobot"])
def test_a_half_of_a_layer_that_is_no_zeros_is_found(name, uneven, tmp_path, monkeypatch):
    """shallow_pi would leave it out, and openpi and LeRobot compute with it."""
    monkeypatch.setattr(student, "as_openpi", lambda given: given)
    with pytest.raises(ValueError, match=r"than zeros in halves of layers .*attn_vec_einsum_1"):
        export.export(uneven, name, tmp_path / "x", any_size=True)


def test_openpis_pytorch_file_has_every_tensor_of_its_class(exported, own):
    folder = exported["openpi-pytorch"]
    names = set(safetensors.numpy.load_file(folder / "model.safetensors"))
    with_expert = "paligemma_with_expert."
    assert f"{with_expert}gemma_expert.lm_head.weight" in names
    assert f"{with_expert}paligemma.model.language_model.layers.1.mlp.up_proj.weight" in names
    assert f"{with_expert}paligemma.model.language_model.layers.2.mlp.up_proj.weight" not in names
    content = json.loads((folder / "config.json").read_text())
    assert (content["depth"], content["pi05"], content["action_horizon"]) == (2, False, 5)


def test_stablehlo_runs_with_jax_alone(run, tmp_path):
    folder = export.export(run / "2", "stablehlo", tmp_path / "x", dtype="float32", num_steps=2)
    text = (folder / "README.md").read_text()
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    assert "shallow_pi" not in code
    found = {}
    exec(code.replace('open("', f'open("{folder}/').replace('file("', f'file("{folder}/'), found)
    assert found["actions"].shape == (1, 5, 6)
    assert found["policy"].platforms == ("cpu", "cuda", "tpu")


def test_files_can_be_read_by_others(exported):
    for name in FORMATS:
        for file in exported[name].rglob("*.safetensors"):
            assert file.stat().st_mode & 0o044 == 0o044, file


@pytest.mark.parametrize("name", FORMATS)
def test_the_card_says_what_it_is_and_how_to_run_it(exported, name):
    card = (exported[name] / "README.md").read_text()
    command = {
        "openpi": "serve-openpi policy:checkpoint --policy.config=student",
        "openpi-padded": "with 4 layers: first the student's, then zeros",
        "openpi-pytorch": "dataclasses.replace(original(name), depth=2)",
        "lerobot": "plugins/lerobot_policy_shallow_pi",
    }
    assert "# π0 with 2 layers" in card
    assert "teacher layers 1 3 of 5" in card
    assert command[name] in card
    assert "{" not in card
    # Facts of its run, and no paths of the machine it was made on.
    assert "| teacher | gs://bucket/pi0_tiny |" in card
    assert "| dataset | cups, owner/cups |" in card
    assert "| training | 2 of 10 steps |" in card
    assert "| held-out error | 0.125 (sampled against the teacher's actions) |" in card
    assert "/home" not in card
    # Sizes that no released class has.
    assert "**No released openpi or LeRobot loads this**" in card
    assert "vocab_size is 320, theirs 257152" in card
    assert "unchanged" not in card


@pytest.mark.parametrize("format", [openpi_padded, openpi_pytorch])
def test_openpi_is_told_the_students_integration_steps_and_model(format, own):
    """Its own server has no flag for them and takes ten."""
    found = {}
    for n in (1, 10):
        given = dataclasses.replace(own, model=pi0.Pi0Config(), num_steps=n)
        found[n] = format.usage("x", student.Student(given, {}))
    assert "sample_kwargs=dict(num_steps=1)" in found[1]
    assert "policy:checkpoint" not in found[1]
    assert "Pi0Config(pi05=False, action_horizon=50, max_token_len=48)" in found[1]
    assert ("policy:checkpoint" in found[10]) == (format is openpi_padded)
    model = pi0.Pi0Config(pi05=True, max_token_len=200, action_dim=14, dtype="float32")
    sentence = openpi.train_config(student.Student(dataclasses.replace(own, model=model), {}), "x")
    assert "pi05=True, action_horizon=50, max_token_len=200, discrete_state_input=False" in sentence
    assert ", action_dim=14, dtype='float32')`" in sentence


@pytest.mark.parametrize(
    ("changes", "tower"),
    [
        ({}, "27 layers, 256 image tokens a camera"),
        ({"image": siglip.SiglipConfig(depth=13)}, "13 layers, 256 image tokens a camera"),
        ({"pooled_tokens": 64}, "27 layers, 64 pooled image tokens a camera"),
        ({"scored_tokens": 100}, "27 layers, 100 chosen image tokens a camera"),
    ],
)
def test_the_card_names_the_image_tower_and_its_tokens(own, changes, tower):
    given = student.Student(dataclasses.replace(own, model=pi0.Pi0Config(**changes)), {})
    text = card.text("", "x", given, student.Origin(), "checked", is_policy=False)
    assert f"| image tower | {tower} |" in text


def test_a_robot_with_openpis_own_transforms_is_exported_for_openpi_alone(own, params, tmp_path):
    """As `--openpi.config NAME` trains it: shallow_pi and LeRobot lack its transforms."""
    theirs = dataclasses.replace(own.robot, name="openpi:pi0_mine", elsewhere="pi0_mine")
    weights.save_params(tmp_path / "2" / "params", params)
    dataclasses.replace(own, robot=theirs).save(tmp_path / "2" / "assets")
    folder = export.export(tmp_path / "2", "openpi", any_size=True)
    assert assets.load(folder).robot.elsewhere == "pi0_mine"
    assert "shallow-pi serve --policy.dir" not in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="openpi's config pi0_mine, which LeRobot's pipelines can"):
        export.export(tmp_path / "2", "lerobot", any_size=True)


def test_the_last_step_of_a_run_is_exported_into_the_run(run, params, tmp_path):
    folder = tmp_path / "first"
    shutil.copytree(run, folder)
    said = []
    made = export.export(folder, "openpi", any_size=True, report=said.append)
    assert made == folder / "exports" / "10-openpi"
    read = weights.load_params(made, pi0.abstract_params(assets.load(made).model))
    np.testing.assert_array_equal(
        read["action_in_proj"]["kernel"], -params["action_in_proj"]["kernel"]
    )
    assert "Reading" in said[0]
    assert "every parameter equal" in said[-1]


def test_any_step_of_a_run_can_be_asked_for(run, params, tmp_path):
    folder = tmp_path / "first"
    shutil.copytree(run, folder)
    (folder / "best.json").write_text(json.dumps({"step": 2}))
    for step in ("best", 2):
        # Left behind by an export that was killed (no process has this number), and by one at work.
        start = f".{step}.unfinished-{platform.node()}-"
        killed, working = (tmp_path / f"{start}{process}" for process in (2**30, os.getppid()))
        killed.mkdir()
        working.mkdir()
        made = export.export(folder, "openpi", tmp_path / str(step), step=step, any_size=True)
        assert (killed.exists(), working.exists()) == (False, True)
        read = weights.load_params(made, pi0.abstract_params(assets.load(made).model))
        np.testing.assert_array_equal(
            read["action_in_proj"]["kernel"], params["action_in_proj"]["kernel"]
        )
    with pytest.raises(FileNotFoundError, match=r"no step 3; there are 2, 10 in"):
        export.export(folder, "openpi", step=3, any_size=True)


def test_the_best_step_by_its_link_has_its_number(tmp_path):
    content = {"name": "pi0_tiny_l2", "layer_map": LAYERS, "model": {"depth": TEACHER_DEPTH}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "2").mkdir()
    (tmp_path / "best").symlink_to("2")
    assert student.origin(tmp_path / "best").step == 2


def test_a_teacher_that_is_a_step_of_a_run_is_named_by_its_run(tmp_path):
    """Its last part is a number, and more of a path may tell who trained it."""
    teacher = tmp_path / "home" / "pi0_deep" / "first" / "3000"
    content = {"name": "x", "layer_map": LAYERS, "model": {"depth": 5}}
    named = []
    for _ in range(2):
        content["teacher"] = {"path": str(teacher)}
        (tmp_path / "config.json").write_text(json.dumps(content))
        named.append(student.origin(tmp_path / "2").teacher)
        teacher.mkdir(parents=True, exist_ok=True)
        (teacher.parent / "config.json").write_text("{}")
    assert named == ["3000", "pi0_deep/first/3000"]


def test_stored_dtypes_are_kept_and_bfloat16_is_compared_in_bfloat16(own, params, tmp_path):
    own = dataclasses.replace(own, model=dataclasses.replace(own.model, dtype="bfloat16"))
    weights.save_params(tmp_path / "7" / "params", params)
    own.save(tmp_path / "7" / "assets")
    made = export.export(tmp_path / "7", "openpi-pytorch", any_size=True)
    stored = weights.stored_params(made)
    assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {jnp.dtype("float32")}


def test_nothing_is_overwritten(run, exported):
    with pytest.raises(FileExistsError, match=r"is never overwritten, .*move it away, or give"):
        export.export(run / "2", "openpi", exported["openpi"], any_size=True)


@pytest.mark.parametrize(
    ("image", "sizes"),
    [
        (siglip.SiglipConfig(depth=13), []),  # Filled with zeros.
        (siglip.SiglipConfig(width=96, depth=13), ["image.width is 96, theirs 1152"]),
        (siglip.SiglipConfig(depth=30), ["image.depth is 30, theirs 27"]),
    ],
)
def test_a_cut_image_tower_is_no_other_size(image, sizes):
    assert student.other_sizes(pi0.Pi0Config(image=image), student.BUILT_IN) == sizes


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"cameras": pi0.CAMERAS[:1]}, ("openpi", "openpi-padded", "openpi-pytorch")),
        ({"cameras": pi0.CAMERAS[::-1]}, ("openpi", "openpi-padded", "openpi-pytorch")),
        ({"image_size": 280}, ("openpi", "openpi-padded", "openpi-pytorch")),
        ({"action_dim": 14}, ("openpi-pytorch",)),
        ({"vocab_size": 300}, FORMATS),
        ({"expert": gemma.GemmaConfig(512, 4096)}, ("openpi-padded", "openpi-pytorch", "lerobot")),
        ({"image": siglip.SiglipConfig(patch_size=16)}, FORMATS),
        ({"depth": 12, "action_horizon": 10, "pi05": True}, ()),
        ({"depth": 36}, ("openpi-padded",)),
    ],
)
def test_a_format_refuses_the_sizes_that_its_classes_have_built_in(changes, refused):
    """openpi's class for JAX and LeRobot's take more from their configs than openpi's for torch."""
    model = pi0.Pi0Config(**changes)
    found = [
        name for name, one in formats.FORMATS.items() if student.other_sizes(model, one.BUILT_IN)
    ]
    assert found == list(refused)


@pytest.mark.parametrize(
    ("name", "changes", "of_robot", "match"),
    [
        ("openpi", {"pooled_tokens": 1}, {}, "pools a camera's 4 image tokens to 1"),
        ("openpi-pytorch", {"scored_tokens": 1}, {}, "by a scorer"),
        ("openpi-padded", {"pooled_tokens": 1}, {}, "pools a camera's 4 image tokens to 1"),
        ("lerobot", {}, {"elsewhere": "pi0_mine"}, "LeRobot's pipelines cannot hold"),
        (
            "lerobot",
            {},
            {"cameras": {"base_0_rgb": "a", "left_wrist_0_rgb": "observation.images.a"}},
            "would know by the same name",
        ),
        ("onnx", {}, {}, "needs the package onnx: uv sync --extra onnx"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_parameters_are_read(
    name, changes, of_robot, match, own, tmp_path, monkeypatch
):
    """They are gigabytes, and graphs take minutes."""
    given = dataclasses.replace(
        own,
        model=dataclasses.replace(own.model, **changes),
        robot=dataclasses.replace(own.robot, **of_robot),
    )
    given.save(tmp_path / "2" / "assets")
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=match):
        export.export(tmp_path / "2", name, any_size=name != "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_sizes_openpi_does_not_have_are_refused_one_by_one(run, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"(?s)behind --format lerobot cannot .*vocab_size is 320, theirs 257152.*give "
        r"--format onnx, --format stablehlo, or --any-size",
    ):
        export.export(run / "2", "lerobot", tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_step_folder_alone_is_padded(run, tmp_path):
    shutil.copytree(run / "2", tmp_path / "2")
    made = export.export(tmp_path / "2", "openpi-padded", any_size=True)
    assert sizes.of(weights.stored_params(made))["depth"] == 4


def test_missing_statistics_or_a_half_copied_step_are_named(run, tmp_path):
    shutil.copytree(run / "2", tmp_path / "2")
    (tmp_path / "2" / "assets" / "turntable" / "norm_stats.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no normalization statistics at .*norm_stats"):
        export.export(tmp_path / "2", "openpi", any_size=True)
    shutil.copytree(run / "2", tmp_path / "3")
    (tmp_path / "3" / "params" / "_METADATA").unlink()
    with pytest.raises(ValueError, match=r"written, copied or downloaded in part"):
        export.export(tmp_path / "3", "openpi", any_size=True)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*absent"):
        export.export(tmp_path / "absent", "openpi")


def test_a_tokenizer_that_is_not_openpis_is_told_and_a_missing_one_is_named(own, tmp_path, capsys):
    """openpi's classes embed as many words, and would read others."""
    model = dataclasses.replace(own.model, vocab_size=pi0.PALIGEMMA_VOCAB_SIZE)
    dataclasses.replace(own, model=model).save(tmp_path / "2" / "assets")
    with pytest.raises(ValueError, match="holds no parameters"):
        export.export(tmp_path / "2", "openpi-padded", any_size=True)
    told = " ".join(capsys.readouterr().err.split())
    assert "PaliGemma's tokenizer, and the student's has 320 pieces" in told
    (tmp_path / "2" / "assets" / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"no SentencePiece model at .*tokenizer\.model"):
        export.export(tmp_path / "2", "stablehlo")


def test_still_dimensions_are_told_where_their_noise_reaches_the_model(own, tmp_path, capsys):
    """openpi and LeRobot normalize the state without `normalize.steady`; graphs do not read it."""
    mean, std = np.array([0.0, 7.0, 300.0]), np.array([0.4, 0.0, 0.1])
    still = {**own.stats, "state": normalize.NormStats(mean, std, mean - std, mean + std)}
    own = dataclasses.replace(own, stats=still)
    own.save(tmp_path / "2" / "assets")
    for name in ("stablehlo", "lerobot"):
        with pytest.raises(ValueError, match="holds no parameters"):
            export.export(tmp_path / "2", name, any_size=True)
        told = " ".join(capsys.readouterr().err.split())
        assert ("dimensions 1, 2 hardly moved in training: openpi and" in told) == (name in FORMATS)
    text = card.text("", "x", student.Student(own, {}), student.Origin(), "checked", is_policy=True)
    assert "| still state dimensions | 1, 2 |" in text


def test_where_nothing_can_be_written_it_says_so(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        OSError, match=r"file is a file, expected a folder: .*give another --output"
    ):
        export.export(run / "2", "openpi", tmp_path / "file" / "new", any_size=True)


def test_what_is_read_back_differently_is_not_kept(run, tmp_path, monkeypatch):
    write = safetensors_file.write

    def wrong(path, leaves, **options):
        bias = np.asarray(leaves["action_out_proj/bias"]) + 1
        write(path, {**leaves, "action_out_proj/bias": bias}, **options)

    monkeypatch.setattr(safetensors_file, "write", wrong)
    with pytest.raises(ValueError, match=r"other numbers than were written: .*action_out_pro"):
        export.export(run / "2", "lerobot", tmp_path / "exports/new", any_size=True)
    assert not list(tmp_path.iterdir())


def test_statistics_that_differ_are_not_kept(run, tmp_path, monkeypatch):
    save = normalize.save

    def wrong(folder, stats):
        save(folder, {**stats, "actions": dataclasses.replace(stats["actions"], mean=np.ones(3))})

    monkeypatch.setattr(normalize, "save", wrong)
    with pytest.raises(ValueError, match=r"other numbers than .*\['statistics actions\.mean'\]"):
        export.export(run / "2", "openpi", tmp_path / "new", any_size=True)
    assert not list(tmp_path.iterdir())


def test_actions_that_differ_are_not_kept(run, tmp_path, monkeypatch):
    """Layers in another order are read back as they were written, and are another policy."""
    pad = student.pad

    def flipped(params, stack, depth):
        padded = pad(params, stack, depth)
        return jax.tree.map(np.flip, padded) if stack == "layers" else padded

    monkeypatch.setattr(student, "pad", flipped)
    with pytest.raises(ValueError, match=r"actions of .* differ from the student's by"):
        export.export(run / "2", "openpi-padded", tmp_path / "new", any_size=True)
    assert not list(tmp_path.iterdir())


def test_a_config_that_is_no_runs_is_an_error(run, tmp_path):
    shutil.copytree(run / "2", tmp_path / "2")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is not a run's config"):
        export.export(tmp_path / "2", "openpi", any_size=True)
