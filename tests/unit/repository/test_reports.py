"""What pytest's workers send of a test that fails."""

from tests.conftest import _without_surrogates


def test_a_report_with_an_unpaired_surrogate_can_be_sent() -> None:
    report = {"longrepr": ["a \udcff", ("é", 1, None)], "sections": [("out \udcff", "")]}
    assert _without_surrogates(report) == {"longrepr": ["a \\udcff", ("é", 1, None)], "sections": [("out \\udcff", "")]}
