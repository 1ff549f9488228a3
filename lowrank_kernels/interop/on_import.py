"""``on_import``: registers with another library when that is imported, whoever imports it and when.

To register while another thread may be importing the module takes importlib's lock of that module, which has no
public name: each public function that waits for it also imports the module. wrapt's post-import hooks do without the
lock. They call at once where the module is in ``sys.modules``, also while another thread is still running it, and
miss an import that has found the module but not yet put it there.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

_callbacks: dict[str, tuple[Callable[[ModuleType], None], ...]] = {}


def on_import(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Calls ``callback(module)`` once module ``name`` is imported: now if it is, else right after.

    It is called again if the module is imported again (``importlib.reload``, or after its removal
    from ``sys.modules``), so it should be idempotent. What it raises comes out of the import, which
    then has failed, or out of this call. Raises ImportError if the module is half imported, by a
    thread that this call comes from: register before that, or after.
    """
    with _module_lock(name):  # no other thread is looking for the module or running it now
        module = sys.modules.get(name)
        spec = getattr(module, "__spec__", None)
        if getattr(spec, "_initializing", False) and name not in _callbacks:
            raise ImportError(f"on_import: {name} is being imported by the caller", name=name)
        registered = _callbacks.get(name, ())
        _callbacks[name] = (*registered, callback)
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
        if module is None or getattr(spec, "_initializing", False):
            return
    callback(module)


def _module_lock(name: str) -> AbstractContextManager:
    """importlib's lock of a module. A Python without it leaves the two races that the top of this file names."""
    return getattr(importlib._bootstrap, "_ModuleLockManager", nullcontext)(name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the finders behind it find, and has the callbacks run after it."""

    def find_spec(self, name, path=None, target=None):
        if name not in _callbacks:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            if (spec := finder.find_spec(name, path, target)) is not None:
                if spec.loader is not None:  # a namespace package has no code to run
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, loader) -> None:
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        name = module.__spec__.name
        module.__spec__.loader = module.__loader__ = self.loader  # nobody shall meet this one
        self.loader.exec_module(module)
        called = 0
        while called < len(_callbacks[name]):  # a callback may register another
            _callbacks[name][called](
                sys.modules[name]
            )  # the module may have put another in its place
            called += 1


_finder = _Finder()
