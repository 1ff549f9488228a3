"""Which modules a caller means: PEFT's rules for names and patterns.

A pattern that a caller writes is matched by Python's ``re``. A pattern that comes out of a file may be anyone's, and
``re`` can take years over one: :class:`BoundedPatterns` matches those in a number of steps that is limited.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

with (
    warnings.catch_warnings()
):  # the public name is deprecated, and the private one is new in Python 3.11
    warnings.simplefilter("ignore", DeprecationWarning)
    try:
        from re import _constants as sre
        from re import _parser as parser
    except ImportError:
        import sre_constants as sre
        import sre_parse as parser


def matches(name: str, patterns: str | Iterable[str]) -> bool:
    """PEFT's rule: a string is a regular expression for all of ``name``, a list holds its ends."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(is_end(name, pattern) for pattern in patterns)


def is_end(name: str, end: str) -> bool:
    """Whether ``end`` is the whole of ``name``, or its last parts."""
    return name == end or name.endswith(f".{end}")


def read_patterns(argument: str, value: object) -> str | list[str]:
    if isinstance(value, str):
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{argument}: expected a regular expression, got {value!r}: {error}"
            ) from None
        return value
    names = list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument}: expected a string or strings, got {value!r}")
    return names


def read_parameters(value: object) -> list[str]:
    """``target_parameters``: paths of parameters, or the ends of some."""
    if value is None:
        return []
    names = [value] if isinstance(value, str) else read_patterns("target_parameters", value)
    return list(dict.fromkeys(names))


def check_all_match(
    argument: str,
    patterns: str | list[str],
    names: Iterable[str],
    kind: str,
    shown: Iterable[str] | None = None,
    silent: Iterable[str] = (),
) -> None:
    """Raises ValueError for a pattern that matches none of ``names``, which are those of every ``kind``.

    A string is one pattern; the entries of a list are looked at one by one. Those in ``silent`` may match nothing.
    The message names a few of ``shown``, or of ``names``.
    """
    names = list(names)
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        one = pattern if isinstance(patterns, str) else [pattern]
        if pattern in silent or any(matches(name, one) for name in names):
            continue
        few = names if shown is None else list(shown)
        raise ValueError(
            f"{argument}: {pattern!r} matches no {kind}; linear layers here: "
            f"{', '.join(few[:8]) or 'none'}{', ...' if len(few) > 8 else ''}"
        )


# -- patterns of strangers -------------------------------------------------------------------------

_STEPS = 1 << 21  # some seconds; what people write takes a few hundred for each name
_PARSING = 4  # steps that a character takes to parse
_CATEGORY = {sre.CATEGORY_SPACE: str.isspace, sre.CATEGORY_DIGIT: str.isdecimal}
_CATEGORY[sre.CATEGORY_WORD] = lambda char: char.isalnum() or char == "_"
_NOT = {
    sre.CATEGORY_NOT_SPACE: sre.CATEGORY_SPACE,
    sre.CATEGORY_NOT_DIGIT: sre.CATEGORY_DIGIT,
    sre.CATEGORY_NOT_WORD: sre.CATEGORY_WORD,
}
_REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT)  # greedy or not, the whole name matches or it does not


class BoundedPatterns:
    """The regular expressions of one file, matched as ``re`` would, in a number of steps that all of them share.

    It follows every way through a pattern at once, as a set of positions in the name, so nothing is tried twice:
    a match takes at most about ``len(pattern) · len(name)²`` steps. ``source`` names the file in messages.

    Raises ValueError for what is no regular expression, for what cannot be matched in this way (references to groups,
    atomic groups, possessive repeats, flags), and when the steps are used up.
    """

    def __init__(self, source: str, steps: int = _STEPS) -> None:
        self.source, self._left = source, steps
        self._parsed: dict[str, object] = {}

    def check(self, pattern: str, field: str = "") -> None:
        """Raises ValueError, naming the ``field`` of the file, if ``pattern`` cannot be used."""
        self._parse(pattern, field)

    def fullmatch(self, pattern: str, name: str) -> bool:
        """Whether ``pattern`` matches all of ``name``: ``re.fullmatch``."""
        return len(name) in self._ends(pattern, name, {0})

    def matches_end(self, pattern: str, name: str) -> bool:
        """PEFT's rule for ``rank_pattern``: all of ``name`` matches, or an end of it that follows a dot."""
        nodes = list(self._parse(pattern))
        whole = bool(nodes) and nodes[0] == (sre.AT, sre.AT_BEGINNING)
        if all(
            op is sre.LITERAL for op, _ in nodes[whole:]
        ):  # as save_adapter writes them, by the hundred
            literal = "".join(chr(char) for _, char in nodes[whole:])
            return name == literal if whole else is_end(name, literal)
        starts = {0} | {i + 1 for i, char in enumerate(name) if char == "."}
        return len(name) in self._ends(pattern, name, starts)

    def matches_start(self, pattern: str, name: str) -> bool:
        """transformers' rule for modules to skip: a start of ``name`` matches that ends where a part does."""
        ends = self._ends(pattern, name, {0})
        return any(
            end == len(name) or name[end] == "." or (end and name[end - 1] == ".") for end in ends
        )

    def _parse(self, pattern: str, field: str = ""):
        if pattern not in self._parsed:
            self._count(_PARSING * len(pattern))
            try:
                tree = parser.parse(pattern)
                if (tree.state.flags & ~re.UNICODE.value) != 0:
                    raise ValueError("flags are not supported here")
                self._check(tree)
            except (re.error, RecursionError, OverflowError, ValueError) as error:
                raise ValueError(
                    f"{self.source}: {field and field + ': '}expected regular expressions, "
                    f"got {_short(pattern)}: {error}"
                ) from None
            self._parsed[pattern] = tree
        return self._parsed[pattern]

    def _count(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise ValueError(
                f"{self.source}: its regular expressions take too long to match (exponential ones?)"
            )

    def _check(self, tree) -> None:
        for op, value in tree:
            if op is sre.BRANCH:
                for part in value[1]:
                    self._check(part)
            elif op in _REPEATS:
                self._check(value[2])
            elif op is sre.SUBPATTERN and not (value[1] or value[2]):
                self._check(value[3])
            elif op in (sre.ASSERT, sre.ASSERT_NOT):
                least, most = value[1].getwidth()
                if value[0] < 0 and least != most:
                    raise ValueError("look-behind requires fixed-width pattern")
                self._check(value[1])
            elif op is sre.AT and value not in _AT:
                raise ValueError(f"{str(value).lower()} is not supported here")
            elif op not in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN, sre.AT):
                raise ValueError(f"{str(op).lower()} is not supported here")

    def _ends(self, pattern: str, name: str, starts: set[int]) -> set[int]:
        try:
            return self._walk(self._parse(pattern), name, starts)
        except RecursionError:
            raise ValueError(
                f"{self.source}: {_short(pattern)}: nested too deeply to be matched"
            ) from None

    def _walk(self, tree, name: str, at: set[int]) -> set[int]:
        """Where a match of ``tree`` can end that starts at one of ``at``."""
        for op, value in tree:
            if not at:
                return at
            self._count(len(at) * (len(value) if op is sre.IN else 1))
            if op is sre.BRANCH:
                at = set().union(*(self._walk(part, name, at) for part in value[1]))
            elif op in _REPEATS:
                at = self._repeat(*value, name, at)
            elif op is sre.SUBPATTERN:
                at = self._walk(value[3], name, at)
            elif op in (sre.ASSERT, sre.ASSERT_NOT):
                at = {i for i in at if self._holds(*value, name, i) == (op is sre.ASSERT)}
            elif op is sre.AT:
                at = {i for i in at if _AT[value](name, i)}
            else:
                at = {i + 1 for i in at if i < len(name) and _is_char(op, value, name[i])}
        return at

    def _holds(self, direction: int, tree, name: str, i: int) -> bool:
        """Whether ``tree`` matches from i on, or looking behind (direction -1) up to i."""
        if direction > 0:
            return bool(self._walk(tree, name, {i}))
        start = i - tree.getwidth()[0]  # re allows one width only
        return start >= 0 and i in self._walk(tree, name, {start})

    def _repeat(self, least: int, most: int, tree, name: str, at: set[int]) -> set[int]:
        found, count = set(at) if least == 0 else set(), 0
        while count < most:
            after = self._walk(tree, name, at)
            count += 1
            if after == at:  # so it stays, however often
                return found | after
            if count > least and after <= found:  # nothing new
                return found
            at = after
            if count >= least:
                found |= at
        return found


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else pattern[:77] + "...")


def _is_word(name: str, i: int) -> bool:
    return 0 <= i < len(name) and _CATEGORY[sre.CATEGORY_WORD](name[i])


def _at_end(name: str, i: int) -> bool:
    return i == len(name) or (i == len(name) - 1 and name[i] == "\n")


_AT = {
    sre.AT_BEGINNING: lambda name, i: i == 0,
    sre.AT_BEGINNING_STRING: lambda name, i: i == 0,
    sre.AT_END: _at_end,
    sre.AT_END_STRING: lambda name, i: i == len(name),
    sre.AT_BOUNDARY: lambda name, i: _is_word(name, i - 1) != _is_word(name, i),
    sre.AT_NON_BOUNDARY: lambda name, i: _is_word(name, i - 1) == _is_word(name, i),
}


def _is_char(op, value, char: str) -> bool:
    """Whether one character matches a node of the parsed pattern."""
    if op is sre.LITERAL:
        return ord(char) == value
    if op is sre.NOT_LITERAL:
        return ord(char) != value
    if op is sre.ANY:
        return char != "\n"
    if op is sre.RANGE:
        return value[0] <= ord(char) <= value[1]
    if op is sre.CATEGORY:
        if value in _NOT:
            return not _CATEGORY[_NOT[value]](char)
        return _CATEGORY[value](char)
    negated = value[0][0] is sre.NEGATE  # op is IN
    return negated != any(_is_char(*item, char) for item in value[negated:])
