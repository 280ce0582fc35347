"""Shapes in annotations: read by people always, checked at run time in tests only.

jaxtyping is a development dependency. Where it is absent, ``Float[Tensor, "k width"]`` is ``Tensor``.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or find_spec("jaxtyping"):
    from jaxtyping import Bool, Float, Int
else:

    class Float:
        """Stands in for jaxtyping's: forgets the shape, keeps the type."""

        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            return item[0]

    Bool = Int = Float

__all__ = ["Bool", "Float", "Int"]
