"""Which pipeline classes may run among others: those whose call leaves the thread's state
and the shared modules alone. Told from the compiled code, so that new classes need no list."""

import functools
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

# Thread-wide modes leak into whoever runs while the pipeline is parked; hooks and
# attention processors set on a module are seen by everybody who uses it.
LEAKING = frozenset(
    {
        "inference_mode",
        "autocast",
        "enable_grad",
        "set_attn_processor",
        "register_forward_hook",
        "register_forward_pre_hook",
    }
)


@functools.cache
def needs_to_be_alone(kind: Any) -> bool:
    """Whether the call of a pipeline class reaches a method that uses a leaking name."""
    reached: set[str] = set()
    ahead = ["__call__"]
    while ahead:
        name = ahead.pop()
        function = inspect.unwrap(inspect.getattr_static(kind, name, None))
        code = getattr(function, "__code__", None)
        if name in reached or code is None:
            continue
        reached.add(name)
        names = set(_names(code))
        if names & LEAKING:
            return True
        ahead.extend(names)
    return False


def _names(code: CodeType) -> Iterator[str]:
    """Every global and attribute that a function uses, those of functions inside it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
