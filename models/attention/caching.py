"""Results that live as long as the text or the anchors they were made for, since every layer asks for the same."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def kept_with_first(function: Function) -> Function:
    """Each result of `function`, kept by its arguments until the first of them dies. A result must not hold the first
    argument, or neither is ever freed."""
    kept: weakref.WeakKeyDictionary[Any, dict[tuple, Any]] = weakref.WeakKeyDictionary()

    @functools.wraps(function)
    def result(first, *rest):
        results = kept.setdefault(first, {})
        if rest not in results:
            results[rest] = function(first, *rest)
        return results[rest]

    return result  # type: ignore[return-value]
