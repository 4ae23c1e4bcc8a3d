"""Which layers each strategy keeps, by hand; and every bad map raises."""

import numpy as np
import pytest

from shallow_pi.distill import layer_map


@pytest.mark.parametrize(
    ("depth", "layers"),
    [
        (1, (0,)),
        (2, (0, 17)),
        (4, (0, 6, 11, 17)),
        (6, (0, 3, 7, 10, 14, 17)),
        (9, (0, 2, 4, 6, 8, 11, 13, 15, 17)),
        (12, (0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17)),
        (18, tuple(range(18))),
    ],
)
def test_uniform_is_the_paper_s(depth, layers):
    assert layer_map.uniform(depth, 18).layers == layers


def test_first_last_and_explicit():
    assert layer_map.first(3, 18).layers == (0, 1, 2)
    assert layer_map.last(3, 18).layers == (15, 16, 17)
    assert layer_map.explicit([0, 5, 9], 18).layers == (0, 5, 9)
    assert layer_map.explicit([1, 4], 6) == layer_map.LayerMap((1, 4), 6)


def test_random_is_repeatable_and_varies_with_its_seed():
    maps = [layer_map.random(6, 18, seed) for seed in range(20)]
    assert maps[3] == layer_map.random(6, 18, 3)
    assert len({m.layers for m in maps}) > 10
    assert all(m.depth == 6 for m in maps)


def test_similarity_drops_the_layers_most_alike():
    cosine = np.array([0.2, 0.99, 0.5, 0.98, 0.3])
    assert layer_map.similarity(3, cosine).layers == (0, 2, 4)
    assert layer_map.similarity(4, cosine).layers == (0, 2, 3, 4)


def test_sensitivity_drops_the_layers_least_missed():
    increase = np.array([3.0, -0.1, 0.5, 0.4, 2.0])
    assert layer_map.sensitivity(3, increase).layers == (0, 2, 4)
    assert layer_map.sensitivity(1, increase).layers == (0,)


def test_ties_keep_the_earlier_layer():
    assert layer_map.sensitivity(2, np.ones(4)).layers == (0, 1)


def test_a_shallower_backbone_is_spread_over_all_but_the_last_layer():
    """Nothing reads the last layer's tokens, only its keys and values."""
    assert layer_map.backbone_positions(2, 6) == (0, 4)
    assert layer_map.backbone_positions(1, 6) == (0,)
    assert layer_map.backbone_positions(6, 6) == (0, 1, 2, 3, 4, 5)


def test_a_shallower_expert_is_spread_to_the_last_layer():
    assert layer_map.expert_positions(2, 6) == (0, 5)
    assert layer_map.expert_positions(1, 6) == (5,)
    assert layer_map.expert_positions(6, 6) == (0, 1, 2, 3, 4, 5)


def test_a_depth_beyond_the_student_s_raises():
    with pytest.raises(ValueError, match=r"--student.backbone-depth must lie in 1..6, .* got 7"):
        layer_map.backbone_positions(7, 6)
    with pytest.raises(ValueError, match=r"--student.expert-depth must lie in 1..6, .* got 0"):
        layer_map.expert_positions(0, 6)


def test_expert_layers_keep_keys_and_values_of_a_cut_backbone():
    backbone, expert = layer_map.halves(4, backbone=(0, 2), expert=(0, 1, 3))
    assert backbone == ("whole", "keys_values", "whole", "keys_values")
    assert expert == ("whole", "whole", "absent", "whole")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), "at least one teacher layer"),
        ((0, 18), r"0..17 \(the teacher has 18\), got \[18\]"),
        ((-1, 3), r"got \[-1\]"),
        ((0, 3, 3), r"must not repeat, got \[0, 3, 3\]"),
        ((3, 0), r"increasing order, got \[3, 0\]; did you mean \[0, 3\]"),
    ],
)
def test_a_bad_map_raises(layers, message):
    with pytest.raises(ValueError, match=message):
        layer_map.explicit(layers, 18)


@pytest.mark.parametrize("depth", [0, 19])
def test_a_depth_the_teacher_does_not_have_raises(depth):
    for strategy in (layer_map.uniform, layer_map.first, layer_map.last):
        with pytest.raises(ValueError, match=rf"must lie in 1..18 \(the teacher's\), got {depth}"):
            strategy(depth, 18)
    with pytest.raises(ValueError, match=r"must lie in 1\.\.18"):
        layer_map.random(depth, 18, 0)
    with pytest.raises(ValueError, match=r"must lie in 1\.\.18"):
        layer_map.similarity(depth, np.arange(18.0))


def test_scores_that_are_no_numbers_raise():
    with pytest.raises(ValueError, match="alike must be one finite number a teacher layer"):
        layer_map.similarity(2, np.array([0.1, np.nan, 0.3]))
    with pytest.raises(ValueError, match=r"missed must be .* got shape \(2, 3\)"):
        layer_map.sensitivity(2, np.ones((2, 3)))
