"""Moved tokens and KL of first tokens, against formulas in float64."""

from __future__ import annotations

import torch
from tests.support.tiny import tiny_tokenizer

from obliteratus.verify.first_token_changes import MOVED, describe_changes


def test_kl_and_tokens_agree_with_the_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    before, after = (torch.randn(5, 40, generator=draw, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    tokenizer = tiny_tokenizer()
    for row, found in enumerate(describe_changes(before.float(), after.float(), tokenizer)):
        p, q = before[row].exp(), after[row].exp()
        assert abs(found["kl"] - float((p * (p / q).log()).sum())) < 1e-5
        worst = sorted(range(40), key=lambda t: -abs(float(q[t] - p[t])))[:MOVED]
        assert [text for text, _, _ in found["moved"]] == [tokenizer.decode([t]) for t in worst]
        for t, (_, first, second) in zip(worst, found["moved"], strict=True):
            assert abs(first - float(p[t])) < 1e-6
            assert abs(second - float(q[t])) < 1e-6


def test_nothing_moves_where_nothing_changes() -> None:
    logp = torch.zeros(2, 8).log_softmax(-1)
    for found in describe_changes(logp, logp, tiny_tokenizer()):
        assert found["kl"] == 0
        assert all(first == second for _, first, second in found["moved"])
