"""Names and patterns: PEFT's rules, and patterns of strangers that are matched in bounded time."""

from __future__ import annotations

import contextlib
import random
import re
import time

import pytest

from lowrank_kernels.targets import BoundedPatterns, check_all_match, matches

NAME = "model.layers.10.self_attn.q_proj"

BOMBS = [
    r"([a-z._0-9]+)*!", r"(.*)*!", r"(a|a)*!", r"(\w|.)+!", r"(?:(.|[a-z])+)+\d!", r"(.*a){60}!",
    r"((a?){65535}){65535}", r"(a{65535}){65535}!", r"((((.?){999}){999}){999}){999}!",
    "(" * 90 + "." + ")*" * 90 + "!", r"(?:(?=(.*)*!)|.)*!", r"(?=(?=(?=.*).*).*)*!",
]  # fmt: skip


@pytest.mark.parametrize("pattern", BOMBS, ids=range(len(BOMBS)))
def test_a_bomb_ends_soon(pattern):
    patterns, start = BoundedPatterns("file"), time.process_time()
    with contextlib.suppress(ValueError):  # the steps may be used up
        for _ in range(20):
            assert not patterns.fullmatch(pattern, NAME * 3)
            assert not patterns.matches_end(pattern, NAME * 3)
    assert time.process_time() - start < 30  # a second at most here; re takes years


@pytest.mark.parametrize("pattern", ["a|" * 50_000, "(?:.|a)" * 20_000])
def test_the_steps_of_a_file_are_limited(pattern):
    patterns = BoundedPatterns("some/file.json", steps=100_000)
    with pytest.raises(ValueError, match=r"^some/file.json: its regular expressions take too long"):
        for _ in range(100):
            patterns.fullmatch(pattern, NAME)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", "missing"), ("a**", "multiple repeat"), (r"(a)\1", "groupref"),
        ("(?i)a", "flags are not supported"), ("(?P<x>a)(?P=x)", "groupref"),
        ("(" * 5000 + ")" * 5000, "recursion"), ("(?<=a+)b", "fixed-width"),
    ],
)  # fmt: skip
def test_what_cannot_be_matched_is_refused(pattern, words):
    with pytest.raises(ValueError, match=f"^file: rank_pattern: expected regular.*{words}"):
        BoundedPatterns("file").check(pattern, "rank_pattern")


def random_pattern(random: random.Random, depth: int) -> str:
    def part() -> str:
        return random_pattern(random, depth - 1)

    kind = random.randrange(14)
    if depth == 0 or kind < 4:
        atoms = ["a", "b", r"\.", ".", r"\d", r"\w", r"\S", "[ab]", "[^a.]", "[a-c0-3]"]
        return random.choice([*atoms, "^", "$", r"\b", r"\B", ""])
    if kind == 4:
        return f"(?:{part()}|{part()})"
    if kind == 5:
        return f"({part()})" + random.choice(["*", "+", "?", "{2}", "{1,3}", "*?", "{0,2}", "{3,}"])
    if kind == 6:
        return random.choice(["(?=", "(?!", "(?<=", "(?<!"]) + part() + ")"
    if kind == 7:
        return random.choice(["a", "b", "."]) + random.choice(["*", "+", "?", "{2,}"])
    return part() + part()


def test_matches_as_re_does():
    choose, seen = random.Random(0), 0
    for _ in range(5000):
        pattern = random_pattern(choose, 4)
        name = "".join(choose.choice("ab.1c") for _ in range(choose.randrange(1, 7)))
        bounded = BoundedPatterns("file")
        try:
            re.compile(pattern)
        except re.error:
            with pytest.raises(ValueError, match="expected regular expressions"):
                bounded.check(pattern)
            continue
        seen += 1
        assert bounded.fullmatch(pattern, name) == bool(re.fullmatch(pattern, name)), (
            pattern,
            name,
        )
        end = bool(re.match(rf"(.*\.)?({pattern})$", name))
        assert bounded.matches_end(pattern, name) == end, (pattern, name)
        start = bool(re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name))
        assert bounded.matches_start(pattern, name) == start, (pattern, name)
    assert seen > 4000


def test_lists_match_ends():
    assert matches(NAME, ["q_proj"]) and matches(NAME, ["self_attn.q_proj"])
    assert not matches(NAME, ["proj"]) and not matches(NAME, "q_proj")


def test_every_entry_has_to_match():
    names = ["a.b", "c"]
    check_all_match("exclude", ["b", "lm_head"], names, "layer", silent=("lm_head",))
    check_all_match("exclude", "a.*", names, "layer")
    with pytest.raises(
        ValueError, match=r"exclude: 'd' matches no layer; linear layers here: a.b, c"
    ):
        check_all_match("exclude", ["b", "d"], names, "layer")
