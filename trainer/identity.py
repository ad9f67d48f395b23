"""What this configuration's checkpoints belong to: its base, its adapter, its data and their order."""

from trainer.base.locate import Base
from trainer.checkpoint.identity import Identity
from trainer.config import Config
from trainer.data.prepare import train_order


def identity_of(config: Config, base: Base, dataset: str) -> Identity:
    """`dataset` is the fingerprint of the compiled training data."""
    return Identity(
        dataset=dataset,
        base={
            "path": base.name,
            "fingerprint": base.fingerprint,
            "layers": config.model.layers,
            **{f"quant.{key}": value for key, value in config.quant.model_dump(mode="json", exclude={"cache"}).items()},
        },
        adapter=config.tuning.model_dump(mode="json"),
        order=train_order(config).to_json(),
    )
