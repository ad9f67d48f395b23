"""Names and texts that look like secrets. Everyone who may read a run's folder reads all of it, so none is written
there.
"""

import re
from collections.abc import Iterator
from typing import Any

from trainer.config.tree import Config
from trainer.errors import ConfigError

_SECRET = (
    "KEY",
    "KEYS",
    "TOKEN",
    "SECRET",
    "SECRETS",
    "PASSWORD",
    "PASSWD",
    "PASSPHRASE",
    "CREDENTIAL",
    "CREDENTIALS",
    "BEARER",
    "SSHPASS",
)
_LAST = ("PWD", "PASS")  # MYSQL_PWD and DB_PASS are secrets; PWD and --pass, which have no other word, are not
_NOT_ITSELF = ("FILE", "PATH", "DIR", "URL", "MODE", "STDIN")  # HF_TOKEN_PATH says where the token is
# Numbers of repetitions are bounded, or a long text without an end could take minutes.
_HARMLESS = re.compile(
    r"|0|1|true|false|yes|no|on|off|[~.]?/[\w.-]{0,200}[/.][\w./-]*|\$.*|`.*", re.IGNORECASE | re.DOTALL
)
# AWS's secret keys are 40 characters of base64, which may begin with a slash and hold others, as a path does.
_AWS_SECRET = re.compile(r"(?=(?:[^A-Z]*[A-Z]){4})(?=(?:[^a-z]*[a-z]){4})(?=\D*\d)[A-Za-z0-9/+]{40}")
# `NAME=value`, `--name value` and `-H "name: value"`. The value is only looked at, as another assignment may begin in
# it (--env=NAME=value).
_ASSIGNED = re.compile(
    r"(?:\b([A-Za-z_]\w*)\+?=|(?:-H|--header)[\s=]{0,9}[\"']?([\w-]{1,80}):\s{0,9}|--([A-Za-z][\w-]{0,80})(?:=|\s+(?!-)))"
    r"(?=[\"']?([^\s\"',;|&)<>]{1,200}))"
)
# The rest of a command, up to the word that is looked for: a line that ends in a backslash goes on.
_SAME_COMMAND = r"(?:[^\n;|&\\]|\\[\s\S]){0,300}?"
# Commands that take a secret as a word without a name.
_COMMAND = re.compile(
    rf"\bwandb\s+login\s{_SAME_COMMAND}(?<!\S)[\"']?(?=[\w-]{{0,80}}\d)[A-Za-z0-9][\w-]{{19,}}(?![\w./:-])"
    rf"|\bcurl\s{_SAME_COMMAND}(?<!\S)(?:-[A-Za-z]{{0,8}}[uU]\s{{0,9}}|--(?:proxy-)?user[\s=]{{1,9}})[\"']?"
    r"[^\s:\"'$]{1,200}:(?![\s\"'$`])"
    rf"|\b(?:sshpass|twine|(?:docker|podman|registry|az)\s+login)\s{_SAME_COMMAND}(?<!\S)-p\s{{0,9}}[\"']?(?![\s\"'$`-])\S"
)
_WORD = r"[\"']?(?P<value>[^\s\"',;|&)<>]{1,200})"
_SAID = r"\b(?:echo|printf)\s+(?:-\w+\s+|[\"']?%s(?:\\n)?[\"']?\s+){0,3}" + _WORD + r"[\"']?\s{0,9}"
_SUBSTITUTED = r"(?P<name>[A-Za-z_][\w-]{0,80})(?:=|\s)\s{0,9}[\"']?(?:\$\(|`)"
_TOKEN_FILE = r"[\"']?\S{0,200}?(?:(?<![a-z])token|_token_(?:path|file))\b"
# Programs that read a secret, and files that keep one.
_READER = (
    r"(?:\slogin\b|--with-token|--password-stdin|\bkinit\b|\bsudo\s+-S|--passphrase-fd"
    rf"|\btee\s[^\n|;]{{0,80}}?{_TOKEN_FILE})"
)
# Programs by the letter of their option for a password, whose word may follow at once.
_LETTERS = {
    "mysql|mysqldump|mariadb|7za?": "p",
    "redis-cli": "a",
    "unzip|zip": "P",
    r"ldap\w+": "w",
    r"openssl\s+enc": "k",
}
# Places in a shell's text where a `value` stands for a secret: always, or by the `name` beside it.
_PLACES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\$\{(?P<name>\w{1,100}):?[-=]" + _WORD,  # ${NAME:-value}
        _SUBSTITUTED + r"\s{0,9}" + _SAID,  # NAME=$(echo value)
        _SUBSTITUTED + r"[^)`\n]{0,200}?<<<\s{0,9}" + _WORD,
        r"\b(?:configure|config|set|modify|create|update)\s"
        + _SAME_COMMAND
        + r"(?P<name>[\w.-]{0,60}(?:secret|key|pass|token)[\w.-]{0,60})[\"']?\s+(?!-)"
        + _WORD,
        r"\b(?:setenv|set(?:\s+-\w+){1,4})\s+(?P<name>\w{1,100})\s+" + _WORD,
        r"\bread\s+(?:-\w+\s+){0,4}(?P<name>\w{1,100})\s{0,9}<<(?:<|-?\s{0,9}[\"']?\w+[\"']?\n)\s{0,9}" + _WORD,
        r"\bmachine(?:\s|\\n)+\S+(?:(?:\s|\\n)+(?:login|account)(?:\s|\\n)+\S+){0,2}(?:\s|\\n)+password(?:\s|\\n)+"
        + _WORD,
        r"\bpassword\s+" + _WORD + r"[\"']?\s{0,9}>{1,2}\s{0,9}\S{0,200}\.netrc\b",
        # A line of a file, as a heredoc writes it, or a field of JSON or of Python's environ.
        r"(?:^|[\s,\"'\[]|(?<!\$)\{)(?P<name>\w{1,80}(?:token|secret|password|key|passwd)|token|secret|password|passwd)[\"'\]]{0,2}"
        r"\s{0,9}[:=]\s{0,9}" + _WORD,
        _SAID + r"\|[^\n|]{0,100}?" + _READER,
        _SAID + r">{1,2}\s{0,9}" + rf"(?:{_TOKEN_FILE}|\S{{0,200}}?\.(?:netrc|pgpass)\b)",
        _READER + r"[^\n|;]{0,80}<<<\s{0,9}" + _WORD,
        rf"(?:{_READER}|>\s{{0,9}}{_TOKEN_FILE})[^\n|;]{{0,80}}<<-?\s{{0,9}}[\"']?\w+[\"']?[^\n]{{0,80}}\n\s{{0,80}}"
        + _WORD,
        r"\bvault\s+login\s+(?!-)" + _WORD,
        r"\bmc\s+(?:alias\s+set|config\s+host\s+add)(?:\s+\S+){3}\s+" + _WORD,
        r"\s-pass(?:in|out)?\s+pass:" + _WORD,
        r"\b(?:smbclient|mount\.cifs)\s" + _SAME_COMMAND + r"(?<!\S)-U\s{0,9}[^\s%]{1,100}%" + _WORD,
        r"\blftp\s" + _SAME_COMMAND + r"(?<!\S)-u\s{0,9}[^\s,]{1,100}," + _WORD,
    )
) + tuple(
    re.compile(rf"\b(?:{programs})\s{_SAME_COMMAND}(?<!\S)-{letter}\s{{0,9}}(?!-){_WORD}")
    for programs, letter in _LETTERS.items()
)
_DEFAULT = re.compile(r"\$\{\w+:?[-=][\"']?([^}\"']*)")
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_\w{30,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[A-Za-z0-9]{20,}"
    r"|sk-(?:proj|ant)-[\w-]{20,}|xox[abps]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16})\b"
    r"|-----BEGIN [A-Z ]{0,30}PRIVATE KEY|\bBearer\s+[\w.~+/-]{16,}|\bAccountKey=\w"
    r"|(?i:\bAuthorization:)\s{0,9}(?:[A-Za-z-]{1,20}\s{1,9})?[\w.~+/=-]{8,}|\bwandb_v1_\w{20,}"
    r"|\b(?:AIza[\w-]{30,}|dapi[0-9a-f]{32}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}|(?:npm|r8)_[A-Za-z0-9]{30,}|(?:pypi|nvapi)-[\w-]{20,}"
    r"|AGE-SECRET-KEY-\w)"
)
# Scheme, user and password, the rest, the query. A password may hold a slash; what follows a port is none.
_URL = re.compile(
    r"(\w[\w+.-]{0,20}://)([^/\s?#\"']{0,500}@|[^/\s:@]{1,200}:(?!\d+(?:/|$))[^\s@]{0,500}@)?([^\s?#\"']*)(\?[^\s\"']*)?",
    re.ASCII,
)
_MASK = "(removed, as it looks like a secret)"
_PASS = {
    "cluster.ray": "Set it in the environment of `ray start` on the cluster's nodes, which its jobs inherit.",
    "cluster.slurm": (
        "Export it in the shell that submits, which sbatch passes on to the job, or read it in the job from a file "
        "of your own: export NAME=$(cat ~/.name)."
    ),
}
_PASS_ELSEWHERE = "Give it in the environment of the process, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."


def refuse_secrets(config: Config) -> None:
    """Raises `ConfigError` for every setting that holds a secret, without repeating it."""
    found = [
        f"{setting}: {what} looks like a secret, and the configuration is kept in the store for all to read. Remove"
        " it. " + next((way for section, way in _PASS.items() if setting.startswith(section)), _PASS_ELSEWHERE)
        for setting, text in _texts(config.model_dump(mode="json"), "")
        if (what := _secret_in(setting, text))
    ]
    if found:
        raise ConfigError("\n".join(found))


def names_secret(name: str) -> bool:
    """Whether a variable or an option of this name holds a secret: HF_TOKEN does, TOKENIZERS_PARALLELISM does not."""
    words = [word for word in re.findall("[A-Z]+", name.upper()) if word != "PKEY"]  # a partition of InfiniBand
    if words[1:] and words[-1] in _LAST:
        return True
    return any(word.endswith(_SECRET) for word in words) and words[-1] not in _NOT_ITSELF


def masked(tree: Any, setting: str = "") -> Any:
    """Return a copy of `tree` with a word in place of each value that holds a secret. Earlier versions did not refuse
    these.

    `tree` has settings as plain values, which begin at `setting`.
    """
    if isinstance(tree, dict):
        return {key: masked(value, f"{setting}.{key}" if setting else str(key)) for key, value in tree.items()}
    if isinstance(tree, list) and not all(isinstance(item, str) for item in tree):
        return [masked(item, f"{setting}[{index}]") for index, item in enumerate(tree)]
    if not any(_secret_in(setting, text) for _, text in _texts(tree, setting)):
        return tree
    return [_MASK] if isinstance(tree, list) else _MASK


def without_credentials(text: str) -> str:
    """`text` with each URL in it rid of user, password and query, where tokens and signatures stand."""
    return _URL.sub(lambda url: url[1] + url[3], text)


def has_credentials(text: str) -> bool:
    """Whether a URL in `text` has a password, a token for a user, or a signature or token in its query."""
    for scheme, user, _, query in _URL.findall(text):
        if ":" in user or (user and scheme.endswith(("http://", "https://"))):
            return True
        names = [name.upper() for name in re.findall(r"[?&]([^=&]+)=", query)]
        if any(names_secret(name) or name.endswith(("SIG", "SIGNATURE", "ACCESSKEYID")) for name in names):
            return True
    return False


def _secret_in(setting: str, text: str) -> str | None:
    """The kind of secret that `text` seems to hold, in words for a message that may be kept; None if it holds none."""
    if names_secret(setting.rpartition(".")[2]) and not _is_harmless(text):
        return "its value"
    for variable, header, option, value in _ASSIGNED.findall(text):
        if names_secret(variable or header or option) and not _is_harmless(value):
            return f"the value of {variable or header or '--' + option}"
    if setting.startswith("cluster.") and _in_shell(text):
        return "a word of its commands"
    if _COMMAND.search(text):
        return "a word of its command"
    if has_credentials(text):
        return "a user, password or signature in a URL"
    return "a token" if _TOKEN.search(text) else None


def _in_shell(text: str) -> bool:
    """Whether a word of a shell's text stands where a secret stands, and is one."""
    found = (match for place in _PLACES for match in place.finditer(text))
    return any(
        names_secret(match.groupdict().get("name") or "token") and not _is_harmless(match["value"].rstrip("}"))
        for match in found
    )


def _is_harmless(value: str) -> bool:
    """Whether a value says where the secret is, or switches something."""
    if default := _DEFAULT.match(value):
        return _is_harmless(default[1])
    return bool(_HARMLESS.fullmatch(value)) and not _AWS_SECRET.fullmatch(value)


def _texts(tree: Any, path: str) -> Iterator[tuple[str, str]]:
    """(setting, text) of every leaf; a list of words or lines is one text, as an option and its value may be two
    words.
    """
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _texts(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list) and not all(isinstance(item, str) for item in tree):
        for index, item in enumerate(tree):
            yield from _texts(item, f"{path}[{index}]")
    elif isinstance(tree, list):
        yield path, "\n".join(tree)
    elif tree is not None:
        yield path, str(tree)
