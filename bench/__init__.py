"""Speed, as ratios within one run. `python -m bench.NAME [--quick] [--json]`."""

import os

os.environ.setdefault("OBLITERATUS_PROBE_CACHE", "off")  # a bench times PROBE, not the reading of an earlier one
