"""``on_import``: callbacks run once the module is there, whoever imports it; other imports notice nothing."""

from __future__ import annotations

import importlib
import inspect
import sys
import threading

import pytest

from lowrank_kernels.interop.on_import import on_import


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a module of ``tmp_path``, which is importable for the test's time."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(name: str, text: str) -> None:
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        importlib.invalidate_caches()

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_module_that_is_there_already(write):
    write("hooked_before", "value = 1")
    import hooked_before

    seen = []
    on_import("hooked_before", seen.append)
    assert seen == [hooked_before]


def test_a_module_that_comes_later(write):
    write("hooked.__init__", "")
    write("hooked.inner", "value = 1\ndef f():\n    return 2")
    seen = []
    on_import("hooked.inner", lambda module: seen.append((module.__name__, module.value)))
    import hooked

    assert seen == [], "the package alone is not the module"
    from hooked.inner import f

    assert seen == [("hooked.inner", 1)]
    importlib.import_module("hooked.inner")
    assert len(seen) == 1
    # The module looks as if nobody had been there.
    assert type(hooked.inner.__loader__) is type(hooked.__loader__) is type(hooked.__spec__.loader)
    assert hooked.inner.__spec__.loader is hooked.inner.__loader__
    assert "return 2" in inspect.getsource(f)


def test_it_runs_again_when_imported_again(write):
    write("hooked_again", "")
    seen = []
    on_import("hooked_again", seen.append)
    import hooked_again

    importlib.reload(hooked_again)
    del sys.modules["hooked_again"]
    again = importlib.import_module("hooked_again")
    assert seen == [hooked_again, hooked_again, again]


def test_callbacks_run_in_order_and_get_the_module_that_took_its_place(write):
    write("hooked_swap", "import sys, types\nsys.modules[__name__] = types.ModuleType('other')")
    seen = []
    on_import("hooked_swap", lambda module: seen.append((1, module.__name__)))
    on_import("hooked_swap", lambda module: seen.append((2, module.__name__)))
    importlib.import_module("hooked_swap")

    assert seen == [(1, "other"), (2, "other")]


def test_registered_by_the_module_or_its_callbacks_themselves(write):
    text = "from lowrank_kernels.interop.on_import import on_import\n{}on_import(__name__, print)\n"
    write("hooked_self", text.format(""))
    with pytest.raises(ImportError, match="on_import: hooked_self is being imported by the caller"):
        importlib.import_module("hooked_self")

    seen = []
    text = text.replace("print", "lambda module: module.seen.append(module)")
    write("hooked_self", text.format("seen = []\n"))
    on_import("hooked_self", seen.append)
    import hooked_self

    assert seen == hooked_self.seen == [hooked_self]


def test_registered_by_a_callback(write):
    """It is called too, after those that were there, and again with them."""
    write("hooked_by_callback", "")
    seen = []

    def first(module):
        seen.append(1)
        if len(seen) == 1:
            on_import("hooked_by_callback", lambda module: seen.append(2))

    on_import("hooked_by_callback", first)
    module = importlib.import_module("hooked_by_callback")
    assert seen == [1, 2]
    importlib.reload(module)
    assert seen == [1, 2, 1, 2]


def test_errors_come_out_and_the_next_import_tries_again(write):
    write("hooked_error", "")
    broken = [True]

    def callback(module):
        if broken:
            raise RuntimeError("callback failed")

    on_import("hooked_error", callback)
    with pytest.raises(RuntimeError, match="callback failed"):
        importlib.import_module("hooked_error")
    assert "hooked_error" not in sys.modules
    with pytest.raises(RuntimeError, match="callback failed"):
        importlib.import_module("hooked_error")
    broken.clear()
    importlib.import_module("hooked_error")
    broken.append(True)
    with pytest.raises(RuntimeError, match="callback failed"):
        on_import("hooked_error", callback)


def test_a_module_that_does_not_exist_or_raises(write):
    seen = []
    on_import("hooked_nowhere", seen.append)
    assert importlib.util.find_spec("hooked_nowhere") is None
    with pytest.raises(ModuleNotFoundError, match="No module named 'hooked_nowhere'"):
        importlib.import_module("hooked_nowhere")
    write("hooked_raises", "raise ValueError('of the module')")
    on_import("hooked_raises", seen.append)
    with pytest.raises(ValueError, match="of the module"):
        importlib.import_module("hooked_raises")
    assert seen == []


@pytest.mark.parametrize(("text", "rounds"), [("", 100), ("import time; time.sleep(0.2)", 1)])
def test_threads_register_while_others_import(write, text, rounds):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for i in range(rounds):
            name, seen = f"hooked_{len(text)}_{i}", []
            write(name, f"{text}\ndone = True")

            def callback(module, seen=seen):
                seen.append(module.done)

            threads = []
            for _ in range(4):
                threads.append(threading.Thread(target=importlib.import_module, args=(name,)))
                threads.append(threading.Thread(target=on_import, args=(name, callback)))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            assert seen == [True] * 4
    finally:
        sys.setswitchinterval(interval)
