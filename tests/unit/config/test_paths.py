"""Paths that a person gave, and the folders that a user has."""

import pwd
from pathlib import Path

import pytest

from trainer.config.paths import absolute_path, users_folder
from trainer.errors import ConfigError


def test_an_empty_path_is_not_the_current_folder() -> None:
    with pytest.raises(ConfigError, match=r"^DEST: empty\. Give a path\.$"):
        absolute_path("", "DEST")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(user: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(ConfigError, match=r"^HOME: not set, .* Set it, or XDG_CACHE_HOME, to a folder"):
        users_folder("XDG_CACHE_HOME", ".cache")
    monkeypatch.setenv("XDG_CACHE_HOME", "/mine")
    assert users_folder("XDG_CACHE_HOME", ".cache") == Path("/mine/capstan")
