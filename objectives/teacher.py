"""The slowly moving copy of a model that RLP measures information against."""

from __future__ import annotations

import copy

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
        """The teacher, where the student is; a copy of `student` at the first call."""
        if self._model is None:
            self._model = copy.deepcopy(student).requires_grad_(False)
        return self._model.to(student.head_weight_VW.device)

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

    def load(self, student: ThinkingModel, state: dict[str, Tensor]) -> None:
        """Restores `state`, which may be empty; `student` gives the shape."""
        if state:
            self.model(student).load_state_dict(state)
