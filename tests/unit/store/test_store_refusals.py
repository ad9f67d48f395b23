"""What a store makes of objects and answers that nobody expects."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.exceptions import InvalidPathError
from obstore.store import MemoryStore

from trainer.config import parse_config
from trainer.errors import AlreadyExists, ConfigError, Damaged, StorageError, Unreachable
from trainer.store import store as stores
from trainer.store.failures import beyond_the_end, passes, reason
from trainer.store.store import Entry, Store, open_run_store, open_store, read_json


def test_nothing_is_read_whole_that_would_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("memory://")
    store.put("key", b"1234")
    assert store.get("key") == b"1234"
    monkeypatch.setattr(stores, "_WHOLE_BYTES", 3)
    with pytest.raises(Damaged, match="key has 4 bytes, and nothing that is read whole has more than 3"):
        store.get("key")


def test_an_object_that_is_no_json_is_damaged_after_a_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [b'{"a": ', b'{"a": 1}', b"{", b"["]
    monkeypatch.setattr(Store, "get", lambda store, key: answers.pop(0))
    store = open_store("memory://")
    assert read_json(store, "key") == {"a": 1}
    with pytest.raises(Damaged, match="key is damaged: it is no JSON"):
        read_json(store, "key")
    assert answers == []


@pytest.mark.parametrize(
    ("there", "data", "error"),
    [
        (b"mine", b"mine", None),
        (b"yours", b"mine", AlreadyExists),
        (None, b"mine", Unreachable),
        (b"", b"", AlreadyExists),
    ],
)
def test_a_claim_whose_answer_was_lost_is_looked_up(
    monkeypatch: pytest.MonkeyPatch, there: bytes | None, data: bytes, error: type[Exception] | None
) -> None:
    store, put = open_store("memory://"), obstore.put

    def lost(*given: Any, **how: Any) -> None:
        if there is not None:
            put(given[0], given[1], there)
        raise OSError("operation timed out")

    monkeypatch.setattr(stores.obstore, "put", lost)
    if error is None:
        store.create("claim", data)
        return
    with pytest.raises(error):
        store.create("claim", data)


def test_an_empty_claim_is_nobodys_own() -> None:
    store = open_store("memory://")
    store.create("claim", b"")
    with pytest.raises(AlreadyExists):
        store.create("claim", b"")
    store.create("other", b"mine")
    store.create("other", b"mine")  # as after an answer that was lost


def test_a_claim_is_anothers_only_when_two_reads_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("memory://")
    store.put("claim", b"mine, and whole")
    answers = [b"mine", b"mine, and whole", b"yours", b"yours"]
    monkeypatch.setattr(Store, "get", lambda store, key: answers.pop(0))
    store.create("claim", b"mine, and whole")
    with pytest.raises(AlreadyExists):
        store.create("claim", b"mine, and whole")
    assert answers == []


def test_a_name_that_no_store_takes_hides_nothing_beside_it(tmp_path: Path) -> None:
    for name in ("a", "b\nc", "d"):
        (tmp_path / name).write_text("12")
        (tmp_path / f"folder {name}").mkdir()
        (tmp_path / f"folder {name}" / "x").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "folder a")
    names, objects = open_store(str(tmp_path)).children()
    assert names == ["folder a", "folder d", "link"]
    assert [(entry.key, entry.size) for entry in objects] == [("a", 2), ("d", 2)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "Generic S3 error: Error performing GET https://host/b/key in 1 s - Server returned non-2xx status code: 403"
            " Forbidden: <Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>",
            "https://host answered 403 Forbidden (AccessDenied: Access Denied)",
        ),
        (
            "https://host/b: status code: 403 Forbidden: <Code>AccessDenied</Code><Message>Access Denied. </Message>",
            "https://host answered 403 Forbidden (AccessDenied: Access Denied)",
        ),
        ("HTTP error at https://host/b: status code: 500 Internal Server Error: ", "https://host answered 500 Internal Server Error"),
        ("<Code>NoSuchBucket</Code> at https://host/b", "the bucket does not exist"),
        ("get http://169.254.169.254/latest/meta-data failed", "no credentials were found, neither in the environment"),
        ('error sending request for url (https://host/b) kind: Timeout', "https://host did not answer in time"),
        ('error sending request for url (https://host/b): message: "dns error"', "https://host cannot be reached (dns error)"),
        ("Generic LocalFileSystem error: Permission denied.\nDebug source", "Permission denied"),
        ("", "OSError"),
    ],
)  # fmt: skip
def test_the_reason_is_one_clause_for_people(text: str, said: str) -> None:
    assert reason(OSError(text), "s3").startswith(said)
    if said != "no credentials were found, neither in the environment":
        assert reason(OSError(text), "s3") == said
    assert "hidden" not in reason(OSError(f"{text} https://me:hidden@host/b?sig=hidden"), "s3")


@pytest.mark.parametrize(
    ("text", "again"),
    [
        ("error sending request for url (https://host/b)", True),
        ("error decoding response body", True),
        ("HTTP error: request or response body error", True),
        ("operation timed out", True),
        ("error sending request for url (http://169.254.169.254/latest/api/token)", False),
        ("Permission denied", False),
    ],
)
def test_what_a_connection_lost_is_asked_again_and_a_machine_without_a_role_is_not(text: str, again: bool) -> None:
    assert passes(OSError(text)) is again


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        (
            "ftp://me:hidden@host/b",
            r"run.store: 'ftp://host/b' has the scheme 'ftp'.* file://, s3://, gs://, az://, mem",
        ),
        (
            "s3://me:hidden@bucket/runs",
            "run.store: 's3://bucket/runs' is a bucket and a folder in it, but more was given",
        ),
        (
            "gs://bucket/runs?token=hidden",
            "run.store: 'gs://bucket/runs' is .* environment [(]GOOGLE_APPLICATION_CREDE",
        ),
        ("file://runs", "run.store: 'file://runs' names no folder of this machine"),
    ],
)
def test_an_address_that_is_none_is_refused_without_the_secrets_in_it(uri: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}") as refused:
        open_store(uri)
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "shorter"),
    [
        ("Server returned non-2xx status code: 416 Range Not Satisfiable", True),
        ("Invalid range: 9 to 20", True),
        ("the requested range was invalid", True),
        ("status code: 403 Forbidden: out of your range", False),
    ],
)
def test_an_object_that_is_shorter_than_what_is_asked_for_is_damaged(text: str, shorter: bool) -> None:
    assert beyond_the_end(OSError(text)) is shorter


def test_a_bucket_with_a_name_that_no_store_takes_is_not_listed_as_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise InvalidPathError("an empty segment")

    monkeypatch.setattr(stores.obstore, "list_with_delimiter", fails)
    with pytest.raises(StorageError, match="cannot list memory:/+folder/: an empty segment") as raised:
        open_store("memory://").children("folder/")
    assert type(raised.value) is StorageError


def test_a_missing_bucket_is_no_missing_object(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise FileNotFoundError("<Code>NoSuchBucket</Code>")

    monkeypatch.setattr(stores.obstore, "get", fails)
    with pytest.raises(StorageError, match="cannot read memory:/+key: the bucket does not exist") as raised:
        open_store("memory://").get("key")
    assert type(raised.value) is StorageError


@pytest.mark.parametrize("write", ["put", "create"])
def test_a_write_that_fails_leaves_no_folder_of_its_own(write: str, tmp_path: Path) -> None:
    """A name that is too long fails as a full disk does: after the folder is made."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").write_text("")
    run = open_store(str(tmp_path)).sub("runs/one")
    for store, key in ((run, "owners/" + "x" * 300), (open_store(str(tmp_path)).sub("there"), "owners/" + "x" * 300)):
        with pytest.raises(StorageError, match="cannot write"):
            getattr(store, write)(key, b"data")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["there", "there/file"]


def test_an_object_that_cannot_be_looked_at_does_not_count_as_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(stores.obstore, "head", fails)
    with pytest.raises(StorageError, match="cannot read memory:/+key: .*Permission denied"):
        open_store("memory://").exists("key")


def test_the_version_of_an_object_is_the_stores_own_or_its_size_and_time() -> None:
    facts = {"path": "run/key", "size": 3, "last_modified": datetime(2026, 1, 2, tzinfo=UTC)}
    store = open_store("memory://").sub("run")
    assert store._entry({**facts, "e_tag": "own"}) == Entry("key", 3, facts["last_modified"], "own")
    assert store._entry(facts).version == "3-2026-01-02T00:00:00+00:00"


def test_empty_folders_go_with_their_last_object_and_the_stores_own_stays(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    store = open_store(str(tmp_path / "store"))
    for folder in (store, store.sub("run/")):
        folder.put("a/b/key", b"")
        folder.delete_alone("a/b/key")
        assert list(tmp_path.rglob("*")) == [tmp_path / "store"]
    store.put("a/b/key", b"")
    store.put("a/other", b"")
    store.delete_alone("a/b/key")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "other", "store"]


def test_a_folder_with_the_name_of_a_half_written_file_is_none(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    (tmp_path / "folder#1").mkdir()
    (tmp_path / "folder#1" / "key#12").write_bytes(b"half")
    (tmp_path / "key#a").write_bytes(b"whole")
    (entry,) = store.half_written()
    assert (entry.key, entry.size) == ("folder#1/key#12", 4)
    store.delete(entry.key)
    assert store.half_written() == []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings by which obstore is asked for a bucket."""
    found = list[dict[str, Any]]()
    monkeypatch.setattr(stores, "from_url", lambda uri, **options: (found.append(options), MemoryStore())[1])
    for names in stores._ENDPOINT.values():
        for name in names:
            monkeypatch.delenv(name, raising=False)
    return found


def test_a_bucket_has_the_time_limits_of_the_run_and_its_reads_are_repeated_by_our_pace_alone(
    asked: list[dict[str, Any]],
) -> None:
    text = "run: {name: a, store: s3://bucket/runs, store_retry: 7, store_timeout: 3}\nmodel: {base: b}\n"
    store = open_run_store(parse_config(f"{text}data: {{train: [{{path: c}}]}}\ntrain: {{steps: 1}}"))
    assert [options["client_options"] for options in asked] == [{"timeout": timedelta(seconds=3)}] * 2
    assert [options["retry_config"]["retry_timeout"].total_seconds() for options in asked] == [7, 0]
    assert store._paced is not None
    assert (store._paced.patience, store._request_seconds) == (7, 3)
    assert open_store("s3://bucket", retry_seconds=0).pace is None


@pytest.mark.parametrize(
    ("uri", "variable", "address", "options"),
    [
        ("s3://b", "AWS_ENDPOINT_URL", "http://here:9000", {"allow_http": True, "virtual_hosted_style_request": False}),
        ("s3://b", "AWS_ENDPOINT_URL", "https://here", {}),
        ("gs://b", "GOOGLE_BASE_URL", "http://here", {"allow_http": True}),
        ("az://b", "AZURE_STORAGE_ENDPOINT", "http://here", {"allow_http": True}),
        ("az://b", "AWS_ENDPOINT_URL", "http://here", {}),
    ],
)
def test_a_server_without_tls_is_the_users_own(
    asked: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    uri: str,
    variable: str,
    address: str,
    options: dict[str, bool],
) -> None:
    monkeypatch.setenv(variable, address)
    open_store(uri)
    (given, _) = asked
    found = given | given["client_options"]
    assert {name: found[name] for name in found.keys() - {"client_options", "retry_config", "timeout"}} == options
