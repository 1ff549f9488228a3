"""The CPU kernels with AMX's tile registers in software (csrc/cpu/amx/emulated_tiles.h), for CPUs that have none.

``make emulated-amx`` builds them: a liblowrank_cpu.so that takes the place of the installed one in a process that loads
it first. What it needs of the CPU is AVX-512 with BF16 and VBMI.
"""

from __future__ import annotations

import ctypes
import os
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
LIBRARY = ROOT / "build/emulated-amx/liblowrank_cpu.so"


def why_not(library: str | os.PathLike = LIBRARY) -> str | None:
    """None if the library's kernels for AMX run on this CPU; otherwise why they do not."""
    if not os.path.exists(library):
        return f"there is no {library}: make emulated-amx"
    loaded = ctypes.CDLL(os.fspath(library))
    loaded.lk_isa_name.restype = ctypes.c_char_p
    supported = {
        loaded.lk_isa_name(i) for i in range(loaded.lk_isa_count()) if loaded.lk_isa_supported(i)
    }
    return None if b"amx" in supported else "this CPU has no AVX-512 with BF16 and VBMI"


def environment(library: str | os.PathLike = LIBRARY) -> dict[str, str]:
    """The variable with which a process loads it in place of the installed library."""
    loaded_first = [os.path.abspath(library), *filter(None, [os.environ.get("LD_PRELOAD")])]
    return {"LD_PRELOAD": ":".join(loaded_first)}
