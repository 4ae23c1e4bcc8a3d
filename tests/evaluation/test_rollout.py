"""Closed-loop evaluation on a small world whose outcomes can be computed by hand."""

import concurrent.futures
import json

import numpy as np
import pytest

from shallow_pi.deploy import executors
from shallow_pi.evaluation import policies, rollout


class Line:
    """A point on a line: start at 0, reach the goal (drawn from the seed) within 20 steps.

    An action is the way moved, at most 1. Success is |position − goal| < 0.25.
    """

    def __init__(self):
        self.reset(0)

    def reset(self, seed):
        self.goal = float(np.random.default_rng(seed).uniform(-5, 5))
        self.position, self.steps = 0.0, 0

    def observe(self):
        shade = np.full((8, 8, 3), 10 * self.steps, np.uint8)
        return {
            "observation.images.base": shade,
            "observation.state": np.array([self.position], np.float32),
            "task": self.prompt,
        }

    def step(self, action):
        assert not self.done, "stepped after the end"
        self.position += float(np.clip(action[0], -1, 1))
        self.steps += 1

    @property
    def task(self):
        return "left" if self.goal < 0 else "right"

    @property
    def prompt(self):
        return f"go {self.task}"

    @property
    def success(self):
        return abs(self.position - self.goal) < 0.25

    @property
    def done(self):
        return self.success or self.steps >= 20

    @property
    def time(self):
        return self.steps / 20


class Expert:
    """Knows the goal: plans unit steps and the rest."""

    def plan(self, observations, keys, sims, **_):
        chunks = []
        for sim in sims:
            position, chunk = sim.position, []
            for _ in range(4):
                chunk.append([np.clip(sim.goal - position, -1, 1)])
                position += chunk[-1][0]
            chunks.append(chunk)
        return np.array(chunks)


class Wanderer:
    """Sees observations only, moves by its noise; keeps what it was asked."""

    def __init__(self):
        self.shapes, self.keys = set(), []

    def plan(self, observations, keys, sims, **_):
        self.shapes.add((len(observations), keys.shape))
        self.keys += [tuple(int(k) for k in key) for key in keys[: len(sims)]]
        state = np.stack([o["observation.state"] for o in observations])
        return policies.noise(keys, 4, 1) - 0.1 * state[:, None]


def run(policy, *, batch=4, episodes=30, seed=100, execute_steps=3, **kwargs):
    return rollout.evaluate(
        Line,
        policy,
        episodes=episodes,
        seed=seed,
        execute_steps=execute_steps,
        label="student",
        batch=batch,
        **kwargs,
    )


def test_simulators_go_on_with_episodes_of_their_scene():
    asked = {}

    class Kept(Line):
        def reset(self, seed):
            super().reset(seed)
            asked.setdefault(id(self), []).append(seed % 3)

    sims = [Kept(), Kept()]
    asked.clear()
    common = {"episodes": 30, "seed": 99, "execute_steps": 3, "label": "student", "batch": 2}
    found = rollout.evaluate(iter(sims).__next__, Expert(), **common, scene=lambda seed: seed % 3)
    changes = sum(np.count_nonzero(np.diff(scenes)) for scenes in asked.values())
    assert changes <= 2, "to the third scene"
    assert found == rollout.evaluate(Line, Expert(), **common)


def test_expert_reaches_every_goal_in_the_least_number_of_steps():
    found = run(Expert())
    assert found.rate == 1
    goals = [np.random.default_rng(100 + e).uniform(-5, 5) for e in range(30)]
    assert [e.steps for e in found.episodes] == [
        0 if abs(g) < 0.25 else int(np.floor(abs(g) - 0.25)) + 1 for g in goals
    ]
    assert [e.task for e in found.episodes] == ["left" if g < 0 else "right" for g in goals]
    assert [e.seed for e in found.episodes] == list(range(100, 130))


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_result_does_not_depend_on_the_batch_size(batch):
    found = run(Wanderer(), batch=batch)
    assert found == run(Wanderer(), batch=4)
    assert 0 < found.rate < 1


def test_result_of_an_episode_does_not_depend_on_the_others():
    whole, part = run(Wanderer()), run(Wanderer(), seed=110, episodes=3)
    assert whole.episodes[10:13] == part.episodes


def test_every_inference_has_the_full_batch_and_every_plan_its_own_key():
    policy = Wanderer()
    run(policy)
    assert policy.shapes == {(4, (4, 2))}
    assert len(set(policy.keys)) == len(policy.keys)
    # A failing episode of 20 steps in threes is planned 7 times, from its reset on.
    failed = next(e for e in run(Wanderer()).episodes if not e.success)
    assert [plan for seed, plan in policy.keys if seed == failed.seed] == list(range(7))


def test_only_the_executed_part_of_a_chunk_is_used():
    class Backwards(Expert):
        """Right for two actions, then the other way."""

        def plan(self, observations, keys, sims, **_):
            return super().plan(observations, keys, sims) * np.array([1, 1, -1, -1])[:, None]

    assert run(Backwards(), execute_steps=2).rate == 1
    assert run(Backwards(), execute_steps=4).rate < 1


def test_noise_is_standard_normal_and_a_function_of_the_key():
    keys = np.array([[5, 0], [5, 1], [6, 0]])
    draws = policies.noise(keys, 50, 32)
    np.testing.assert_array_equal(draws[1], policies.noise(keys[1:2], 50, 32)[0])
    assert abs(np.corrcoef(draws.reshape(3, -1))[np.triu_indices(3, 1)]).max() < 0.1
    assert abs(draws.mean()) < 0.05
    assert draws.std() == pytest.approx(1, abs=0.05)
    assert draws.dtype == np.float32


def test_interrupted_evaluation_picks_up_where_it_was(tmp_path):
    path = tmp_path / "student" / "episodes.jsonl"

    class Interrupted(Wanderer):
        def plan(self, observations, keys, sims, **_):
            if len(self.keys) > 60:
                raise KeyboardInterrupt
            return super().plan(observations, keys, sims)

    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(), path=path)
    kept = path.read_text()
    done = {json.loads(line)["seed"] for line in kept.splitlines()}
    assert 0 < len(done) < 30
    path.write_text(kept + '{"seed": 104, "ta')  # killed while writing
    policy = Wanderer()
    assert run(policy, path=path) == run(Wanderer())
    assert not done & {seed for seed, _ in policy.keys}
    # All there: nothing is run.
    policy = Wanderer()
    assert run(policy, path=path) == run(Wanderer())
    assert not policy.keys


def test_damaged_lines_are_run_again_and_a_full_disk_names_the_file(tmp_path, small_disk):
    path = tmp_path / "episodes.jsonl"
    whole = run(Wanderer(), path=path)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[3:], b"{}", b"\xff\0", lines[0][:20]]))
    policy = Wanderer()
    assert run(policy, path=path) == whole
    assert len({seed for seed, _ in policy.keys}) == 3
    with (
        small_disk(path.stat().st_size + 30),
        pytest.raises(OSError, match=r"episodes\.jsonl cannot be written \(.*repeat"),
    ):
        run(Wanderer(), path=path, seed=500)


def test_evaluation_splits_by_task():
    found = run(Wanderer())
    parts = found.by_task()
    assert list(parts) == ["left", "right"]
    assert sum(part.successes for part in parts.values()) == found.successes
    assert all(e.task == "left" for e in parts["left"].episodes)
    low, high = found.wilson()
    assert low < found.rate < high


def test_difference_is_taken_episode_by_episode():
    expert, wanderer = run(Expert()), run(Wanderer())
    found = expert.minus(wanderer)
    assert found.only_a == 30 - wanderer.successes
    assert found.only_b == 0
    with pytest.raises(ValueError, match="same seeds for 'student'"):
        expert.minus(run(Wanderer(), seed=101))


def test_too_short_a_chunk_is_refused():
    with pytest.raises(ValueError, match=r"ah >= 5.*got \(4, 4, 1\).*action horizon"):
        run(Expert(), execute_steps=5)


def test_non_finite_actions_name_the_episode():
    class Broken(Expert):
        def plan(self, observations, keys, sims, **_):
            chunks = super().plan(observations, keys, sims)
            chunks[(keys == [102, 1]).all(1)[: len(sims)], 1] = np.nan
            return chunks

    with pytest.raises(ValueError, match="got nan in plan 1 of seed 102"):
        run(Broken())


@pytest.mark.parametrize("bad", [{"episodes": 0}, {"execute_steps": 0}, {"batch": 0}])
def test_impossible_counts_are_refused(bad):
    with pytest.raises(ValueError, match="at least 1 episode"):
        run(Expert(), **bad)


def test_recording_shows_the_episode_that_was_evaluated():
    (episode,) = run(Wanderer(), seed=103, episodes=1).episodes
    found = rollout.record(Line, Wanderer(), seed=103, execute_steps=3, label="student", batch=4)
    assert found.episode == episode
    frames = found.frames["base"]
    assert frames.shape == (episode.steps + 1, 8, 8, 3)
    assert [int(frame[0, 0, 0]) for frame in frames] == [10 * s for s in range(episode.steps + 1)]
    np.testing.assert_allclose(found.times, np.arange(episode.steps + 1) / 20)
    assert found.prompt.startswith("go ")


class Plan:
    """The plans of `Wanderer` for one episode, one by one: what an executor asks."""

    def __init__(self, seed):
        self.policy, self.seed, self.plans = Wanderer(), seed, 0

    def infer(self, observation):
        (chunk,) = self.policy.plan([observation], np.array([[self.seed, self.plans]]), [None])
        self.plans += 1
        return {"actions": chunk}


@pytest.mark.parametrize("delay", [0, 1, 2, 3, 5])
def test_late_plans_are_executed_as_an_executor_on_a_robot_does(delay, monkeypatch):
    """Step by step with `SkipLateActions`, whose plans come `delay` steps after they are due.

    After 3 steps and more the robot has run out of actions, and stands.
    """
    found = run(
        Wanderer(), episodes=8, execute_steps=2, delay=rollout.Delay(delay, "skip")
    ).episodes
    for episode in found:
        line, worker, last = Line(), Waiting(), np.zeros(1)
        line.reset(episode.seed)

        def stand(_, line=line, worker=worker):
            """The robot's last action, repeated until the plan that it waits for is there."""
            while worker.asked is not None:
                if not line.done:
                    line.step(last)  # noqa: B023
                worker.finish(after=delay)

        monkeypatch.setattr(executors, "_wait_for", stand)
        with executors.SkipLateActions(Plan(episode.seed), 2, worker=worker) as executor:
            while not line.done:
                worker.finish(after=delay if line.steps else 0)
                last = executor.infer(line.observe())["actions"]
                if not line.done:
                    line.step(last)
        assert (line.steps, line.success) == (episode.steps, episode.success)


class Waiting(concurrent.futures.Executor):
    """Does what it is asked at once for the first plan, then when it has waited long enough."""

    def __init__(self):
        self.asked, self.steps = None, 0
        self.late = 0

    def submit(self, function, /, *arguments):
        future = concurrent.futures.Future()
        self.asked, self.steps = (future, function, arguments), 0
        if self.late == 0:
            self.do()
        return future

    def finish(self, after):
        self.late = after
        self.steps += 1
        if self.asked is not None and self.steps >= after:
            self.do()

    def do(self):
        future, function, arguments = self.asked
        self.asked = None
        future.set_result(function(*arguments))


def test_a_late_plan_executed_unchanged_misses_the_goal_that_a_skipping_one_reaches():
    """The goal moves; each plan leads it exactly, for the time it is made at."""
    chunk, before = np.arange(10, 16)[:, None], np.arange(4)[:, None]
    skip, late = (
        rollout.Delay(2, name).due(before, before[0], chunk, 3) for name in ("skip", "late")
    )
    assert [part[:, 0].tolist() for part in skip] == [[0, 1, 12], [13, 14, 15]]
    assert [part[:, 0].tolist() for part in late] == [[0, 1, 10], [11, 12, 13, 14, 15]]
    first = rollout.Delay(2, "late").due(None, None, chunk, 3)
    assert [part[:, 0].tolist() for part in first] == [[10, 11, 12], [13, 14, 15]]


def test_a_robot_without_actions_stands_until_its_plan_is_there():
    # Plans are 5 steps late; 2 actions are left (or none), so that it stands for 3 steps (or 5).
    chunk, before, last = np.arange(10, 16)[:, None], np.array([[1], [2]]), np.array([0])
    skip, late = (rollout.Delay(5, name).due(before, last, chunk, 3) for name in ("skip", "late"))
    assert [part[:, 0].tolist() for part in skip] == [[1, 2, 2, 2, 2, 12], [13, 14, 15]]
    assert [part[:, 0].tolist() for part in late] == [[1, 2, 2, 2, 2, 10], [11, 12, 13, 14, 15]]
    empty = rollout.Delay(5).due(before[:0], last, chunk, 3)
    assert [part[:, 0].tolist() for part in empty] == [[0] * 5 + [10, 11, 12], [13, 14, 15]]
    # The next was due before it came: one action, since a robot that waits asks only after it.
    due, left = rollout.Delay(5).due(before, last, chunk, 2)
    assert (due[:, 0].tolist(), left[:, 0].tolist()) == ([1, 2, 2, 2, 2, 12], [13, 14, 15])


def test_a_plan_that_comes_after_the_next_was_due_is_asked_for_at_once():
    chunk, before = np.arange(10, 18)[:, None], np.arange(8)[:, None]
    due, left = rollout.Delay(5).due(before, before[0], chunk, 3)
    assert (due[:, 0].tolist(), left[:, 0].tolist()) == ([0, 1, 2, 3, 4], [15, 16, 17])


def test_real_time_policys_are_given_what_is_left_of_each_episodes_chunk():
    told = []

    class Guided(Wanderer):
        def plan(self, observations, keys, sims, **conditions):
            told.append((keys[:, 1].tolist(), conditions))
            return super().plan(observations, keys, sims)

    run(Guided(), episodes=6, execute_steps=2, delay=rollout.Delay(1, "real-time"))
    assert told[0][1] == {"previous": None, "delay": 0}
    for plans, conditions in told[1:]:
        if conditions["previous"] is not None:
            assert conditions["delay"] == 1
            lengths = [len(left) for left in conditions["previous"]]
            assert lengths == [0 if plan == 0 else 2 for plan in plans]


def test_a_plan_in_time_goes_on_from_nothing_whatever_late_ones_do():
    left = [np.zeros((2, 3)), None]
    assert rollout.Delay(0, "real-time").previous(left) is None
    assert [len(one) for one in rollout.Delay(1, "real-time").previous(left)] == [2, 0]


def test_impossible_delays_are_refused():
    with pytest.raises(ValueError, match="0 or more control steps late, got -1"):
        rollout.Delay(-1)
