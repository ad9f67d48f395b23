"""A real vLLM on CPUs, for the tests of what it serves."""

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.cli.conftest import ROOT
from trainer.processes import children

VLLM = ROOT / ".servers/vllm"
# Each saves something on processors that others use too: memory for keys and values in GiB, threads that wait without
# turning, the compilation of the sampler by g++.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "2",
    "KMP_BLOCKTIME": "0",
    "OMP_WAIT_POLICY": "passive",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
}
# Not the head: with an adapter's wrapper around it, a request for the prompt's log-probabilities ends this vLLM on a
# CPU.
TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def start_vllm(base: Path, log: Path, port: int, *options: str, **variables: str) -> "subprocess.Popen[bytes]":
    """A server of `base` that takes adapters, as a group of processes; `variables` are some more of its environment."""
    given = ["serve", str(base), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "base"]
    given += ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--enable-lora"]
    given += ["--lora-target-modules", *TARGETS, *options]
    environment = {**os.environ, **ENVIRONMENT, **variables, "PATH": f"{VLLM}/bin{os.pathsep}{os.environ['PATH']}"}
    with log.open("w") as out:
        command = [str(VLLM / "bin/vllm"), *given]
        return children.start(command, stdout=out, stderr=out, env=environment, start_new_session=True)


@contextmanager
def vllm(base: Path, log: Path, *options: str, **variables: str) -> Iterator[str]:
    """The address of such a server, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with start_vllm(base, log, port, *options, **variables) as process:
        try:
            while not _is_ready(f"http://127.0.0.1:{port}"):
                assert process.poll() is None, log.read_text(errors="replace")[-3000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            # A server that ended by itself may have left its engine behind.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
