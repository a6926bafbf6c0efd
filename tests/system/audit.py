"""Look up known vulnerabilities of the versions in `constraints.txt` with pip-audit, where a network is (`make audit`).

pip-audit passes over a version that the index says nothing of, so that an index without advisories would look like a
clean bill: a version with a known one is asked for first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).parents[2]
VULNERABLE = "https://pypi.org/pypi/h11/0.14.0/json"
"""A version with a known vulnerability (CVE-2025-43859), which what is asked must know."""


def reason_against() -> str | None:
    """Why nothing can be looked up from here, or None."""
    try:
        with urlopen(VULNERABLE, timeout=30) as answer:
            known = json.load(answer).get("vulnerabilities")
    except (OSError, ValueError) as error:
        return f"cannot reach {VULNERABLE}: {error}"
    return None if known else f"{VULNERABLE} knows no vulnerability of a version that has one"


def main() -> int:
    """Return pip-audit's exit code, or 2 where it cannot say anything."""
    if reason := reason_against():
        print(f"audit: nothing was looked up: {reason}; run `make audit` where the network has PyPI", file=sys.stderr)
        return 2
    place = ROOT / ".venv" / "audit"
    venv.create(place, with_pip=True)
    python = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "pip-audit>=2.10"], check=True)
    options = ["--requirement", ROOT / "constraints.txt", "--no-deps", "--disable-pip", "--progress-spinner", "off"]
    return subprocess.run([python, "-m", "pip_audit", *options]).returncode


if __name__ == "__main__":
    sys.exit(main())
