"""Annotate tensor shapes. Only the tests check them at run time.

jaxtyping is a development dependency. Without it ``Float[Tensor, "k width"]`` means ``Tensor``.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or find_spec("jaxtyping"):
    from jaxtyping import Bool, Float, Int
else:

    class Float:
        """Replacement for jaxtyping's class that drops the shape and keeps the type."""

        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            return item[0]

    Bool = Int = Float

__all__ = ["Bool", "Float", "Int"]
