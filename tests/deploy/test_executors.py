"""Executors, step by step: when a chunk is requested, and which of its actions is due."""

import concurrent.futures
import threading

import numpy as np
import pytest

from shallow_pi.deploy import executors

HORIZON = 6


class Counting:
    """Chunks of (chunk, index) pairs; keeps what it was asked. Observations are control steps."""

    def __init__(self, horizons=(HORIZON,)):
        self.asked, self.resets, self.horizons = [], 0, horizons

    def infer(self, observation):
        self.asked.append(int(observation["step"][0]))
        plan = len(self.asked) - 1
        horizon = self.horizons[min(plan, len(self.horizons) - 1)]
        actions = np.array([[plan, index] for index in range(horizon)])
        return {"actions": actions, "timing": {"infer_ms": 1.0}}

    def reset(self):
        self.resets += 1


class GoingOn(Counting):
    """The same, and keeps what it was told of the previous chunk."""

    def __init__(self):
        super().__init__()
        self.told = []

    def infer(self, observation, *, previous=None, delay=0):
        self.told.append(None if previous is None else (previous.tolist(), delay))
        return super().infer(observation)


class Later(concurrent.futures.Executor):
    """Runs submitted work when the test says so."""

    def __init__(self):
        self.waiting = []

    def submit(self, function):
        future = concurrent.futures.Future()
        self.waiting.append((future, function))
        return future

    def finish(self):
        while self.waiting:
            future, function = self.waiting.pop(0)
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except ValueError as error:
                    future.set_exception(error)


class AtOnce(Later):
    def submit(self, function):
        future = super().submit(function)
        self.finish()
        return future


def clock_of(worker, seconds):
    """A clock on which every plan the robot waits for takes `seconds`; starting to wait ends it."""
    now = [0.0]

    def clock():
        if worker.waiting:
            worker.finish()
            now[0] += seconds
            return now[0] - seconds
        return now[0]

    clock.now = now
    return clock


def run(executor, worker, steps, delay, start=0):
    """Actions of `steps` control steps; plans are ready `delay` steps after the request."""
    found, age = [], 0
    for step in range(start, start + steps):
        age = age + 1 if worker.waiting else 0
        if age >= delay:
            worker.finish()
        found.append(executor.infer({"step": np.array([step])}))
        age = age if worker.waiting else 0
    return [tuple(int(x) for x in result["actions"]) for result in found]


def test_a_broker_gives_the_whole_chunk_one_by_one():
    policy = Counting()
    broker = executors.ActionChunkBroker(policy)
    found = [broker.infer({"step": np.array([step])}) for step in range(8)]
    assert [tuple(r["actions"]) for r in found] == [(0, i) for i in range(6)] + [(1, 0), (1, 1)]
    assert policy.asked == [0, 6]
    assert found[0]["timing"] == {"infer_ms": 1.0}
    assert found[0]["late_steps"] == 0


def test_a_receding_horizon_plans_again_before_the_end():
    policy = Counting()
    broker = executors.ActionChunkBroker(policy, execute_steps=2)
    found = [tuple(broker.infer({"step": np.array([s])})["actions"]) for s in range(5)]
    assert found == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert policy.asked == [0, 2, 4]


def test_a_reset_forgets_the_chunk_and_resets_the_policy():
    policy = Counting()
    broker = executors.ActionChunkBroker(policy)
    broker.infer({"step": np.array([0])})
    broker.reset()
    assert tuple(broker.infer({"step": np.array([0])})["actions"]) == (1, 0)
    assert policy.resets == 1


def test_no_time_to_plan_makes_skipping_the_receding_horizon():
    policy, worker = Counting(), AtOnce()
    executor = executors.SkipLateActions(policy, 2, worker=worker)
    found = [tuple(executor.infer({"step": np.array([s])})["actions"]) for s in range(5)]
    assert found == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert policy.asked == [0, 2, 4]


@pytest.mark.parametrize("executor", [executors.SkipLateActions, executors.RealTimeChunking])
def test_a_plan_that_comes_late_loses_its_first_actions(executor):
    policy, worker = GoingOn(), Later()
    asynchronous = executor(policy, 3, worker=worker, clock=clock_of(worker, 0.0))
    found = run(asynchronous, worker, 10, delay=2)
    # Asked at step 3, there at step 5: its actions of steps 3 and 4 are the old chunk's.
    assert found[:5] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)]
    # Three of its actions were due at step 6, where the next is asked for.
    assert found[5:8] == [(1, 2), (1, 3), (1, 4)]
    assert found[8:] == [(2, 2), (2, 3)]
    assert asynchronous.infer({"step": np.array([10])})["late_steps"] == 2
    worker.finish()
    assert policy.asked == [0, 3, 6, 9]


class Robot:
    """Moves at most one unit per control step towards its target.

    Its policy leads on from the position it sees, one unit a step.
    """

    def __init__(self, horizon):
        self.position, self.horizon, self.jumps = 0.0, horizon, []

    def infer(self, observation, *, previous=None, delay=0):
        start = observation["arm"]["joints"][0]
        return {"actions": (start + 1 + np.arange(self.horizon))[:, None]}

    def drive(self, executor, steps, before_step=lambda step: None):
        # One buffer for all observations, as a driver of a robot has it.
        joints = np.zeros(1)
        for step in range(steps):
            before_step(step)
            joints[:] = self.position
            command = executor.infer({"arm": {"joints": joints}})["actions"][0]
            self.jumps.append(command - self.position)
            self.position = command


@pytest.mark.parametrize("hz", [None, 50.0])
@pytest.mark.parametrize("delay", [0, 2, 1000])
@pytest.mark.parametrize("execute_steps", [1, 4, 7, 10])
@pytest.mark.parametrize("kind", [executors.SkipLateActions, executors.RealTimeChunking])
def test_no_action_is_further_than_the_robot_can_have_come(kind, execute_steps, delay, hz):
    """Chunks take longer than the actions last: the robot stops, and continues from there.

    In the middle nobody asks for two minutes, as when an operator stops it.
    """
    worker, robot = Later(), Robot(horizon=10)
    clock = clock_of(worker, 8 / 50)
    waiting = []

    def before_step(step):
        if step == 30:
            clock.now[0] += 120.0
        waiting.append(bool(worker.waiting))
        if sum(waiting[-delay - 1 :]) > delay:
            worker.finish()

    executor = kind(robot, execute_steps, control_hz=hz, worker=worker, clock=clock)
    robot.drive(executor, 60, before_step)
    assert robot.jumps == [1.0] * 60


def test_a_broker_continues_from_the_robots_position():
    robot = Robot(horizon=10)
    robot.drive(executors.ActionChunkBroker(robot, 7), 30)
    assert robot.jumps == [1.0] * 30


def test_a_starved_robot_skips_what_it_executed_and_counts_how_long_it_stood():
    """Out of actions at step 6; the chunk requested at step 5 takes another 0.2 s."""
    for hz, late in ((None, 1), (10.0, 3)):
        policy, worker = Counting(), Later()
        clock = clock_of(worker, 0.2)
        executor = executors.SkipLateActions(policy, 5, control_hz=hz, worker=worker, clock=clock)
        found = run(executor, worker, 6, delay=100)
        # The wait for the first chunk costs no actions: nothing moves yet.
        assert found == [(0, i) for i in range(6)]
        result = executor.infer({"step": np.array([6])})
        assert tuple(result["actions"]) == (1, 1)
        assert result["late_steps"] == late


def test_a_chunk_that_is_over_when_it_comes_is_asked_for_anew():
    policy, worker = Counting(horizons=(6, 3, 6)), Later()
    executor = executors.SkipLateActions(policy, 2, worker=worker, clock=clock_of(worker, 0.0))
    found = run(executor, worker, 8, delay=100)
    assert found[5:] == [(0, 5), (2, 0), (2, 1)]
    assert policy.asked == [0, 2, 6]


def test_a_robot_may_change_the_action_it_is_given():
    policy, worker = GoingOn(), Later()
    executor = executors.RealTimeChunking(policy, 1, worker=worker, clock=clock_of(worker, 0.0))
    for step in range(2):
        executor.infer({"step": np.array([step])})["actions"][:] = -1
    worker.finish()
    assert policy.told == [None, ([[0, i] for i in range(1, 6)], 1)]


def test_real_time_plans_are_told_what_is_left_and_how_late_they_will_be():
    policy, worker = GoingOn(), Later()
    clock = clock_of(worker, 0.0)
    executor = executors.RealTimeChunking(policy, 3, delay=1, worker=worker, clock=clock)
    run(executor, worker, 4, delay=2)
    worker.finish()
    first, second = policy.told
    assert first is None
    # As expected at first, then as late as the latest was.
    assert second == ([[0, 3], [0, 4], [0, 5]], 1)
    run(executor, worker, 3, delay=2, start=4)
    worker.finish()
    assert policy.told[2] == ([[1, 3], [1, 4], [1, 5]], 1)
    executor.reset()
    run(executor, worker, 4, delay=3)
    worker.finish()
    assert policy.told[-2:] == [None, ([[3, 3], [3, 4], [3, 5]], 1)]


def test_real_time_delays_are_the_largest_of_the_last_and_never_more_than_is_left():
    policy, worker = GoingOn(), Later()
    clock = clock_of(worker, 0.0)
    executor = executors.RealTimeChunking(
        policy, 4, delay=0, remember=2, worker=worker, clock=clock
    )
    # Late by 2, 1, 1 and 1 steps in turn.
    wanted = iter([2, 1, 1, 1])
    due = None
    for step in range(21):
        if worker.waiting and due is None:
            due = next(wanted)
        if worker.waiting:
            due -= 1
            if due == 0:
                worker.finish()
                due = None
        executor.infer({"step": np.array([step])})
    delays = [delay for _, delay in filter(None, policy.told)]
    assert delays[:4] == [0, 2, 2, 1]


def test_what_goes_wrong_in_the_background_is_raised_by_the_next_call_and_then_over():
    policy, worker = Counting(), Later()
    executor = executors.SkipLateActions(policy, 2, worker=worker, clock=clock_of(worker, 0.0))
    run(executor, worker, 3, delay=100)
    good, policy.infer = policy.infer, None

    def broken():
        raise ValueError("the camera is unplugged")

    future, _ = worker.waiting.pop()
    worker.waiting.append((future, broken))
    worker.finish()
    with pytest.raises(ValueError, match="the camera is unplugged"):
        executor.infer({"step": np.array([3])})
    policy.infer = good
    # Nothing was executed by the call that failed.
    assert run(executor, worker, 1, delay=100, start=3) == [(0, 3)]
    worker.finish()
    assert run(executor, worker, 1, delay=100, start=4) == [(1, 1)]


def test_a_thread_plans_while_actions_go_on_and_is_ended():
    class Held(Counting):
        """Its second plan waits to be let go."""

        def __init__(self):
            super().__init__()
            self.go, self.threads = threading.Event(), set()

        def infer(self, observation):
            self.threads.add(threading.current_thread())
            if self.asked:
                assert self.go.wait(20)
            return super().infer(observation)

    policy = Held()
    with executors.SkipLateActions(policy, 2) as executor:
        found = [tuple(executor.infer({"step": np.array([s])})["actions"]) for s in range(4)]
        assert found == [(0, 0), (0, 1), (0, 2), (0, 3)]
        policy.go.set()
        concurrent.futures.wait([executor._pending[0]], 20)
        assert tuple(executor.infer({"step": np.array([4])})["actions"]) == (1, 2)
    executor.close()
    (thread,) = policy.threads
    assert thread is not threading.current_thread()
    assert not thread.is_alive()
    with pytest.raises(ValueError, match="closed: make a new one"):
        executor.infer({"step": np.array([5])})


def test_a_policy_that_does_not_answer_is_told_of(monkeypatch, capsys):
    class Stuck(Counting):
        def infer(self, observation):
            assert go.wait(20)
            return super().infer(observation)

    go = threading.Event()
    monkeypatch.setattr(executors, "SILENT", 0.05)
    timer = threading.Timer(0.3, go.set)
    with executors.SkipLateActions(Stuck(), 2) as executor:
        timer.start()
        executor.infer({"step": np.array([0])})
    timer.join()
    assert "has not answered for 0.05 s" in capsys.readouterr().err


def test_a_wrapper_that_hands_on_what_it_is_given_chunks_in_real_time():
    class Wrapper:
        def __init__(self):
            self.inner = GoingOn()

        def infer(self, observation, **options):
            return self.inner.infer(observation, **options)

    policy = Wrapper()
    worker = AtOnce()
    run(executors.RealTimeChunking(policy, 2, worker=worker), worker, 3, delay=0)
    assert policy.inner.told[0] is None
    assert policy.inner.told[1] == ([[0, 2], [0, 3], [0, 4], [0, 5]], 1)


def test_a_reset_drops_the_plan_of_the_last_episode():
    policy, worker = Counting(), Later()
    executor = executors.SkipLateActions(policy, 2, worker=worker, clock=clock_of(worker, 0.0))
    run(executor, worker, 3, delay=100)
    executor.reset()
    assert run(executor, worker, 2, delay=100) == [(1, 0), (1, 1)]
    assert (policy.asked, policy.resets) == ([0, 0], 1)


@pytest.mark.parametrize("told", ["metadata", "get_server_metadata"])
def test_a_rate_that_is_not_the_trainings_warns(told, capsys):
    class Trained(Counting):
        """At 20 actions a second, as a policy or as openpi's client of one says it."""

    facts = {"fps": 20}
    setattr(Trained, told, facts if told == "metadata" else lambda self: facts)
    for same in (20, 20.0, 20.02, None):
        executors.SkipLateActions(Trained(), 2, control_hz=same).close()
    executors.SkipLateActions(Counting(), 2, control_hz=50).close()
    facts["fps"] = 0  # Not known.
    executors.SkipLateActions(Trained(), 2, control_hz=50).close()
    facts["fps"] = 20
    assert not capsys.readouterr().err
    executors.SkipLateActions(Trained(), 2, control_hz=50).close()
    said = capsys.readouterr().err
    assert "trained at 20 actions a second, and control_hz is 50" in said
    assert "2.5 times as fast" in said


@pytest.mark.parametrize("kind", [executors.ActionChunkBroker, executors.SkipLateActions])
def test_a_chunk_under_way_when_another_thread_resets_is_not_executed(kind):
    """As when an operator ends the episode from a keyboard's thread."""

    class Held(Counting):
        def infer(self, observation):
            begun.set()
            assert go.wait(20)
            return super().infer(observation)

    begun, go = threading.Event(), threading.Event()
    executor = kind(Held(), 2)
    robot = threading.Thread(target=executor.infer, args=({"step": np.array([0])},))
    operator = threading.Thread(target=executor.reset)
    robot.start()
    assert begun.wait(20)
    operator.start()
    operator.join(0.2)
    go.set()
    for thread in (robot, operator):
        thread.join(20)
    assert tuple(executor.infer({"step": np.array([0])})["actions"]) == (1, 0)
    getattr(executor, "close", lambda: None)()


def test_a_thread_that_waits_for_a_reset_finds_the_delays_of_the_new_episode():
    class Lock:
        """Lets a thread that waits for it go on as soon as it is free."""

        def __enter__(self):
            pass

        def __exit__(self, *_):
            executor._lock = threading.Lock()
            run(executor, worker, 4, delay=0)

    policy, worker = GoingOn(), Later()
    executor = executors.RealTimeChunking(
        policy, 3, delay=1, worker=worker, clock=clock_of(worker, 0.0)
    )
    run(executor, worker, 6, delay=2)
    executor._lock = Lock()
    executor.reset()
    worker.finish()
    assert policy.told[-2:] == [None, ([[2, 3], [2, 4], [2, 5]], 1)]


def test_a_clock_that_is_set_back_is_no_negative_delay():
    policy, worker = GoingOn(), Later()
    clock = clock_of(worker, -5.0)
    options = {"control_hz": 50.0, "worker": worker, "clock": clock, "remember": 1}
    executor = executors.RealTimeChunking(policy, 5, **options)
    run(executor, worker, 8, delay=100)
    assert executor.infer({"step": np.array([8])})["late_steps"] == 1
    worker.finish()
    assert [delay for _, delay in filter(None, policy.told)] == [1]
    run(executor, worker, 3, delay=100, start=9)
    worker.finish()
    assert [delay for _, delay in filter(None, policy.told)] == [1, 1]


def test_what_cannot_be_executed_is_an_error():
    with pytest.raises(ValueError, match="execute_steps must be at least 1, got 0"):
        executors.ActionChunkBroker(Counting(), 0)
    for hz in (0, np.inf, np.nan):
        with pytest.raises(ValueError, match=f"control_hz must be positive and finite, got {hz}"):
            executors.SkipLateActions(Counting(), 2, control_hz=hz)
    with pytest.raises(ValueError, match=r"Counting.infer takes \['observation'\]: real-time"):
        executors.RealTimeChunking(Counting(), 2)
    with pytest.raises(ValueError, match="expected delay >= 0 and remember >= 1, got -1 and 10"):
        executors.RealTimeChunking(GoingOn(), 2, delay=-1)
    too_short = r"horizon >= 7 executed steps, dimensions\), got int64 of the shape \(6, 2\)"
    with pytest.raises(ValueError, match=too_short):
        executors.ActionChunkBroker(Counting(), 7).infer({"step": np.array([0])})
    with pytest.raises(ValueError, match=too_short):
        executors.SkipLateActions(Counting(), 7, worker=AtOnce()).infer({"step": np.array([0])})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"actions": np.array([[0, 1], [0, np.nan], [np.inf, 1]])}, "nan in dimension 1 of action"),
        ({"error": "busy"}, r"a mapping with 'actions' .*, got \['error'\]"),
        (None, "got NoneType"),
        ({"actions": [["left", "right"]]}, "got <U5 of the shape"),
    ],
    ids=["not-finite", "no-actions", "no-mapping", "words"],
)
def test_a_policys_wrong_answer_never_reaches_the_robot(answer, message):
    class Wrong:
        def infer(self, observation):
            return answer

    observation = {"step": np.array([0])}
    with pytest.raises(ValueError, match=message):
        executors.ActionChunkBroker(Wrong()).infer(observation)
    executor = executors.SkipLateActions(Wrong(), 1, worker=AtOnce())
    for _ in range(2):  # The next call asks again.
        with pytest.raises(ValueError, match=message):
            executor.infer(observation)
