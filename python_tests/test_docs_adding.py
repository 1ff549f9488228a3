"""What docs/adding-a-kernel.md says a new operator touches, held to what the operators touch that are there."""

import fnmatch
import pathlib
import re

import pytest

from lowrank_kernels import triton as triton_kernels
from lowrank_kernels.schema import OPS

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "docs/adding-a-kernel.md").read_text()
ALWAYS, KERNELS, NEEDED, CALLERS = re.search(
    r"\nAlways:\n(.*?)\nWhere the kernels.*?\n\n(.*?)\nWhere it needs them:\n(.*?)\nEverything else(.*?)\n## ",
    TEXT, re.DOTALL,
).groups()  # fmt: skip

EXAMPLE = re.compile(r"^ *(>>>|\.\.\.) .*$", re.MULTILINE)


def places(text, op="<op>"):
    """Patterns of files: the code spans of the first column of a table, or of a paragraph."""
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) or [text]
    spans = [span for row in rows for span in re.findall(r"`([\w./<>]+)`", row) if "/" in span]
    patterns = [span.replace("<op>", op).replace("<topic>", "*") for span in spans]
    return [f"{p}*" if p.endswith("/") else p for p in patterns]


def naming(name, *folders):
    """Source files that name it as a whole word, elsewhere than in the examples of docstrings."""
    word = re.compile(rf"(?<![A-Za-z0-9_]){name}(?![A-Za-z0-9_])")
    found = [f for folder in folders for f in (ROOT / folder).rglob("*") if f.is_file()]
    sources = (".py", ".h", ".inl", ".cpp", ".cu", ".cuh")
    return {
        str(f.relative_to(ROOT))
        for f in found
        if f.suffix in sources and word.search(EXAMPLE.sub("", f.read_text()))
    }


def outside(files, patterns):
    return {f for f in files if not any(fnmatch.fnmatch(f, p) for p in patterns)}


@pytest.mark.parametrize("op", OPS)
def test_an_operator_is_named_in_the_files_of_the_list_and_nowhere_else(op):
    files = naming(op, "lowrank_kernels", "csrc")
    listed = [p for text in (ALWAYS, KERNELS, NEEDED, CALLERS) for p in places(text, op)]
    assert not outside(files, listed), "docs/adding-a-kernel.md does not list these"
    files |= naming(op, "python_tests")
    always = places(
        ALWAYS.replace("triton/<topic>.py", f"triton/{triton_kernels.module_of(op)}.py"), op
    )
    for place in always:
        if "_group" in op:  # whose schema and fake are apart
            place = place.replace("schema.py", "schema_groups.py")
        if op.startswith("grouped_"):
            place = place.replace("schema.py", "schema_experts.py")
        name = op if not place.startswith("lowrank_kernels/schema") else f"_{op}"  # the fake's name
        assert place in files | naming(name, "lowrank_kernels"), f"{place} does not name {op}"


def test_the_list_of_a_kernels_files():
    """double_quantize has an entry of its own in each table, and all of them the operator's name."""
    files = outside(naming("double_quantize", "csrc"), places(ALWAYS))
    listed = places(KERNELS)
    assert not outside(files, listed), "docs/adding-a-kernel.md does not list these"
    assert len(listed) == 14  # beside the six of every operator


def test_every_place_of_the_lists_exists():
    for text in (ALWAYS, KERNELS, NEEDED, CALLERS):
        for place in places(text, "linear_4bit"):
            assert list(ROOT.glob(place.removesuffix("/*"))), place
    assert len(places(ALWAYS)) == 6  # CONTRIBUTING.md says so
    assert "| op | 6 files always" in (ROOT / "CONTRIBUTING.md").read_text()
