"""The reader's guide: its rows point at the lines that they show."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"\[(\w+\.py):(\d+)\]\(\1#L\2\) \| `(.+)` \|")


def test_each_equation_is_on_the_line_that_the_guide_names():
    rows = ROW.findall((ROOT / "GUIDE.md").read_text())
    assert len(rows) >= 8
    for name, number, code in rows:
        line = (ROOT / name).read_text().splitlines()[int(number) - 1]
        assert line.strip().startswith(code), f"{name}:{number} is {line.strip()}, not {code}"
