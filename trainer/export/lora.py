"""What of an export belongs to LoRA: PEFT's settings and names, and what an adapter adds to a weight."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trainer.config import Config, Tuning
from trainer.scratch import scratch_folder
from trainer.tuning.lora import METHODS

PEFT_SETTINGS = "adapter_config.json"


def peft_settings(config: Config, names: Iterable[str]) -> bytes:
    """adapter_config.json: has PEFT put adapters around the modules that the trained parameters `names` belong to."""
    adapter = METHODS[config.tuning.method](config.tuning).peft_config(
        {name.split(".lora_")[0].rpartition(".")[2] for name in names}
    )
    adapter.inference_mode = True
    adapter.base_model_name_or_path = config.model.base  # a Hub id stays one, not this machine's cache
    adapter.revision = config.model.revision
    with scratch_folder("export") as folder:
        adapter.save_pretrained(folder)
        settings = json.loads(Path(folder, PEFT_SETTINGS).read_bytes())
    settings["target_modules"].sort()  # PEFT writes a set, whose order changes from one process to the next
    return json.dumps(settings, indent=2, sort_keys=True).encode()


def peft_name(name: str) -> str:
    """PEFT saves under the wrapped model's names and without the adapter's own name."""
    return f"base_model.model.{name.replace('.default.', '.')}"


@dataclass(frozen=True)
class LowRankUpdate:
    """What an adapter adds to a weight (outputs, inputs): scaling * up @ down; up (outputs, rank), down (rank, inputs), fp32."""

    up: Tensor
    down: Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def add_to(self, rows: Tensor, first: int) -> None:
        """Add it to some rows of the weight, of which `first` is the number of the first, in place."""
        rows = rows.view(-1, self.shape[1])
        change = self.up[first : first + len(rows)] @ self.down
        rows.copy_(change.mul_(self.scaling).add_(rows))


def low_rank_updates(adapter: dict[str, Tensor], tuning: Tuning) -> dict[str, LowRankUpdate]:
    """Name of each adapted weight in the model -> its update. `adapter`: trained parameter by its name in the model."""
    scaling = METHODS[tuning.method](tuning).scaling
    updates: dict[str, LowRankUpdate] = {}
    for name in adapter:
        path, found, rest = name.partition(".lora_A.")
        if found:
            up, down = adapter[f"{path}.lora_B.{rest}"].float(), adapter[name].float()
            updates[f"{path}.weight"] = LowRankUpdate(up, down, scaling)
    assert 2 * len(updates) == len(adapter), "something else than LoRA's matrices was trained"
    return updates
