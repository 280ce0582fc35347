"""Write tests/slow.txt, the tests that `make check` leaves out, from a measured run of all tests.

pytest --junitxml=/tmp/tests.xml
python tools/list_slow_tests.py /tmp/tests.xml
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

# All other functions together take about half a minute on one core, so that `make check` stays within a minute.
SLOW_SECONDS = 0.3
TARGET = Path(__file__).parents[1] / "tests" / "slow.txt"


def sum_seconds(report: Path) -> Counter[str]:
    """Return the seconds of all cases of each test function, by ``tests/a/test_b.py::test_c``."""
    seconds: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        module, *classes = re.split(r"\.(?=Test)", case.attrib["classname"])
        where = "::".join([module.replace(".", "/") + ".py", *classes])
        seconds[f"{where}::{case.attrib['name'].partition('[')[0]}"] += float(case.attrib["time"])
    return seconds


def main() -> None:
    """Write the list."""
    seconds = sum_seconds(Path(sys.argv[1]))
    slow = sorted(name for name, spent in seconds.items() if spent >= SLOW_SECONDS)
    TARGET.write_text("\n".join(slow) + "\n", encoding="utf-8")
    print(f"{len(slow)} of {len(seconds)} test functions are slow, {TARGET.name} lists them")


if __name__ == "__main__":
    main()
