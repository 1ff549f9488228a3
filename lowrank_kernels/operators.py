"""The table of the operators, which schema.py, schema_groups.py and schema_experts.py fill."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from .arguments import PlanArgs, expect_one_device, flat, in_schema

NAMESPACE = "lowrank_kernels"
PLAN = in_schema(PlanArgs)


class Op(NamedTuple):
    """One operator: its schema (without the name) and its fake, with flat arguments."""

    schema: str
    fake: Callable


OPS: dict[str, Op] = {}


def operator(schema: str) -> Callable[[Callable], Callable]:
    """Adds the operator whose fake this decorates; both have one name, the fake's with an underscore in front."""

    def add(fake: Callable) -> Callable:
        outputs = flat(fake)

        @functools.wraps(outputs)
        def checked(*args):
            expect_one_device(outputs.argument_names, args)
            return outputs(*args)

        OPS[fake.__name__[1:]] = Op(schema, checked)
        return fake

    return add
