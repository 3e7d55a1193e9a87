"""Put what the scripts wrote into results/*.md between the marks of RESULTS.md.

python benchmarks/collect.py
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    page = (HERE / "RESULTS.md").read_text()

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        text = (HERE / "results" / f"{name}.md").read_text().strip()
        return f"<!-- begin {name} -->\n{text}\n<!-- end {name} -->"

    filled = re.sub(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->", fill, page, flags=re.DOTALL)
    (HERE / "RESULTS.md").write_text(filled)


if __name__ == "__main__":
    main()
