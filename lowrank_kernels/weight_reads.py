"""Which layers' weights the code of a model reads, instead of calling the layers.

``F.linear(x, self.proj.weight)``, ``x.to(self.proj.weight.dtype)`` or torch's fast path for encoders would meet packed
bytes in the place of a matrix. The source of each module's class says who does such things: the methods are parsed,
and every ``.weight`` is followed to the module that it belongs to, through variables, loops, subscripts and calls of
other methods. Methods that only initialise, tie or resize do not count.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator

from torch import nn

# A path of attributes that starts at a module; ANY stands for one name, REST for any number of them.
Path = tuple[str, ...]
ANY, REST = "*", "**"

# What may be asked of packed bytes, as of a matrix.
_HARMLESS = {"device", "requires_grad", "requires_grad_", "is_meta", "is_cuda", "grad", "is_cpu"}
_NOT_FORWARD = ("init", "reset_parameters", "embeddings", "tie", "resize", "prune", "extra_repr")
_MEMBERS = {"values", "items", "children", "named_children", "modules", "named_modules", "get"}
# Our layers, and PEFT's, which ask a 4-bit base for what they need, or else are refused as such a base's.
_KNOWN = (__package__, "peft")
_DEPTH = 3  # of calls that are followed

# Code that reads a weight only where a model is set up in a way that next to none is.
_SELDOM: dict[str, Callable[[nn.Module], bool]] = {
    "BloomMLP": lambda m: m.pretraining_tp > 1 and m.slow_but_exact,
    "BloomAttention": lambda m: m.pretraining_tp > 1 and m.slow_but_exact,
}


def layers_read(model: nn.Module) -> dict[str, str]:
    """Name of each module of ``model`` whose weight is read -> the class and method that read it."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] in _KNOWN:
            continue
        for path, reader in reads_of(type(module)):
            seldom = _SELDOM.get(reader.partition(".")[0])
            if seldom is None or seldom(module):
                for inner in _resolve(module, path):
                    found.setdefault(f"{name}.{inner}" if name else inner, reader)
    return found


def _resolve(module: nn.Module, path: Path) -> Iterator[str]:
    """Names, within ``module``, of the modules that a path can mean; of a layer that PEFT wraps, the base."""
    if path[0] == REST:
        end = path[1:]
        for name, _ in module.named_modules():
            parts = tuple(name.split("."))
            if len(parts) >= len(end) and _fits(parts[len(parts) - len(end) :], end):
                yield _base(module, name)
        return
    names = [""]
    for part in path:
        after = []
        for name in names:
            children = module.get_submodule(name)._modules
            prefix = f"{name}." if name else ""
            if part == ANY:
                after += [prefix + child for child, inner in children.items() if inner is not None]
            elif children.get(part) is not None:
                after.append(prefix + part)
        names = after
    yield from (_base(module, name) for name in names)


def _fits(parts: Path, path: Path) -> bool:
    return all(want in (ANY, part) for part, want in zip(parts, path))


def _base(module: nn.Module, name: str) -> str:
    while "base_layer" in module.get_submodule(name)._modules:
        name += ".base_layer"
    return name


# -- what the code of a class says -----------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def reads_of(cls: type[nn.Module]) -> tuple[tuple[Path, str], ...]:
    """(path of a module whose weight is read, "Class.method") for the methods of ``cls``."""
    found: dict[Path, str] = {}
    seen: set[str] = set()
    for owner in cls.__mro__:
        if owner in (nn.Module, object):
            continue
        for name, value in vars(owner).items():
            if name in seen or any(word in name for word in _NOT_FORWARD):
                continue
            seen.add(name)  # what a subclass defines anew does not run
            function = _function(value)
            if function is not None and _mentions_weight(function, cls):
                for path in _Reader(function, cls, {0: {()}}).reads():
                    found.setdefault(path, f"{cls.__name__}.{name}")
    return tuple((path, reader) for path, reader in found.items() if path and path != (REST,))


def _function(value: object) -> types.FunctionType | None:
    if isinstance(value, (staticmethod, classmethod)):  # neither has the module at hand
        return None
    if isinstance(value, property):
        value = value.fget
    if callable(value):
        value = inspect.unwrap(value)
    return value if isinstance(value, types.FunctionType) else None


def _names(code: types.CodeType) -> set[str]:
    inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
    strings = {part for part in code.co_consts if isinstance(part, str)}
    return set(code.co_names) | strings | {name for part in inner for name in _names(part)}


def _mentions_weight(function: types.FunctionType, cls: type, depth: int = _DEPTH) -> bool:
    """Whether it is worth parsing: it, or what it calls, has the word."""
    names = _names(function.__code__)
    if "weight" in names:
        return True
    called = (_callee(function, cls, name) for name in names) if depth else ()
    return any(f is not None and "weight" in _names(f.__code__) for f in called)


def _callee(function: types.FunctionType, cls: type, name: str) -> types.FunctionType | None:
    """The method of ``cls``, or the function beside ``function``, of that name; not one of torch's."""
    if any(word in name for word in _NOT_FORWARD):
        return None
    found = _function(inspect.getattr_static(cls, name, None) or function.__globals__.get(name))
    theirs = (
        found is not None
        and found.__module__.startswith("torch.")
        and found.__globals__ is not function.__globals__
    )
    return None if found is None or theirs or hasattr(nn.Module, name) else found


class _Reader(ast.NodeVisitor):
    """Follows modules through one function. ``arguments``: position of a parameter -> the paths it can be."""

    def __init__(self, function, cls, arguments: dict[int, set[Path]], depth: int = _DEPTH):
        self.function, self.cls, self.depth = function, cls, depth
        self.found: set[Path] = set()
        code = function.__code__
        names = code.co_varnames[: code.co_argcount]
        self.variables = {names[i]: paths for i, paths in arguments.items() if i < len(names)}
        # Nothing is known of other parameters: their parts may be anywhere.
        self.unknown = set(names) - set(self.variables)
        self.tree = _parsed(function)

    def reads(self) -> set[Path]:
        if self.tree is None:  # no source: every part that the function names beside "weight"
            names = _names(self.function.__code__)
            return {(n,) for n in names if n != "weight"} if "weight" in names else set()
        for _ in range(2):  # again, for variables that are set below their use in a loop
            self.visit(self.tree)
        return self.found

    # -- variables ---------------------------------------------------------------------------------

    def visit_Assign(self, node):
        self.generic_visit(node)
        for target in node.targets:
            self._bind(target, self.paths(node.value), node.value)

    def visit_AnnAssign(self, node):
        self.generic_visit(node)
        if node.value is not None:
            self._bind(node.target, self.paths(node.value), node.value)

    def visit_NamedExpr(self, node):
        self.generic_visit(node)
        self._bind(node.target, self.paths(node.value), node.value)

    def visit_For(self, node):
        self._bind(node.target, self._members(node.iter), None)
        self.generic_visit(node)

    def visit_comprehension(self, node):
        self._bind(node.target, self._members(node.iter), None)
        self.generic_visit(node)

    def _comprehension(self, node):
        for generator in node.generators:  # they come last among the fields
            self.visit(generator)
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension

    def _members(self, node) -> set[Path]:
        return {(*path, ANY) for path in self.paths(node)} | self.paths(node)

    def _bind(self, target, paths: set[Path], value) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            pairs = isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts)
            for i, part in enumerate(target.elts):
                self._bind(part, self.paths(value.elts[i]) if pairs else paths, None)
        elif isinstance(target, ast.Name) and paths:
            self.variables[target.id] = self.variables.get(target.id, set()) | paths

    # -- expressions -------------------------------------------------------------------------------

    def paths(self, node) -> set[Path]:
        """The modules that an expression can mean."""
        if isinstance(node, ast.Name):
            if node.id in self.variables:
                return self.variables[node.id]
            return {(REST,)} if node.id in self.unknown else set()
        if isinstance(node, ast.Attribute):
            return {(*path, node.attr) for path in self.paths(node.value)}
        if isinstance(node, ast.Subscript):
            index = node.slice.value if isinstance(node.slice, ast.Constant) else ANY
            return {(*path, str(index)) for path in self.paths(node.value)}
        if isinstance(node, ast.Call):
            return self._paths_of_call(node)
        if isinstance(node, ast.IfExp):
            return self.paths(node.body) | self.paths(node.orelse)
        if isinstance(node, ast.NamedExpr):
            return self.paths(node.value)
        if isinstance(node, ast.BoolOp):
            return set().union(*(self.paths(value) for value in node.values))
        if isinstance(node, (ast.Tuple, ast.List)):
            return set().union(*(self.paths(element) for element in node.elts))
        return set()

    def _paths_of_call(self, node) -> set[Path]:
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr in _MEMBERS:
            return {(*path, ANY) for path in self.paths(function.value)}
        if isinstance(function, ast.Name):
            if function.id == "getattr" and len(node.args) >= 2:
                name = node.args[1]
                part = name.value if isinstance(name, ast.Constant) else ANY
                return {(*path, part) for path in self.paths(node.args[0])}
            if function.id in (
                "enumerate",
                "zip",
                "reversed",
                "list",
                "tuple",
                "iter",
                "next",
                "cast",
            ):
                return set().union(*(self.paths(argument) for argument in node.args))
        return set()

    # -- reads -------------------------------------------------------------------------------------

    def visit_Attribute(self, node):
        value = node.value
        inner = value if isinstance(value, ast.Attribute) else None
        if inner is not None and inner.attr == "weight" and node.attr in _HARMLESS:
            self.visit(inner.value)
            return
        guarded = node.attr == "dtype" and "_is_quantized" in _names(self.function.__code__)
        if inner is not None and inner.attr == "weight" and guarded:
            self.visit(inner.value)
            return
        if node.attr == "weight":
            self.found |= self.paths(value)
        self.generic_visit(node)

    def visit_Call(self, node):
        self.generic_visit(node)
        function = node.func
        if isinstance(function, ast.Name) and function.id == "getattr" and len(node.args) >= 2:
            if isinstance(node.args[1], ast.Constant) and node.args[1].value == "weight":
                self.found |= self.paths(node.args[0])
            return
        own = isinstance(function, ast.Attribute) and self.paths(function.value) == {()}
        name = function.attr if own else getattr(function, "id", None)
        callee = _callee(self.function, self.cls, name) if name and self.depth else None
        if callee is None:
            return
        arguments = dict(enumerate(map(self.paths, node.args), own))
        names = callee.__code__.co_varnames[: callee.__code__.co_argcount]
        for keyword in node.keywords:
            if keyword.arg in names:
                arguments[names.index(keyword.arg)] = self.paths(keyword.value)
        arguments = {i: {p for p in paths if p != (REST,)} for i, paths in arguments.items()}
        arguments = {i: paths for i, paths in arguments.items() if paths}
        if arguments and "weight" in _names(callee.__code__):
            reader = _Reader(callee, self.cls, arguments, self.depth - 1)
            reader.unknown = set()  # they are looked at where the callee is a method itself
            if reader.tree is not None:
                self.found |= reader.reads()


@functools.lru_cache(maxsize=4096)
def _parsed(function: types.FunctionType) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
