"""A linear layer with the toy's matrices, by PEFT's names."""

import torch
from torch import Tensor, nn


class HadamardLinear(nn.Module):
    """`y = W x + scaling * ((w1_a @ w1_b) * (w2_a @ w2_b)) x + bias`."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float, spread: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.active = base, scaling, True
        for name, shape in (("a", (base.out_features, rank)), ("b", (rank, base.in_features))):
            for factor in ("w1", "w2"):
                drawn = torch.randn(shape) * (0 if (factor, name) == ("w2", "b") else spread)
                self.register_parameter(f"hada_{factor}_{name}", nn.Parameter(drawn.to(base.weight.device, dtype)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if not self.active:
            return y
        first, second = (self._product(factor) for factor in ("w1", "w2"))
        change = first * second * self.scaling
        return y + nn.functional.linear(x.to(change.dtype), change).to(y.dtype)

    def _product(self, factor: str) -> Tensor:
        """(outputs, inputs)."""
        return self.get_parameter(f"hada_{factor}_a") @ self.get_parameter(f"hada_{factor}_b")
