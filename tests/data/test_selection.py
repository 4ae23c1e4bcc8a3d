"""Episodes are chosen by number, range and file; whatever names none of them is refused."""

import dataclasses

import numpy as np
import pytest

from shallow_pi.data import data_config, opening
from shallow_pi.data.lerobot import selection

KNOWN = [0, 1, 2, 3, 5, 6, 7, 9]


@pytest.mark.parametrize(
    ("episodes", "exclude", "expected"),
    [
        ((), (), KNOWN),
        (("7",), (), [7]),
        (("5", "0:3"), (), [0, 1, 2, 5]),
        (("0,5:7",), (), [0, 5, 6]),
        (("6:",), (), [6, 7, 9]),
        ((":2",), (), [0, 1]),
        (("0:10",), ("1:4", "9"), [0, 5, 6, 7]),
        ((), ("0:6,9",), [6, 7]),
    ],
)
def test_numbers_and_ranges_name_episodes(episodes, exclude, expected) -> None:
    assert selection.Selection(episodes, exclude).of(KNOWN) == expected


@pytest.mark.parametrize("text", ["1\n5:7\r\n# bad ones\n9 # late", "[1, 5, 6, 9]", "1 5:7,9"])
def test_a_file_names_episodes(tmp_path, text) -> None:
    path = tmp_path / "bad ones.txt"
    path.write_text(text, encoding="utf-8-sig")
    assert selection.Selection(exclude=(str(path),)).of(KNOWN) == [0, 2, 3, 7]


@pytest.mark.parametrize(
    ("episodes", "exclude", "message"),
    [
        (("4",), (), "--data.episodes: there is no episode 4; the dataset has 8 episodes, 0 to 9"),
        (("0:11",), (), "0:11 reaches beyond the dataset"),
        ((), ("4:5",), "--data.exclude-episodes: 4:5 reaches beyond the dataset"),
        (("0:2",), (":3",), "no episodes are left: 0:2 without :3, of 8"),
        (("-1",), (), "'-1' is neither a number .* nor a file"),
        (("folder",), (), r"--data\.episodes: folder cannot be read \("),
        (("words.txt",), (), "words.txt holds 'one', expected numbers"),
    ],
)
def test_words_that_name_no_episode_are_told(
    tmp_path, monkeypatch, episodes, exclude, message
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "words.txt").write_text("1 one")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        selection.Selection(episodes, exclude).of(KNOWN)


def test_a_run_sees_the_chosen_episodes_alone(tiny_dataset, tiny_config) -> None:
    path, words = map(str, tiny_dataset)
    data = data_config.DataConfig(path=path, tokenizer=words, exclude_episodes=("1",))
    model = tiny_config(vocab_size=320, max_token_len=12)
    found = opening.open_data(data, model, None)
    assert len(found.train) == 9 + 8
    again = dataclasses.replace(data, episodes=("0:2",), held_out=0.0)
    alone = opening.open_data(again, model, None)
    assert len(alone.train) == 9
    state = alone.train.dataset.columns["observation.state"]
    np.testing.assert_allclose(alone.assets.stats["state"].mean, state.mean(0), rtol=1e-5)


def test_of_several_datasets_each_word_says_which(tiny_dataset, tiny_config) -> None:
    path, words = map(str, tiny_dataset)
    data = data_config.DataConfig(
        path=path,
        more=(path,),
        tokenizer=words,
        episodes=("0/0", "1/1:3"),
        exclude_episodes=("1/2",),
    )
    found = opening.open_data(data, tiny_config(vocab_size=320, max_token_len=12), None)
    assert [len(part) for part in found.train.sources] == [9, 7]
    for word in ("3", "2/3"):
        with pytest.raises(ValueError, match=rf"'{word}' does not say which of the 2 datasets"):
            dataclasses.replace(data, episodes=(word,))
