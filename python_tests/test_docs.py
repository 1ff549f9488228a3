"""The Python blocks of the documentation run, one after another, a file at a time."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch

import lowrank_kernels as lk
import tiny_llama

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def blocks(name: str) -> list[tuple[int, str]]:
    """(the line it starts at, text) of each Python block."""
    text = (DOCS / name).read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def run(name: str, names: dict[str, object]) -> dict[str, object]:
    """Runs all blocks of a file in one namespace that begins with ``names``; errors show the file's own lines."""
    for line, block in blocks(name):
        exec(compile("\n" * line + block, DOCS / name, "exec"), names)
    return names


def test_a_failing_block_is_reported_with_its_line(monkeypatch, tmp_path):
    (tmp_path / "page.md").write_text(
        "# Page\n\n```python\nx = 1\n```\n\n```python\n1 / (x - 1)\n```\n"
    )
    monkeypatch.setitem(globals(), "DOCS", tmp_path)
    assert blocks("page.md") == [(3, "x = 1\n"), (7, "1 / (x - 1)\n")]
    with pytest.raises(ZeroDivisionError) as error:
        run("page.md", {})
    assert (error.traceback[-1].path.name, error.traceback[-1].lineno + 1) == ("page.md", 8)


# -- int8.md -----------------------------------------------------------------------------------------


@pytest.mark.skipif(lk.backends.report()["int8"] is None, reason="this CPU has no int8 kernels")
def test_int8():
    model, x = torch.nn.Sequential(lk.Linear4bit(64, 8)), torch.randn(3, 64)
    names = run("int8.md", {"torch": torch, "lk": lk, "model": model, "x": x})
    error = (names["y"] - model(x)).norm() / names["y"].norm()
    assert 1e-4 < error < 0.03


# -- multi-lora.md -----------------------------------------------------------------------------------


def save_adapter(model: torch.nn.Module, name: str, r: int) -> None:
    for module in model.modules():
        if isinstance(module, lk.LoRALinear4bit):
            module.add_adapter(name, r)
            torch.nn.init.normal_(module.lora_B[name].weight, std=0.1)
    lk.save_adapter(model, pathlib.Path("adapters") / name, name)


@pytest.fixture
def llama(tmp_path, monkeypatch) -> dict[str, object]:
    """``model`` and ``tokenizer``, and in the current folder adapters of two ranks."""
    page = (DOCS / "multi-lora.md").read_text(encoding="utf-8")
    folder = tiny_llama.save(tmp_path / "llama", [page])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(folder)
    lk.replace_linear(other, r=1, progress=False)
    save_adapter(other, "french", r=20)
    save_adapter(other, "legal", r=4)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {"model": model, "tokenizer": AutoTokenizer.from_pretrained(folder)}


def test_multi_lora(llama, capsys):
    names = run("multi-lora.md", llama)
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

    page = (DOCS / "multi-lora.md").read_text(encoding="utf-8")

    def drawn(label: str) -> list[int]:
        line = re.search(rf"^{label} (.*)$", page, re.MULTILINE)[1].split("]")[0]
        return [int(number) for number in re.findall(r"-?\b\d+\b", line)]

    assert drawn("tile_of_row") == tile_of_row.tolist()
    assert drawn("rows") == rows.tolist()
    pattern = r"\{ slot (\d), row0 (\d), rows (\d), page0 (\d) \}"
    assert [[*map(int, tile)] for tile in re.findall(pattern, page)] == tiles.tolist()
