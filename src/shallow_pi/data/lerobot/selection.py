"""Episodes by number, range or file, for `--data.episodes` and `--data.exclude-episodes`.

`7` is one episode, `0:50` fifty (the end is excluded, as in LeRobot's splits), `100:` and `:20` are
open ranges. Commas separate several. Any other word names a file of such words, with `#` comments.
"""

import dataclasses
import pathlib
import re
from collections.abc import Collection

# The flags, for errors.
_EPISODES, _EXCLUDED = "--data.episodes", "--data.exclude-episodes"
_NUMBER = re.compile(r"\d+")
_RANGE = re.compile(r"(\d*):(\d*)")


@dataclasses.dataclass(frozen=True)
class Selection:
    """Episodes to use (empty: all), and episodes to leave out."""

    episodes: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def of(self, known: Collection[int]) -> list[int]:
        """The chosen episodes of a dataset, in order.

        Raises:
          ValueError: a word that is not a number, range or file, or names no episode of the
            dataset; or no episode is left.
          FileNotFoundError: a missing file.
        """
        chosen = _named(_EPISODES, self.episodes, known) if self.episodes else set(known)
        left = sorted(chosen - _named(_EXCLUDED, self.exclude, known))
        if not left:
            raise ValueError(
                f"{_EPISODES}, {_EXCLUDED}: no episodes are left: "
                f"{_shown(self.episodes) or 'all'} without {_shown(self.exclude) or 'any'}, of "
                f"{len(known)}"
            )
        return left


def _named(flag: str, words: Collection[str], known: Collection[int]) -> set[int]:
    found: set[int] = set()
    for word in words:
        for part in word.split(","):
            found |= _one(flag, part.strip(), known) if part.strip() else set()
    return found


def _one(flag: str, word: str, known: Collection[int]) -> set[int]:
    there = f"the dataset has {len(known)} episodes, {min(known)} to {max(known)}"
    if _NUMBER.fullmatch(word):
        if int(word) not in known:
            raise ValueError(f"{flag}: there is no episode {word}; {there}")
        return {int(word)}
    if match := _RANGE.fullmatch(word):
        first = int(match[1] or min(known))
        end = int(match[2] or max(known) + 1)
        found = {episode for episode in known if first <= episode < end}
        if not found or end > max(known) + 1:
            raise ValueError(f"{flag}: {word} reaches beyond the dataset; {there}")
        return found
    path = pathlib.Path(word).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{flag}: {word!r} is neither a number (7), a range (0:50) nor a file of such words"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag}: {path} cannot be read ({error})") from error
    words = re.sub(r"#.*", "", text).replace("[", " ").replace("]", " ").split()
    for inner in words:
        if not re.fullmatch(r"[\d:,]*", inner):
            raise ValueError(
                f"{flag}: {path} holds {inner!r}, expected numbers (7) and ranges (0:50)"
            )
    return _named(flag, words, known)


def _shown(words: Collection[str]) -> str:
    return " ".join(words)
