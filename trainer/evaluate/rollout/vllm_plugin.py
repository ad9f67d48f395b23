"""A plugin of vLLM: a server loads a run's adapters by their names from the store of the runs.

So it shares no folder with anybody. vLLM calls `register` if Capstan is installed beside it (docs.vllm.ai,
design/lora_resolver_plugins). The store is that of CAPSTAN_STORE, and a name cannot reach outside it. A request to
/v1/load_lora_adapter could, because it has a path.
"""

import asyncio
import atexit
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from trainer.errors import NotFound
from trainer.evaluate.rollout.published import fetch, named
from trainer.store.scratch import scratch_folder
from trainer.store.store import Store, open_store

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
        adapter = named(name)
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
