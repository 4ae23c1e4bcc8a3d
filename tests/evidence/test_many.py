"""Many policies in one program: each comes out as if it were trained alone, and can be loaded."""

import dataclasses

import jax
import numpy as np
import pytest

from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.evidence import frames, many, sources, training, unfinished
from shallow_pi.evidence.claims import recipes
from shallow_pi.models import batch as batches
from shallow_pi.models import pi0
from shallow_pi.sims import demonstrations

EPISODES = 3


def _vary(**fields):
    own = {"depth": 2, "steps": 2, "demonstrations": EPISODES, "teacher": "teacher-l3-s0"}
    return dataclasses.replace(recipes.STUDENT, **{**own, **fields})


@pytest.fixture(scope="module")
def model(tiny_config):
    return tiny_config(vocab_size=320, max_token_len=12)


@pytest.fixture(scope="module")
def data(model):
    """Random frames of three episodes, with rows to spare."""
    return frames.Frames(batches.noise(model, 40), np.array([0, 9, 20, 33]))


@pytest.fixture(scope="module")
def teacher(model, tiny_params):
    scores = {"similarity": np.array([0.9, 0.1, 0.5]), "sensitivity": np.array([3.0, 1.0, 2.0])}
    return many.Teacher(model, tiny_params(model), scores)


def _trained(groups, data, teacher):
    found = many.train(groups, data, teacher.model, teacher)
    return {recipe: params for recipe, params, _ in found}


@pytest.mark.slow
def test_policies_trained_together_are_those_trained_alone(model, data, teacher):
    wanted = [
        _vary(seed=seed, **fields)
        for seed in (0, 1)
        for fields in ({}, {"velocity": 0.0, "attention": 0.0}, {"init": "random"})
    ]
    groups = many.group(wanted)
    assert [len(group.rows) * len(group.variants) for group in groups] == [6]
    together = _trained(groups, data, teacher)
    assert set(together) == set(wanted)
    for recipe in (wanted[0], wanted[4]):  # All three losses, and the task loss alone.
        alone = _trained(many.group([recipe]), data, teacher)[recipe]
        # Adam divides by the root of a squared gradient, which magnifies rounding.
        for one, other in zip(
            jax.tree.leaves(alone), jax.tree.leaves(together[recipe]), strict=True
        ):
            np.testing.assert_allclose(one, other, atol=1e-4)
    start = jax.tree.leaves(many.initial(wanted[0], model, teacher.params))
    moved = [
        np.abs(a - b).max()
        for a, b in zip(jax.tree.leaves(together[wanted[0]]), start, strict=True)
    ]
    assert max(moved) > 1e-3


def test_groups_keep_apart_what_programs_depend_on():
    apart = [
        _vary(),
        _vary(depth=1),
        _vary(steps=3),
        _vary(peak_lr=1e-3),
        _vary(heads="head_mean"),
        _vary(strategy="first"),
        _vary(strategy="random", seed=0),
        _vary(strategy="random", seed=1),
        _vary(reflow=1.0),
        _vary(queries="all"),
        _vary(vision_depth=1),
        _vary(image_tokens=1),
        _vary(image_tokens=1, token_choice="scored"),
    ]
    assert len(many.group(apart)) == len(apart)
    # Other numbers of demonstrations are other rows, and the rows of a program make a grid.
    grid = [_vary(demonstrations=n, attention=a) for n in (1, 2) for a in (0.1, 0.5)]
    assert [len(group.rows) for group in many.group(grid)] == [2]
    assert len(many.group(grid[:3])) == 2


@pytest.mark.parametrize(
    ("strategy", "layers"), [("first", [0, 1]), ("similarity", [1, 2]), ("sensitivity", [0, 2])]
)
def test_a_student_without_training_is_the_cut(data, teacher, strategy, layers):
    recipe = _vary(strategy=strategy, steps=0)
    found = _trained(many.group([recipe]), data, teacher)[recipe]
    own = found["PaliGemma"]["llm"]["layers"]["mlp"]["linear"]
    whole = teacher.params["PaliGemma"]["llm"]["layers"]["mlp"]["linear"]
    np.testing.assert_array_equal(own, whole[np.array(layers)])


def test_a_student_of_another_shape_is_cut_with_the_vision_loss(model, data, teacher):
    """Its tower is the teacher's first layer, its tokens are chosen by a scorer."""
    recipe = _vary(vision_depth=1, image_tokens=1, token_choice="scored", steps=0)
    found = _trained(many.group([recipe]), data, teacher)[recipe]
    own = many.architecture(recipe, model)
    assert (own.image.depth, own.scored_tokens, own.depth) == (1, 1, 2)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, pi0.abstract_params(own))
    assert (recipe.losses.weights["vision"], recipe.losses.weights["scorer"]) == (1.0, 1.0)
    with pytest.raises(ValueError, match=r"vision-depth must lie in 1..\d+ .*, got 9"):
        many.architecture(_vary(vision_depth=9), model)


def test_more_demonstrations_than_there_are_are_refused(model, data, teacher):
    with pytest.raises(ValueError, match="4 demonstrations are wanted, 3 were collected"):
        list(many.train(many.group([_vary(demonstrations=4)]), data, model, teacher))


@pytest.mark.slow
def test_an_interrupted_training_goes_on_where_it_was_kept(
    model, data, teacher, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(many, "CHUNK", 1)
    monkeypatch.setattr(unfinished, "EVERY", 0.0)
    (group,) = many.group([_vary(depth=1, steps=3, velocity=0.0, attention=0.0)])
    ((_, expected, _),) = many.train([group], data, model, teacher)
    with monkeypatch.context() as patch:
        patch.setattr(unfinished.Unfinished, "keep", _keep_and_stop)
        with pytest.raises(KeyboardInterrupt):
            list(many.train([group], data, model, teacher, tmp_path))
    (kept,) = tmp_path.iterdir()
    with np.load(kept) as state:
        assert [2] in [leaf.ravel().tolist() for leaf in state.values()]
    ((_, found, _),) = many.train([group], data, model, teacher, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert f"goes on from {kept}" in capsys.readouterr().err.replace("\n", "")
    assert not list(tmp_path.iterdir())
    kept.write_bytes(b"PK cut short")
    with pytest.raises(ValueError, match=rf"{kept.name} is damaged .*delete it to start"):
        list(many.train([group], data, model, teacher, tmp_path))
    # Other data are another training.
    more = dataclasses.replace(data, ends=np.array([0, 9, 20, 32]))
    list(many.train([group], more, model, teacher, tmp_path))
    assert list(tmp_path.iterdir()) == [kept]


def _keep_and_stop(kept, state, keep=unfinished.Unfinished.keep):
    keep(kept, state)
    if kept.path.exists() and int(np.ravel(state.step)[0]) == 2:
        raise KeyboardInterrupt


def test_slugs_tell_recipes_apart():
    varied = [
        _vary(**{name: value})
        for name, value in {
            "depth": 3,
            "strategy": "last",
            "init": "random",
            "task": 0.0,
            "velocity": 0.5,
            "attention": 0.0,
            "reflow": 1.0,
            "attention_layer": "first",
            "heads": "head_mean",
            "queries": "all",
            "vision_depth": 1,
            "image_tokens": 4,
            "token_choice": "scored",
            "num_steps": 1,
            "steps": 0,
            "demonstrations": 50,
            "batch_size": 32,
            "seed": 7,
            "teacher": "teacher-l9-s0",
        }.items()
    ]
    varied += [recipes.METAWORLD_STUDENT, recipes.METAWORLD_TEACHER, _vary(peak_lr=1e-3)]
    varied += [_vary(strategy="random"), _vary(tasks=("around",))]
    varied += [dataclasses.replace(recipes.TEACHER, model=name) for name in recipes.MODELS]
    slugs = [recipe.slug for recipe in [recipes.STUDENT, recipes.TEACHER, *varied]]
    assert len(set(slugs)) == len(slugs)
    assert recipes.STUDENT.slug == "l6-s0"
    assert recipes.METAWORLD_STUDENT.slug == "l6-metaworldmt10-s0"
    assert recipes.METAWORLD_STUDENT.teacher == recipes.METAWORLD_TEACHER.slug


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps"), [("half_width", 0), ("reads_last", 1)])
def test_teachers_and_students_become_step_folders(own, tmp_path, kind, steps):
    model = dataclasses.replace(own.model, depth=3, max_token_len=12)
    assets = dataclasses.replace(own, model=model)
    robot = assets.robot
    generator = np.random.default_rng(0)
    episodes = [
        demonstrations.Episode(
            images={
                key: generator.integers(0, 256, (n, 24, 24, 3), np.uint8)
                for key in robot.cameras.values()
            },
            vectors={
                key: generator.standard_normal((n, 3)).astype(np.float32)
                for key in (*robot.state_keys, robot.action_key)
            },
            prompt="touch the red block",
            task="touch",
            seed=0,
        )
        for n in (4, 6)
    ]
    data = frames.samples(assets, episodes)
    wanted = dataclasses.replace(
        recipes.TEACHER, depth=3, steps=steps, demonstrations=2, model=kind
    )
    training.teach([wanted], assets, data, tmp_path)
    student = _vary(teacher=wanted.slug, steps=steps, demonstrations=2)
    teacher = recipes.teacher_model(wanted, model)
    training.distil([student], data, tmp_path)
    assert not training.missing([wanted, student], tmp_path)
    found = sources.load(student.slug, tmp_path, num_steps=2)
    assert found.noise_shape == (5, 6)
    cut = policy_assets.load(tmp_path / student.slug).model
    assert cut == recipes.teacher_model(dataclasses.replace(wanted, depth=2), model)
    # Of a frame, the samples are what the robot's transforms make of it.
    frame = {key: images[1] for key, images in episodes[1].images.items()}
    frame |= {key: episodes[1].vectors[key][1] for key in robot.state_keys}
    frame |= {robot.prompt_key: "touch the red block"}
    expected = batches.stack([assets.inputs()(frame)["state"]])[0]
    np.testing.assert_allclose(data.samples.observation.state[5], expected)
    later = episodes[1].vectors[robot.action_key]
    raw = np.concatenate([later[1:], np.repeat(later[-1:], 5, 0)])[:5]
    whole = assets.inputs()({**frame, "actions": raw, "action_is_pad": np.zeros(5, bool)})
    np.testing.assert_allclose(data.samples.actions[5], whole["actions"])
    assert policy_assets.load(tmp_path / wanted.slug).model == teacher
    # What a teacher's layers lack stays out of training.
    params = sources.read(student.slug, tmp_path)[1]["PaliGemma"]["llm"]["layers"]
    there = np.any(np.asarray(params["mlp_1"]["linear"]), axis=(1, 2))
    assert there.tolist() == [half.expert == "whole" for half in cut.layers]
