"""A checkup's findings, as tests ask for them."""

from rejoinder.adapters.checkup import Checkup, Finding


def by_check(checkup: Checkup) -> dict[str, Finding]:
    found = {finding.check: finding for finding in checkup.findings}
    assert len(found) == len(checkup.findings)
    assert all(finding.todo for finding in checkup.findings if finding.state in {"advice", "fail"})
    return found


def states(found: dict[str, Finding], state: str) -> set[str]:
    return {name for name, finding in found.items() if finding.state == state}
