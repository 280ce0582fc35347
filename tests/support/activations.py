"""Activations compared in all that they hold."""

from __future__ import annotations

import torch

from obliteratus.core.types import Activations


def assert_same(found: Activations, expected: Activations) -> None:
    """Check that two activations are equal bit for bit, and not only close."""
    assert (found.position, found.digest) == (expected.position, expected.digest)
    assert found.groups.keys() == expected.groups.keys()
    for group, moments in expected.groups.items():
        again = found.groups[group]
        assert again.count == moments.count
        assert torch.equal(again.mean, moments.mean)
        assert (again.rows is None) == (moments.rows is None)
        assert moments.rows is None or (again.rows is not None and torch.equal(again.rows, moments.rows))
        assert (again.sketch is None) == (moments.sketch is None)
        if again.sketch is not None and moments.sketch is not None:
            parts = zip(vars(again.sketch).values(), vars(moments.sketch).values(), strict=True)
            assert all(torch.equal(x, y) for x, y in parts)
    assert all(torch.equal(found.outputs[k], v) for k, v in expected.outputs.items())
