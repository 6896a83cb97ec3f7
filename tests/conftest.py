"""What every test may use."""

import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings

# Helpers that several folders' tests share stand here; pytest puts only a test's own folder on the path.
for folder in ("tests/support", "tests/engines", "localstack", "benchmarks/soak"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

pytest_plugins = ["aws_stand_in", "cloud", "gcs_service", "s3_gate"]

LONG = ("tests/worker/test_soak.py", "tests/brokers/", "tests/examples/", "tests/engines/", "tests/conformance/")
"""What takes longest for its number of files, in the order of running: the short ones come last, so that the two
processes end together."""

# How long an example takes says how busy the machine is.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

AnyReport = TypeVar("AnyReport", pytest.TestReport, pytest.CollectReport)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--contract-cases",
        default=str(Path(__file__).parent / "contract" / "cases.json"),
        help="JSON file of wire cases that must hold through a real worker process.",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _nothing_skips_in_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _nothing_skips_in_ci((yield))


def _nothing_skips_in_ci(report: AnyReport) -> AnyReport:
    """Where the environment has CI, a test that is skipped or expected to fail fails: all that can run there must."""
    if report.skipped and os.environ.get("CI"):
        why = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"Nothing may be skipped in CI (the environment variable CI is set). {why}"
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((at for at, long in enumerate(LONG) if item.nodeid.startswith(long)), len(LONG)))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run the whole suite in two processes, with emulators of their own; what is named on the command line in this one.

    `-n 0` and `-n 2` say otherwise.
    """
    named = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    return 0 if named or config.option.keyword else 2
