"""A difference between processes is found and reported with the process that differs."""

import dataclasses
import pathlib

import numpy as np

from shallow_pi.data import sources
from shallow_pi.models import pi0
from shallow_pi.parallel import agreement

MODEL = pi0.Pi0Config(
    cameras=("base",), image_size=14, action_dim=3, action_horizon=2, max_token_len=4
)
SOURCE = sources.SyntheticSource(MODEL, length=10)


class Changed:
    """The samples of `SOURCE`, each changed by a function."""

    def __init__(self, change, length=10):
        self._change, self._length = change, length

    def __len__(self):
        return self._length

    def __getitem__(self, i):
        return self._change(SOURCE[i])


@dataclasses.dataclass(frozen=True)
class Inner:
    peak_rate: float = 0.1
    layers: tuple[int, ...] = (0, 3)


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 1
    inner: Inner = dataclasses.field(default_factory=Inner)
    teacher: Inner | None = None


def test_equal_facts_differ_in_nothing():
    assert agreement.differences([agreement.facts(dataclasses.asdict(Config()), SOURCE)] * 3) == []


def test_a_difference_names_the_field_and_the_few_after_the_many():
    found = [agreement.facts(dataclasses.asdict(Config()), SOURCE) for _ in range(4)]
    found[2] = agreement.facts(
        dataclasses.asdict(Config(seed=2, inner=Inner(layers=(0, 2)))), SOURCE
    )
    found[3] = found[3] | {"jax": "0.1"}
    del found[0]["numpy"]
    numpy = found[1]["numpy"]
    assert agreement.differences(found) == [
        "--seed: 1 in process 0, 1 and 3; 2 in process 2",
        "--inner.layers: (0, 3) in process 0, 1 and 3; (0, 2) in process 2",
        f"jax: {found[0]['jax']} in process 0, 1 and 2; 0.1 in process 3",
        f"numpy: {numpy} in process 1, 2 and 3; absent in process 0",
    ]


def test_of_many_processes_the_first_are_named():
    found = [{"seed": "1"}] * 30 + [{"seed": "2"}]
    (line,) = agreement.differences(found)
    assert line == "seed: 1 in process 0, 1, 2, 3, 4, 5, 6, 7 and 22 more; 2 in process 30"


def test_a_field_that_is_a_part_here_and_none_there_differs():
    one, other = Config(), Config(teacher=Inner())
    lines = agreement.differences(
        [agreement.facts(dataclasses.asdict(each), SOURCE) for each in (one, other)]
    )
    assert [line.partition(":")[0] for line in lines] == [
        "--teacher",
        "--teacher.peak-rate",
        "--teacher.layers",
    ]


def test_samples_that_differ_are_seen_and_the_last_bits_are_not():
    def hashed(change, length=10):
        return agreement.sample_hash(Changed(change, length))

    same = agreement.sample_hash(SOURCE)

    def seen(**changes):
        def change(sample):
            found = {name: one(getattr(sample.observation, name)) for name, one in changes.items()}
            return sample.replace(observation=sample.observation.replace(**found))

        return hashed(change)

    assert seen() == same
    assert seen(state=lambda x: np.nextafter(x, np.float32(9))) == same
    assert hashed(lambda sample: sample.replace(actions=sample.actions + 0.01)) != same
    assert seen(tokenized_prompt=lambda x: x + 1) != same
    assert hashed(lambda sample: sample, length=9) != same


def test_the_sources_decide_the_hash_of_the_code(tmp_path, monkeypatch):
    package = tmp_path / "training"
    package.mkdir()
    monkeypatch.setattr(agreement, "__file__", str(package / "agreement.py"))
    seen = set()
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.py", ""), ("notes.txt", "x")):
        (package / name).write_text(text)
        seen.add(agreement.code_hash())
    assert len(seen) == 3


def test_one_process_agrees_with_itself(tmp_path):
    agreement.check(dataclasses.asdict(Config()), SOURCE)
    agreement.check_shared(tmp_path / "absent")
    assert not pathlib.Path(tmp_path / "absent").exists()
