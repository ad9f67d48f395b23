"""The sentences that a user reads when Azure refuses (Azurite), and where az:// takes its server and credentials
from.
"""

import base64

import pytest

from tests.store.conftest import assert_one_line
from trainer.errors import ConfigError, StorageError
from trainer.store.store import Store, open_store


def test_an_endpoint_without_tls_is_allowed(azure: Store) -> None:
    azure.put("key", b"x")
    assert azure.failing_fast().get("key") == b"x"
    assert azure.uri.rpartition("/")[2] in open_store(azure.uri.rpartition("/")[0]).children()[0]


def test_a_wrong_key_is_refused_at_once(azure: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    azure.put("key", b"x")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", base64.b64encode(b"wrong").decode())
    wrong = open_store(azure.uri)
    for use in (lambda: wrong.put("key", b"y"), lambda: wrong.get("key"), wrong.list, lambda: wrong.exists("key")):
        with pytest.raises(StorageError, match="403 Forbidden") as caught:
            use()
        assert_one_line(caught.value)
    assert azure.get("key") == b"x"


def test_a_missing_container_is_named(azure: Store) -> None:
    missing = open_store("az://no-such-container/runs")
    for use in (missing.list, lambda: missing.get("key"), lambda: missing.put("key", b"x")):
        with pytest.raises(StorageError, match="no-such-container/runs.*: the bucket does not exist") as caught:
            use()
        assert_one_line(caught.value)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("AZURE_STORAGE_ACCOUNT_KEY", "not base64", "Invalid Access Key.*AZURE_STORAGE_ACCOUNT_KEY"),
        ("AZURE_STORAGE_ACCOUNT_NAME", None, "Account must be specified.*AZURE_STORAGE_ACCOUNT_NAME"),
        ("AZURE_ENDPOINT", "localhost:10000", "^AZURE_ENDPOINT: 'localhost:10000' is no address"),
    ],
)
def test_a_wrong_environment_is_refused_before_any_request(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str | None, words: str
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "any")
    if value is None:
        monkeypatch.delenv(variable)
    else:
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=words) as caught:
        open_store("az://container/runs")
    assert_one_line(caught.value)
