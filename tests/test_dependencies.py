"""The lowest versions that may be installed have no known vulnerability; `make audit` looks for new ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FIXED = {
    "torch": ("2.10", "CVE-2025-3001, CVE-2026-24747"),
    "transformers": ("5.5", "CVE-2026-4372, CVE-2026-5241"),
    "starlette": ("1.3.1", "CVE-2025-62727, CVE-2026-48710, CVE-2026-48818, CVE-2026-54282, CVE-2026-54283"),
    "h11": ("0.16", "CVE-2025-43859"),
    "jinja2": ("3.1.6", "CVE-2025-27516"),
    "filelock": ("3.20.3", "CVE-2025-68146, CVE-2026-22701"),
    "pygments": ("2.20", "CVE-2026-4539"),
    "idna": ("3.15", "found by pip-audit below it"),
    "pillow": ("12.2", "CVE-2026-40192"),
    "fonttools": ("4.60.2", "CVE-2025-66034"),
    "protobuf": ("6.33.5", "CVE-2026-0994"),
    "werkzeug": ("3.1.6", "CVE-2026-27199"),
    "markdown": ("3.8.1", "CVE-2025-69534"),
    "requests": ("2.33", "CVE-2026-25645"),
    "urllib3": ("2.6.3", "CVE-2026-21441"),
    "pytest": ("9.0.3", "CVE-2025-71176"),
    "langchain-core": ("1.2.22", "CVE-2025-68664, CVE-2026-34070"),
}
"""First version without the vulnerabilities, by the advisories."""


def floors() -> dict[str, Version]:
    """Lowest version of each requirement in pyproject.toml, as `tomllib` is not in every Python that is supported."""
    found = {}
    for text in re.findall(r'"([A-Za-z][\w.\[\],-]*>=[\d.]+)"', (ROOT / "pyproject.toml").read_text()):
        requirement = Requirement(text)
        (bound,) = requirement.specifier
        found[requirement.name.lower()] = Version(bound.version)
    return found


@pytest.mark.parametrize("name", FIXED)
def test_floors(name: str) -> None:
    fixed, why = FIXED[name]
    assert floors()[name] >= Version(fixed), why


def test_pinned_versions_are_allowed() -> None:
    lowest = floors()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if "==" in line)
    known = {name: pins[name] for name in lowest if name in pins}
    assert set(FIXED) <= set(known)
    assert not {name: pin for name, pin in known.items() if Version(pin) < lowest[name]}
