"""Both prompt forms piece by piece, padding and truncation, and a reproducible vocabulary."""

import pathlib
import pickle

import numpy as np
import pytest

from shallow_pi.data.robots import tokenizer

PROMPTS = ["touch the red block", "touch the blue block", "put the peg into the green cup"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    tokenizer.train(PROMPTS, path)
    return path


def _pieces(tokens: tokenizer.Tokenizer, ids: list[int]) -> list[str]:
    return [tokens._processor.id_to_piece(int(i)) for i in ids]


def test_pi0_prompt_is_bos_text_and_a_newline_apart(model) -> None:
    tokens = tokenizer.Tokenizer(model, 16)
    ids, mask = tokens.tokenize(" touch the_red\nblock \n")
    pieces = ["<s>", "touch", "▁the", "▁red", "▁block", "<0x0A>"]
    assert _pieces(tokens, ids[:6]) == pieces
    assert ids[0] == 2
    np.testing.assert_array_equal(ids[6:], 0)
    np.testing.assert_array_equal(mask, [True] * 6 + [False] * 10)
    assert (ids.dtype, mask.dtype) == (np.int32, np.bool_)


def test_pi05_prompt_holds_the_state_in_bins(model) -> None:
    tokens = tokenizer.Tokenizer(model, 64)
    state = np.array([-1.0, 0.0, 0.5, 1.0, 2.0, -2.0])
    ids, mask = tokens.tokenize("touch the red block", state)
    text = "Task: touch the red block, State: 0 128 192 255 255 -1;\nAction: "
    assert tokens.decode(ids[mask]) == text
    assert ids[0] == 2


def test_bins_split_the_range_into_256() -> None:
    edges = np.linspace(-1, 1, 257)
    np.testing.assert_array_equal(tokenizer.discretize(edges[:-1]), np.arange(256))
    np.testing.assert_array_equal(tokenizer.discretize(edges[1:] - 1e-9), np.arange(256))


def test_long_prompt_is_cut_and_told_once(model, capsys) -> None:
    tokens = tokenizer.Tokenizer(model, 4)
    for _ in range(2):
        found, mask = tokens.tokenize("put the peg into the green cup")
    np.testing.assert_array_equal(found, tokens.encode("put the peg into the green cup")[:4])
    assert mask.all()
    told = capsys.readouterr().err
    assert told.count("tokens, 4 fit") == 1
    assert "'put the peg into the green cup'" in told


def test_unknown_words_fall_back_to_bytes(model) -> None:
    tokens = tokenizer.Tokenizer(model, 64)
    ids = tokens.encode("Überzug 7")
    assert 3 not in ids
    assert tokens.decode(ids) == "Überzug 7\n"


def test_training_is_deterministic_and_small(model, tmp_path) -> None:
    tokenizer.train(reversed(PROMPTS), tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()
    assert model.stat().st_size < 300_000
    tokens = tokenizer.Tokenizer(model, 8)
    assert tokens.vocab_size <= 512
    assert _pieces(tokens, [0, 1, 2, 3]) == ["<pad>", "</s>", "<s>", "<unk>"]


def test_tokenizer_can_be_sent_to_another_process(model) -> None:
    tokens = tokenizer.Tokenizer(model, 12)
    copy = pickle.loads(pickle.dumps(tokens))
    np.testing.assert_array_equal(copy.tokenize(PROMPTS[0]), tokens.tokenize(PROMPTS[0]))


def test_bad_input_raises(model, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no SentencePiece model at"):
        tokenizer.Tokenizer(tmp_path / "absent.model", 8)
    (tmp_path / "garbage.model").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        tokenizer.Tokenizer(tmp_path / "garbage.model", 8)
    with pytest.raises(ValueError, match="max_len must be at least 2"):
        tokenizer.Tokenizer(model, 1)
    with pytest.raises(ValueError, match="without prompts"):
        tokenizer.train([], tmp_path / "none.model")
    with pytest.raises(ValueError, match=r"vocab_size 280 is too small.* need 29\d"):
        tokenizer.train(PROMPTS, tmp_path / "tiny.model", vocab_size=280)
