"""Turn prompts into tokens as π0 and π0.5 read them, with a SentencePiece model file.

π0: BOS and the cleaned text, then a newline tokenized apart (openpi's habit, kept because merges
across the border would give other tokens). π0.5 with discrete state writes the normalized state
into the text as 256 bins over [−1, 1]. `train` makes a small vocabulary for the embedded task.
"""

import io
import os
import pathlib
import textwrap
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
from jaxtyping import Bool, Float, Int

from shallow_pi import atomic, progress
from shallow_pi.checkpoints import fetch
from shallow_pi.models import pi0

STATE_BINS = 256
# Texts into which Python and pandas turn an instruction that is not there.
_ABSENT = {"None", "nan", "NaN", "<NA>", "null"}
# PaliGemma's model file, which openpi's checkpoints go with.
PALIGEMMA = "gs://big_vision/paligemma_tokenizer.model"


class Tokenizer:
    """Tokens and their mask, padded with zeros to `max_len`."""

    def __init__(self, path: str | os.PathLike[str], max_len: int) -> None:
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"no SentencePiece model at {self.path}; train one with "
                "shallow_pi.data.robots.tokenizer.train or give the path of the teacher's tokenizer"
            )
        if max_len < 2:
            raise ValueError(f"max_len must be at least 2 (BOS and one token), got {max_len}")
        self.max_len = max_len
        self._has_cut = False
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=os.fspath(self.path))
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"{self.path} is not a SentencePiece model: {error}{fetch.lfs_advice(self.path)}"
            ) from error

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    def warn_of_paligemmas(self) -> None:
        """Warn, where openpi or LeRobot will read the prompts, if this is not PaliGemma's."""
        if self.vocab_size != pi0.PALIGEMMA_VOCAB_SIZE:
            progress.warn(
                "openpi and LeRobot tokenize prompts with PaliGemma's tokenizer, and the student's "
                f"has {self.vocab_size} pieces, not {pi0.PALIGEMMA_VOCAB_SIZE}: replace it there "
                "(LeRobot: tokenizer_name in policy_preprocessor.json), or the student reads other "
                "words"
            )

    def encode(self, prompt: str, state: Float[np.ndarray, " sd"] | None = None) -> list[int]:
        """Tokens of a prompt before padding and truncation; with `state`, π0.5's discrete form."""
        text = clean(prompt)
        if state is not None:
            bins = " ".join(map(str, discretize(state)))
            return self._processor.encode(f"Task: {text}, State: {bins};\nAction: ", add_bos=True)
        return self._processor.encode(text, add_bos=True) + self._processor.encode("\n")

    def tokenize(
        self, prompt: str, state: Float[np.ndarray, " sd"] | None = None
    ) -> tuple[Int[np.ndarray, " t"], Bool[np.ndarray, " t"]]:
        """Tokens and mask of length `max_len`; a longer prompt is cut, and told once."""
        tokens = self.encode(prompt, state)
        if len(tokens) > self.max_len:
            self._warn_of_cut(len(tokens), prompt)
            tokens = tokens[: self.max_len]
        padded = np.zeros(self.max_len, np.int32)
        padded[: len(tokens)] = tokens
        return padded, np.arange(self.max_len) < len(tokens)

    def is_cut(
        self, tokens: Int[np.ndarray, "*n t"], mask: Bool[np.ndarray, "*n t"], with_state: bool
    ) -> Bool[np.ndarray, "*n"]:
        """Mark prompts that `tokenize` cut: they fill their budget and lack every prompt's end."""
        # "\n", or the last three of "Action: ": a space alone may end any word.
        end = self.encode("", np.zeros(0))[-3:] if with_state else self.encode("")[-1:]
        return mask.all(axis=-1) & (tokens[..., -len(end) :] != end).any(axis=-1)

    def decode(self, tokens: Sequence[int] | Int[np.ndarray, " n"]) -> str:
        """Text of tokens, for looking at batches."""
        return self._processor.decode([int(token) for token in tokens])

    def _warn_of_cut(self, length: int, prompt: str) -> None:
        if not self._has_cut:
            self._has_cut = True
            progress.warn(
                f"a prompt has {length} tokens, {self.max_len} fit and the rest is cut: "
                f"{textwrap.shorten(prompt, 60, placeholder='…')!r} (--model.max-token-len)"
            )

    def __getstate__(self) -> dict:
        return {"path": self.path, "max_len": self.max_len}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)  # type: ignore[misc]  # a worker process opens the file anew


def clean(prompt: str) -> str:
    """Strip, and write underscores and newlines as spaces."""
    return prompt.strip().replace("_", " ").replace("\n", " ")


def is_absent(prompt: str) -> bool:
    """True for a text that stands for a missing prompt, such as "None"."""
    return prompt.strip() in _ABSENT


def discretize(state: Float[np.ndarray, " sd"]) -> Int[np.ndarray, " sd"]:
    """Bins 0…255 of a normalized state; below −1 gives −1, as openpi does."""
    return np.digitize(state, bins=np.linspace(-1, 1, STATE_BINS + 1)[:-1]) - 1


def train(prompts: Iterable[str], path: str | os.PathLike[str], vocab_size: int = 512) -> None:
    """Train a small byte-fallback BPE vocabulary on prompts and write it to `path`.

    256 byte pieces, 4 control pieces, ten digits and every letter seen are always there. The
    vocabulary ends up with at most `vocab_size` pieces: few sentences hold few merges.
    """
    sentences = sorted({clean(prompt) for prompt in prompts})
    if not any(sentences):
        raise ValueError("cannot train a tokenizer without prompts; got none or only empty ones")
    sentences += ["Task: , State: ;", "Action: "]
    smallest = 256 + 4 + 10 + len(set("".join(sentences)) - set("0123456789"))
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: bytes, control pieces, digits and the letters "
            f"of these prompts need {smallest}"
        )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        byte_fallback=True,
        split_digits=True,
        user_defined_symbols=[str(digit) for digit in range(10)],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,  # as PaliGemma's: "\n" alone is one token
        num_threads=1,
        minloglevel=2,
    )
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(target, model.getvalue())
