"""The docstrings' few pieces of reStructuredText as Markdown, for mkdocstrings (an extension of griffe).

Roles become links (``:func:`linear_4bit```), literal blocks (``::``) fenced blocks, simple tables (``=== ===``)
Markdown tables. Double backticks are code in both.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator

import griffe

_ROLE = re.compile(r":(?:func|class|meth|attr|data|mod):`~?([\w.]+)`")
_RULE = re.compile(r"^=+( +=+)+$")


class Docstrings(griffe.Extension):
    """Rewrites every docstring of a package once it is loaded, since a role may name what stands further down."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        for obj in _objects(pkg):
            if obj.docstring is not None:
                obj.docstring.value = markdown(obj.docstring.value, functools.partial(path, obj))


def _objects(obj: griffe.Object) -> Iterator[griffe.Object]:
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from _objects(member)


def path(obj: griffe.Object, name: str) -> str | None:
    """The full path of ``name`` as seen from ``obj``, else among the package's public names."""
    first, _, rest = name.partition(".")
    if first == obj.package.path:
        return name
    try:
        found = obj.resolve(first)
    except griffe.NameResolutionError:
        if first not in obj.package.members:
            return None
        found = f"{obj.package.path}.{first}"
    return f"{found}.{rest}" if rest else found


def markdown(text: str, path_of: Callable[[str], str | None]) -> str:
    """``text`` in Markdown; ``path_of``: the full path of a name in a role, None where there is none."""

    def link(match: re.Match) -> str:
        identifier = path_of(match[1])
        if identifier is None:
            return f"`{match[1]}`"
        # optional: what has no entry on the site, such as a private helper, is plain code.
        return f'<autoref optional identifier="{identifier}">`{match[1]}`</autoref>'

    return _ROLE.sub(link, "\n".join(_blocks(text.splitlines())))


def _blocks(lines: list[str]) -> Iterator[str]:
    i = 0
    while i < len(lines):
        line, indent = lines[i], _indent(lines[i])
        if line.endswith("::"):
            end = i + 1
            while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > indent):
                end += 1
            block = [inner[indent + 4 :] for inner in lines[i + 1 : end]]
            if line.strip() != "::":
                yield line[:-1]
            yield from _fenced("\n".join(block).strip("\n"), " " * indent)
            i = end
        elif _RULE.match(line):
            end = max(k for k in range(i, len(lines)) if _RULE.match(lines[k]))
            yield from _table(line, lines[i + 1 : end])
            i = end + 1
        else:
            yield line
            i += 1


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _fenced(block: str, indent: str) -> Iterator[str]:
    language = "python" if re.search(r"^\w+ = \w+\.\w+\(", block) else "text"
    for line in ("", f"```{language}", *block.split("\n"), "```", ""):
        yield (indent + line).rstrip()


def _table(rule: str, lines: list[str]) -> Iterator[str]:
    """A simple table: columns begin where the rule's do; a row with an empty first cell goes on with the last."""
    starts = [match.start() for match in re.finditer("=+", rule)]
    rows: list[list[str]] = []
    headed = any(_RULE.match(line) for line in lines)
    for line in lines:
        if _RULE.match(line):
            continue
        cells = [line[a:b].strip() for a, b in zip(starts, (*starts[1:], None))]
        if cells[0] or not rows:
            rows.append(cells)
        else:
            rows[-1] = [f"{a} {b}".strip() for a, b in zip(rows[-1], cells)]
    head = rows.pop(0) if headed else [""] * len(starts)
    for row in (head, ["---"] * len(starts), *rows):
        yield f"| {' | '.join(row)} |"
