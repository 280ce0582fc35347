"""Patches change their own row alone, and must lie inside it."""

from __future__ import annotations

import pytest
import torch
from tests.support.contexts import (
    context_of_model,
    token_ids,
)
from tests.support.refuser import asked
from tests.support.tiny import tiny_subject

from obliteratus.analyze.patch_values import Patch, run_patched


def test_rows_do_not_see_each_other_and_places_must_be_there() -> None:
    context = context_of_model(tiny_subject("llama"), asked())
    subject, ids = context.subject, token_ids(context, "target")[:5]
    put = Patch("model.layers.1.mlp", -2, torch.ones(subject.width))
    plain = run_patched(subject, ids, [()] * 5, "test")
    found = run_patched(subject, ids, [(), (put,), (), (), ()], "test")
    assert torch.allclose(found[[0, 2, 3, 4]], plain[[0, 2, 3, 4]], atol=1e-5)
    assert not torch.allclose(found[1], plain[1], atol=1e-3)
    with pytest.raises(ValueError, match="before the beginning"):
        run_patched(subject, [[1, 2]], [(Patch("model.layers.1", -3, put.value),)], "test")
