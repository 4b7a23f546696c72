"""The slowly moving copy of a model that RLP measures information against."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from models.thinking import ThinkingModel


class EmaTeacher:
    """φ, an exponential moving average of θ: φ ← θ at its first use, then φ ← τφ + (1−τ)θ (RLP, 2510.01265 §3.2).

    Held in the masters' dtype, fp32: at τ = 0.999 one step moves a weight by a thousandth of its difference to θ, which
    bf16 with its eight bits rounds away.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self._model: ThinkingModel | None = None

    def model(self, student: ThinkingModel) -> ThinkingModel:
        """The teacher, where the student is; a copy of `student` at the first call.

        A student on the meta device has no weights yet: then they are copied at the first call after it has.
        """
        if self._model is None:
            self._model = copy.deepcopy(student).requires_grad_(False)
        device = student.head_weight_VW.device
        if device.type == "meta":
            return self._model
        if self._model.head_weight_VW.device.type == "meta":
            self._model.allocate(device)
            with torch.no_grad():
                for phi, theta in zip(self._model.parameters(), student.parameters(), strict=True):
                    phi.copy_(theta)  # shard by shard
        return self._model.to(device)

    @torch.no_grad()
    def update(self, student: ThinkingModel) -> None:
        """One step of the average; to be called after every optimizer step."""
        if self._model is None:
            return
        for phi, theta in zip(self._model.parameters(), student.parameters(), strict=True):
            phi.lerp_(theta, 1 - self.decay)

    def state(self) -> dict[str, Tensor]:
        """Its weights by name; empty before the first use."""
        return {} if self._model is None else dict(self._model.state_dict())

    @torch.no_grad()
    def load(self, student: ThinkingModel, state: Mapping[str, Tensor]) -> None:
        """Restores `state`, which may be empty; `student` gives the shape."""
        if state:
            for name, phi in self.model(student).state_dict().items():
                phi.copy_(state[name])
