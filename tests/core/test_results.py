"""Numbers that JSON has no form for."""

from __future__ import annotations

import json
from math import inf

import pytest

from obliteratus.core.results import Score, replace_infinities


def test_documents_with_infinite_costs_are_json_that_any_reader_takes() -> None:
    score = Score(value=inf, low=0.5, high=inf, n=24, unit="nats")
    plain = {"cost": score.model_dump(mode="json"), "pair": (-inf, 1.0), "name": "inf"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        json.dumps(plain, allow_nan=False)  # the negative control
    read = json.loads(json.dumps(replace_infinities(plain), allow_nan=False))
    assert read["pair"] == ["-Infinity", 1.0]
    assert read["name"] == "inf"
    assert Score(**read["cost"]) == score
