"""Benchmarks: `python -m bench.NAME [--quick | --smoke] [--json]`. Speeds are ratios measured within one run.

Beside them stand the generator of the pages under docs/ and what benchmarks share. May import everything.
"""

import os

os.environ.setdefault("OBLITERATUS_PROBE_CACHE", "off")  # a benchmark times PROBE, not the reading of cached results
