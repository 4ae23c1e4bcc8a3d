"""Conversions invert, ALOHA's crank is the geometry it claims to be, and sizes are checked."""

import numpy as np
import pytest

from shallow_pi.data.robots import conversions, robot

BOTH = [robot.ALOHA_STATE, robot.ALOHA_ACTIONS]


@pytest.mark.parametrize("conversion", BOTH, ids=["state", "actions"])
def test_inverse_undoes_forward(conversion) -> None:
    values = np.random.default_rng(0).uniform(0, 1, (20, 5, 14)).astype(np.float32)
    np.testing.assert_allclose(conversion.inverse(conversion.forward(values)), values, atol=2e-5)
    values *= 0.94  # The servo stands at a right angle (0.946) when the fingers are open.
    np.testing.assert_allclose(conversion.forward(conversion.inverse(values)), values, atol=2e-5)


def test_the_crank_obeys_the_law_of_cosines() -> None:
    """Horn and arm meet at a right place: arm² = horn² + fingers² − 2·horn·fingers·sin(angle)."""
    position = np.linspace(0, 1, 7)
    angle = conversions.crank_angle(position)
    fingers = 0.01844 + position * (0.058 - 0.01844)
    arm = np.sqrt(0.022**2 + fingers**2 - 2 * 0.022 * fingers * np.sin(angle))
    np.testing.assert_allclose(arm, 0.036)
    np.testing.assert_allclose(conversions.crank_position(angle), position, atol=1e-12)
    assert (np.diff(angle) > 0).all(), "opening turns one way"


def test_positions_out_of_reach_end_at_a_right_angle() -> None:
    np.testing.assert_allclose(
        conversions.crank_angle(np.array([-0.3, 1.5])), [-1.5708, 1.5708], atol=1e-4
    )


def test_only_the_joints_named_are_flipped() -> None:
    ones = np.ones(14, np.float32)
    signs = robot.ALOHA_ACTIONS.forward(ones)[:6]
    np.testing.assert_array_equal(signs, [1, -1, -1, 1, 1, 1])


def test_bad_conversions_are_refused() -> None:
    with pytest.raises(ValueError, match="2 factors has 1 offsets"):
        conversions.Conversion((1.0, 2.0), (0.0,))
    with pytest.raises(ValueError, match="factor of 0 cannot be undone"):
        conversions.Conversion((1.0, 0.0))
    with pytest.raises(ValueError, match=r"crank names dimensions \(2,\) of 2"):
        conversions.Conversion((1.0, 1.0), crank=(2,))
    with pytest.raises(ValueError, match="of 1 dimensions was given 3"):
        conversions.Conversion((1.0,)).forward(np.zeros(3))


def test_gripper_positions_beyond_the_crank_are_told(capsys) -> None:
    conversions.crank_angle(np.array([0.0, 1.0]))
    assert capsys.readouterr().err == ""
    for far in (30.0, 31.0):  # Once, however many frames have other numbers.
        conversions.crank_angle(np.array([0.5, far]))
    told = capsys.readouterr().err
    assert told.count("cut to its ends: expected 0 (closed) to 1 (open)") == 1
