"""The cost of quantizing again: a merged model in 4 or 8 bits in transformers, against the model as it was trained.

No rounding of products explains that difference, so nothing is proven equal. The difference may be half of what the
training changed: otherwise the quantization has undone much of the training.
"""

from contextlib import nullcontext
from typing import Any

from torch import Tensor

from trainer.base.describe.language_settings import model_config
from trainer.export.figures import Proof
from trainer.export.proof.distributions import Distance, distance
from trainer.export.proof.in_transformers import plain
from trainer.export.proof.in_transformers.dequantized import dequantized_by_transformers
from trainer.export.proof.models import Trained, directory_of
from trainer.export.proof.verify import make_proof
from trainer.store.store import Store, open_store


def prove_recoded(folder: Store, step: int, exported: Store) -> Proof:
    """Compare the trained model of `step` with the files in `exported`.

    Its effect is its difference from itself before the training.
    """
    trained = Trained.at(folder, step)
    trained.check_texts(exported)
    rows, computed_in = trained.probe.rows, trained.computed_in
    expected, begun = trained.predictions(), trained.predictions(learnt=False)
    found = trained.exported(_recoded_side, exported.uri, packed=False, recoded=True)
    difference, effect = distance(expected, found, rows), distance(expected, begun, rows)
    return make_proof(trained.probe, computed_in, difference, half(effect), effect)


def half(effect: Distance) -> Distance:
    """Return the largest allowed difference by fewer bits, if the training has had this effect."""
    return Distance(0.5 * effect.kl, 0.5 * effect.log_prob)


def _recoded_side(trained: Trained, exported: str) -> list[Tensor]:
    """Return the logits of the model as transformers reads it. FP8 is decoded, because no CPU multiplies in FP8."""
    with directory_of(open_store(exported)) as folder:
        architecture: Any = model_config(folder, None)
        quantization = getattr(architecture, "quantization_config", None) or {}
        decoded = quantization.get("quant_method") == "fp8"
        with dequantized_by_transformers(architecture) if decoded else nullcontext():
            model = plain.load_plain(folder, trained.dtype, trained.dtype, architecture if decoded else None)
        plain.keep_packed(model)
        return plain.place_logits(model.to(plain.device()), trained.probe.rows)
