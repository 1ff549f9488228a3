"""The documentation's code blocks run, a page at a time; its commands, links, names and messages exist."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator

import pytest
import torch

import lowrank_kernels as lk
import markdown_blocks
import tiny_llama
from lowrank_kernels.interop import transformers_hook
from markdown_blocks import PAGES, ROOT, Block, blocks, read, run

# What a page's blocks find in their namespace before the yield, and what must hold of it after they ran.
SETTINGS: dict[str, Callable[[pytest.FixtureRequest], Iterator[dict]]] = {}


def setting(page: str):
    def register(function):
        assert page in PAGES, page
        SETTINGS[page] = function

    return register


def _no_setting(request) -> Iterator[dict]:
    yield {}


def with_language(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language == language]


def run_elsewhere() -> set[str]:
    """Pages that another test runs, `markdown_blocks.run("docs/x.md", ...)`."""
    tests = (ROOT / "python_tests").glob("*.py")
    others = [path for path in tests if path.name not in ("test_docs.py", "test_docs_site.py")]
    call = re.compile(r'markdown_blocks\.run\(\s*"([^"]+)"')
    return {page for path in others for page in call.findall(path.read_text(encoding="utf-8"))}


@pytest.mark.parametrize(
    "page", sorted({block.page for block in with_language("python")} - run_elsewhere())
)
def test_python_blocks_run(page, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    around = SETTINGS.get(page, _no_setting)(request)
    names = next(around)
    run(page, names)
    assert next(around, None) is None


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page):
    for block in blocks(page):
        excused = block.reason is not None
        known = block.language in ("python", "sh", "json", "text", "console")
        assert known or excused, f"{block}: neither run, nor excused, nor marked as text"
        if block.language == "json":
            json.loads(block.text)
    fences = re.findall(r"^ *```", read(page), re.MULTILINE)
    assert len(fences) == 2 * len(blocks(page)), f"{page}: a block that is not found"


def test_blocks_that_are_not_run():
    """As few as these; each has its reason above it."""
    excused = {str(b): b.reason for page in PAGES for b in blocks(page) if b.reason}
    print(*(f"{where}: {reason}" for where, reason in excused.items()), sep="\n")
    assert len(excused) == 2


@pytest.mark.parametrize("page", PAGES)
def test_commands(page):
    shell = [block for block in blocks(page) if block.language == "sh" and block.reason is None]
    of_blocks = [command for block in shell for command in markdown_blocks.commands(block.text)]
    for command in (*of_blocks, *markdown_blocks.inline_commands(page)):
        try:
            markdown_blocks.check_command(command)
        except AssertionError as error:
            pytest.fail(f"{page}: {command}: {error}")


@pytest.mark.parametrize(
    "command",
    [
        "make no-such-target",
        "make docs NO_SUCH_VARIABLE=1",
        "python -m lowrank_kernels demo --no-such-option",
        "python -m lowrank_kernels no-such-command",
        "python -m bench.no_such_module",
        "cd x && make no-such-target",
        "A=1 make no-such-target",
        "pip install -r requirements/none.txt",
        "pytest python_tests/none*.py",
        ".ci/none",
        "no-such-program",
    ],
)
def test_a_wrong_command_is_found(command):
    with pytest.raises(AssertionError):
        markdown_blocks.check_command(command)


def test_a_failing_block_is_reported_with_its_line(monkeypatch, tmp_path):
    text = (
        "# Page\n\n```python\nx = 1\n```\n\n<!-- not run: it is bad -->\n```python\n0 / 0\n```\n\n"
        "- a\n\n  ```python\n  1 / (x - 1)\n  ```\n"
    )
    (tmp_path / "page.md").write_text(text)
    monkeypatch.setattr(markdown_blocks, "ROOT", tmp_path)
    found = [(b.line, b.text, b.reason) for b in blocks("page.md")]
    assert found == [
        (3, "x = 1\n", None),
        (8, "0 / 0\n", "it is bad"),
        (14, "1 / (x - 1)\n", None),
    ]
    with pytest.raises(ZeroDivisionError) as error:
        run("page.md", {})
    assert (error.traceback[-1].path.name, error.traceback[-1].lineno + 1) == ("page.md", 15)


# -- links, names, messages --------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_work_on_a_git_host(page):
    """Files only; `make docs` checks anchors too."""
    prose = markdown_blocks._BLOCK.sub("", read(page))
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose):
        if not target.startswith(("http://", "https://")):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def directives() -> set[str]:
    """What the API pages describe, ``::: lowrank_kernels.name``, as names in the package."""
    pages = (read(page) for page in PAGES if page.startswith("docs/api/"))
    return {
        name for page in pages for name in re.findall(r"^::: lowrank_kernels\.(\S+)", page, re.M)
    }


def test_every_public_name_is_in_the_api_reference():
    described, public = directives(), {*lk.__all__, *transformers_hook.NAMES}
    assert public <= described
    index = read("docs/api/index.md")
    assert not [name for name in public if f"[`{name}`](" not in index]
    for name in described:
        assert attribute(name).__doc__, name
    for name in lk.distributed.__all__:
        assert described & {f"distributed.{name}", f"distributed.{name}.{name}"}, name


def attribute(name: str) -> object:
    """``lowrank_kernels.<name>``, where a module comes before an attribute of the same name."""
    module, rest = f"lowrank_kernels.{name}", []
    while True:
        try:
            return functools.reduce(getattr, rest, importlib.import_module(module))
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest.insert(0, last)


def messages() -> list[str]:
    """Every string of the sources that could be a message; … where a value is filled in."""
    found = []
    for path in (ROOT / "lowrank_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_message_of_the_error_page_exists():
    """Each heading of the third level is how a message of the sources begins."""
    quoted = re.findall(r"^### `(.+)`$", read("docs/errors.md"), re.MULTILINE)
    assert len(quoted) > 30 and len(quoted) == read("docs/errors.md").count("\n### ")
    known = messages()
    missing = [q for q in quoted if not any(message.startswith(q) for message in known)]
    assert not missing


# -- what the pages begin with -----------------------------------------------------------------------


@setting("docs/int8.md")
def _(request):
    if lk.backends.report()["int8"] is None:
        pytest.skip("this CPU has no int8 kernels")
    model, x = torch.nn.Sequential(lk.Linear4bit(64, 8)), torch.randn(3, 64)
    names = {"torch": torch, "lk": lk, "model": model, "x": x}
    yield names
    error = (names["y"] - model(x)).norm() / names["y"].norm()
    assert 1e-4 < error < 0.03


def save_adapter(model: torch.nn.Module, name: str, r: int) -> None:
    for module in model.modules():
        if isinstance(module, lk.LoRALinear4bit):
            module.add_adapter(name, r)
            torch.nn.init.normal_(module.lora_B[name].weight, std=0.1)
    lk.save_adapter(model, pathlib.Path("adapters") / name, name)


@pytest.fixture
def llama_folder(tmp_path) -> pathlib.Path:
    """A tiny model; its tokenizer knows the words of the pages that have one."""
    return tiny_llama.save(
        tmp_path / "llama", map(read, ("docs/multi-lora.md", "docs/quickstart.md"))
    )


def _peft_names(folder: pathlib.Path) -> dict[str, object]:
    peft = pytest.importorskip("peft", reason="these lines are for its users")
    from transformers import AutoModelForCausalLM

    return {
        "path": folder,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "LoraConfig": peft.LoraConfig,
        "get_peft_model": peft.get_peft_model,
    }


@setting("docs/index.md")
def _(request):
    names = _peft_names(request.getfixturevalue("llama_folder"))
    yield names
    assert count(names["model"], lk.Linear4bit) == 14


@setting("docs/quickstart.md")
def _(request):
    names = {"path": request.getfixturevalue("llama_folder")}
    pytest.importorskip("peft", reason="half of the page is for its users")
    yield names
    assert pathlib.Path("my-adapter/adapter_model.safetensors").exists()
    assert len(names["report"].replaced) == 14
    assert names["answers"].shape[0] == 3


@setting("README.md")
def _(request):
    llama = request.getfixturevalue("llama")
    linear, trained = torch.nn.Linear(64, 32), []
    other = lk.Linear4bit(64, 32)
    names = _peft_names(request.getfixturevalue("llama_folder")) | {
        "train": trained.append,
        "linear": linear,
        "x": torch.randn(3, 64),
        "A": torch.randn(4, 64),
        "B": torch.randn(32, 4),
        "bitsandbytes_state_dict": other.state_dict(),
        "ids": llama["tokenizer"](["a b"] * 3, return_tensors="pt")["input_ids"],
    }
    yield names
    assert trained == [names["model"]] and count(names["model"], lk.LoRALinear4bit) == 14
    assert torch.equal(names["layer"].dequantize(), other.dequantize())
    assert names["bank"].adapters == ("french", "default")


def count(model: torch.nn.Module, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.fixture
def llama(llama_folder, tmp_path, monkeypatch) -> dict[str, object]:
    """``model`` and ``tokenizer``, and in the current folder adapters of two ranks."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(llama_folder)
    lk.replace_linear(other, r=1, progress=False)
    save_adapter(other, "french", r=20)
    save_adapter(other, "legal", r=4)
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    return {"model": model, "tokenizer": AutoTokenizer.from_pretrained(llama_folder)}


@setting("docs/multi-lora.md")
def _(request):
    names, capsys = request.getfixturevalue("llama"), request.getfixturevalue("capsys")
    yield names
    assert set(names["bank"].adapters) == {"french", "legal", "a", "b"}
    assert names["sequences"] == 3 and names["answers"].shape[0] == 3
    assert all(torch.isfinite(loss) for loss in names["losses"])
    for name, r in (("a", 4), ("b", 8)):
        lk.load_adapter(names["model"], pathlib.Path("adapters") / name, name)
        layers = [m for m in names["model"].modules() if isinstance(m, lk.LoRALinear4bit)]
        assert all(layer.r[name] == r for layer in layers)
        assert any(layer.lora_B[name].weight.count_nonzero() for layer in layers), "it was trained"
    assert "AdapterBank(14 modules, 2 adapters" in capsys.readouterr().out


def test_the_plan_that_multi_lora_draws(llama):
    """The numbers of the drawing, and that it has them."""
    model = llama["model"]
    lk.replace_linear(model, r=1, progress=False)
    bank = lk.AdapterBank.for_model(model, num_pages=6)
    bank.load("french", "adapters/french")
    bank.load("legal", "adapters/legal")
    plan = bank.plan(["french", None, "legal", "french"], tokens_per_sequence=[3, 1, 2, 2])
    tiles, page_ids, tile_of_row, rows, tile_rows, _ = plan.op_args()
    assert tiles.tolist() == [[0, 0, 5, 0], [1, 5, 2, 3]]
    assert tile_of_row.tolist() == [0, 0, 0, -1, 1, 1, 0, 0]
    assert rows.tolist() == [0, 1, 2, 6, 7, 4, 5]
    assert len(set(page_ids.tolist())) == 4 and tile_rows == 16

    page = read("docs/multi-lora.md")

    def drawn(label: str) -> list[int]:
        line = re.search(rf"^{label} (.*)$", page, re.MULTILINE)[1].split("]")[0]
        return [int(number) for number in re.findall(r"-?\b\d+\b", line)]

    assert drawn("tile_of_row") == tile_of_row.tolist()
    assert drawn("rows") == rows.tolist()
    pattern = r"\{ slot (\d), row0 (\d), rows (\d), page0 (\d) \}"
    assert [[*map(int, tile)] for tile in re.findall(pattern, page)] == tiles.tolist()
