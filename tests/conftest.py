"""What every test may use."""

import sys
from pathlib import Path

import pytest

# Helpers that several folders' tests share stand here; pytest puts only a test's own folder on the path.
for folder in ("tests/support", "tests/engines", "localstack", "benchmarks/soak"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

pytest_plugins = ["aws_stand_in", "cloud", "gcs_service", "s3_gate"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--contract-cases",
        default=str(Path(__file__).parent / "contract" / "cases.json"),
        help="JSON file of wire cases that must hold through a real worker process.",
    )
