"""A test that needs something of the machine asks here: without it the test is skipped, and in CI it fails."""

import os
from collections.abc import Mapping

import pytest


def need(lack: str | None, environment: Mapping[str, str] = os.environ) -> None:
    """Go on where `lack`, one line that says what this machine lacks, is None.

    CI installs everything, so a test that is skipped there would never run anywhere; .ci/bare is the exception.
    """
    if not lack:
        return
    if environment.get("CI"):
        pytest.fail(lack)
    pytest.skip(lack)
