"""(IA)^3's linear layer (arXiv:2205.05638): a learnt vector scales its inputs or its outputs, element by element."""

import torch
from torch import Tensor, nn


class ScaledLinear(nn.Module):
    """`y = l * (W x + bias)`, or `y = W (l * x) + bias` where `feedforward`.

    Parameter: ia3_l (outputs, 1), or (1, inputs) where `feedforward`: PEFT's shapes. It starts as ones.
    """

    def __init__(self, base_layer: nn.Linear, feedforward: bool, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (1, base_layer.in_features) if feedforward else (base_layer.out_features, 1)
        self.base_layer, self.feedforward = base_layer, feedforward
        self.active = True
        self.ia3_l = nn.Parameter(torch.ones(shape, device=base_layer.weight.device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        if not self.active:
            return self.base_layer(x)
        factors = self.ia3_l.flatten()
        return self.base_layer(x * factors) if self.feedforward else self.base_layer(x) * factors
