"""A run's published adapters for the servers that sample, their names there, and the plugin of vLLM that loads one.

A server finds an adapter by its name in the store of the runs, so it shares no folder with anybody. vLLM calls
`register` if Capstan is installed beside it (docs.vllm.ai, design/lora_resolver_plugins). The store is that of
CAPSTAN_STORE, and a name cannot reach outside it. A request to /v1/load_lora_adapter could, because it has a path.

No torch, because a server's process imports this file.
"""

import asyncio
import atexit
import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from trainer.errors import NotFound
from trainer.run import layout
from trainer.store.scratch import scratch_folder
from trainer.store.store import Store, open_store

_NAME = re.compile(r"((?!\.)[^/]+/rollouts/[0-9a-f]{12})/adapters/step-(\d{9})/([0-9a-f]{8})")


class Published(NamedTuple):
    """The adapter of the update `step` in the folder `place` of a store.

    `nonce` tells apart the processes that had it loaded.
    """

    place: str
    step: int
    nonce: str


def served_name(place: Store, step: int, nonce: str) -> str:
    """Return the name of an adapter in the folder of a run's rollouts, as a server gets it.

    The adapter is found from its name and the store of the runs.
    """
    return f"{'/'.join(place.uri.split('/')[-3:])}/{layout.rollout_adapter(step)}{nonce}"


def adapter_named(name: str) -> Published | None:
    """Return the adapter with this name; None for the name of anything else."""
    found = _NAME.fullmatch(name)
    return Published(found[1], int(found[2]), found[3]) if found else None


def published(place: Store) -> list[int]:
    """Return the updates whose adapters are there, in order."""
    steps = (layout.published_step(entry.key) for entry in place.list(layout.ROLLOUT_ADAPTERS))
    return sorted(step for step in steps if step is not None)


def fetch(place: Store, step: int, folder: Path) -> None:
    """Copy a published adapter into a new folder of this machine.

    Raises `NotFound` if it has been removed meanwhile.
    """
    folder.mkdir(parents=True)
    prefix = layout.rollout_adapter(step)
    for entry in place.list(prefix):
        with (folder / entry.key.removeprefix(prefix)).open("wb") as file:
            file.writelines(place.chunks(entry.key, entry.size))
    place.get(layout.published(step))  # the adapter was whole until now


_KEPT = 8  # adapters on this machine's disk: vLLM may read one again that it had no room for


def register() -> None:
    """Have this process of vLLM find adapters in the store, if the environment names one."""
    uri = os.environ.get("CAPSTAN_STORE")
    if uri:
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
        from vllm.lora.resolver import LoRAResolverRegistry  # pyright: ignore[reportMissingImports]

        LoRAResolverRegistry.register_resolver("capstan", StoreResolver(open_store(uri), LoRARequest))


class StoreResolver:
    """vLLM's LoRAResolver. vLLM asks it for every name that the server does not know."""

    def __init__(self, store: Store, request: Callable[..., Any]) -> None:
        self._store, self._request = store, request
        self._folder: str | None = None
        self._kept = deque[Path]()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Answer vLLM's request for the adapter of this name; None if there is none."""
        return await asyncio.to_thread(self._resolve, lora_name)

    def _resolve(self, name: str) -> Any:
        adapter = adapter_named(name)
        if adapter is None:
            return None
        if self._folder is None:  # other processes of vLLM never come here
            stack = ExitStack()
            atexit.register(stack.close)
            self._folder = stack.enter_context(scratch_folder("rollout"))
        folder = Path(tempfile.mkdtemp(dir=self._folder)) / "adapter"
        try:
            fetch(self._store.sub(adapter.place), adapter.step, folder)
        except NotFound:
            return None
        self._kept.append(folder)
        if len(self._kept) > _KEPT:
            shutil.rmtree(self._kept.popleft(), ignore_errors=True)
        return self._request(lora_name=name, lora_int_id=1, lora_path=str(folder))  # vLLM counts adapters by itself
