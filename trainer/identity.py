"""The identity that a configuration gives its checkpoints: its base, its method, its objective, its optimizer, its data and their order.

Every key is named here, by the method or by the objective, never taken over from a dump of settings: a setting that is added later stays out,
or comes with a default for the checkpoints that were written before it.
"""

from trainer.base.find.content import content_of
from trainer.base.find.locate import Base
from trainer.checkpoint.identity import Identity
from trainer.config import Config
from trainer.data.order.settings import train_order
from trainer.data.render.text_files import text_of
from trainer.objective.objective import find_objective
from trainer.tuning.method import method_of


def identity_of(config: Config, base: Base, dataset: str) -> Identity:
    """`dataset` is the fingerprint of the compiled training data. Reads samples of the base's weights; raises as `content_of`."""
    method, objective = method_of(config), find_objective(config)
    return Identity(
        dataset=dataset,
        base={
            "path": base.name,
            "name": config.model.base,
            "revision": config.model.revision,
            "dtype": config.model.dtype,
            "fingerprint": base.fingerprint,
            "layers": config.model.layers,
            "quant.type": config.quant.type,
            "quant.block_size": config.quant.block_size,
            "quant.double": config.quant.double,
            **({"add_tokens": config.model.add_tokens} if config.model.add_tokens else {}),
            **content_of(base),
        },
        adapter=method.identity,
        order=train_order(config).to_json(),
        objective=objective.identity,
        optimizer=config.optim.name,
        text=text_of(config.data, base.directory).hashes,
        defaults={**objective.defaults, **method.defaults},
    )
