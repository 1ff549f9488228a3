"""What the site's build adds to the pages: docstrings in Markdown, and no request to anywhere."""

from __future__ import annotations

import importlib.util
import textwrap

import pytest

from markdown_blocks import ROOT

griffe = pytest.importorskip("griffe", reason="`make docs` installs it")


def hook(name: str):
    pytest.importorskip("mkdocs", reason="`make docs` installs it")
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/hooks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def markdown(text: str) -> str:
    known = {"linear": "p.linear", "Bank.load": "p.bank.Bank.load"}
    return hook("docstrings").markdown(textwrap.dedent(text).strip(), known.get)


def test_roles_become_links_and_what_has_no_entry_code():
    assert markdown(":func:`linear`, :meth:`Bank.load`, :data:`_X` and ``y``") == (
        '<autoref optional identifier="p.linear">`linear`</autoref>, '
        '<autoref optional identifier="p.bank.Bank.load">`Bank.load`</autoref>, `_X` and ``y``'
    )


def test_literal_blocks_are_fenced():
    text = """
        Of a row::

            s = max |x|

            q = x / s
        Then::
            bank = Bank.of(model)

        ::

            z
        """
    expected = """
        Of a row:

        ```text
        s = max |x|

        q = x / s
        ```

        Then:

        ```python
        bank = Bank.of(model)
        ```


        ```text
        z
        ```
        """
    lines = [line for line in markdown(text).split("\n") if line]
    assert lines == [line for line in textwrap.dedent(expected).split("\n") if line]


def test_simple_tables():
    text = """
        ====  ======  ===
        name  device  how
        ====  ======  ===
        cpu   CPU     in C++, one
                      set each
        cuda  CUDA    on ``GPUs``
        ====  ======  ===

        After.
        """
    assert markdown(text) == textwrap.dedent(
        """
        | name | device | how |
        | --- | --- | --- |
        | cpu | CPU | in C++, one set each |
        | cuda | CUDA | on ``GPUs`` |

        After.
        """
    ).strip("\n")


def test_a_table_without_a_head():
    assert markdown("=== ==\na   b\n=== ==") == "|  |  |\n| --- | --- |\n| a | b |"


def test_names_are_resolved_where_they_stand(tmp_path):
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").write_text("from .one import public\n")
    (package / "one.py").write_text(
        '"""See :func:`later`."""\n\nclass C:\n    """:meth:`go`."""\n    def go(self): ...\n\n'
        "def later(): ...\ndef public(): ...\n"
    )
    (package / "two.py").write_text(
        '"""See :func:`public`, :class:`one.C`, :func:`nothing`, :func:`pack.public`."""\n'
    )
    extensions = griffe.load_extensions(str(ROOT / "docs/hooks/docstrings.py"))
    pack = griffe.load("pack", search_paths=[tmp_path], extensions=extensions)
    assert 'identifier="pack.one.later"' in pack["one"].docstring.value
    assert 'identifier="pack.one.C.go"' in pack["one.C"].docstring.value
    two = pack["two"].docstring.value
    assert 'identifier="pack.one.public"' in two and 'identifier="pack.one.C"' in two
    assert 'identifier="pack.public"' in two
    assert "`nothing`" in two and "nothing</autoref>" not in two


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ('<script src="https://x.org/a.js">', "https://x.org/a.js"),
        ('<img alt="a" src=//x.org/a.png>', "//x.org/a.png"),
        ('<link rel="stylesheet" href="https://x.org/a.css">', "https://x.org/a.css"),
        ("@font-face{src:url(https://x.org/a.woff)}", "https://x.org/a.woff"),
        ('<a href="https://x.org">read</a> <img src="a.png"> <script src="a.js">', None),
        ('<link rel="next" href="a.html"> url(a.png) url(data:image/svg+xml)', None),
    ],
)
def test_a_page_that_fetches_something_is_found(text, address, tmp_path):
    site = hook("site")
    (tmp_path / "page.html").write_text(text)

    class Config:
        site_dir = tmp_path

    if address is None:
        return site.on_post_build(Config)
    with pytest.raises(site.PluginError, match=address):
        site.on_post_build(Config)


def test_the_contributing_page_and_links_to_it():
    site = hook("site")
    text = "[a](../CONTRIBUTING.md) [b](../../CONTRIBUTING.md#rules) [c](../README.md) [d](x.md)"
    assert site.on_page_markdown(text, None, None, None) == (
        "[a](contributing.md) [b](../contributing.md#rules) [c](index.md) [d](x.md)"
    )
