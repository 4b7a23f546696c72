"""Pretraining objectives. Each builds itself from its settings and a tokenizer, and hands out the terms of its loss;
`Step` turns these into losses. README.md beside this file says how each works and how to add one.
"""

from __future__ import annotations

import importlib

from objectives.base import (
    Batch,
    Objective,
    ObjectiveConfig,
    SettingError,
    Term,
    TextPart,
    ThoughtPart,
    ThoughtRecord,
    ThoughtState,
    TokenScores,
    setting,
)
from objectives.counterfactuals import Bodies, CounterfactualTest
from objectives.driver import Step, StepOutput
from objectives.metrics import Mean, Metric
from objectives.next_token import NextToken, NextTokenConfig
from objectives.pause import Pause, PauseConfig
from objectives.quiet_star import QuietStar, QuietStarConfig
from objectives.rlp import Rlp, RlpConfig
from objectives.rpt import Rpt, RptConfig
from objectives.template import Template

__all__ = [
    "Batch",
    "Bodies",
    "CounterfactualTest",
    "Mean",
    "Metric",
    "NextToken",
    "NextTokenConfig",
    "Objective",
    "ObjectiveConfig",
    "Pause",
    "PauseConfig",
    "QuietStar",
    "QuietStarConfig",
    "Rlp",
    "RlpConfig",
    "Rpt",
    "RptConfig",
    "SettingError",
    "Step",
    "StepOutput",
    "Template",
    "Term",
    "TextPart",
    "ThoughtPart",
    "ThoughtRecord",
    "ThoughtState",
    "TokenScores",
    "find_objective",
    "setting",
]

OBJECTIVES: dict[str, type[Objective]] = {
    "next_token": NextToken,
    "quiet_star": QuietStar,
    "rlp": Rlp,
    "rpt": Rpt,
    "pause": Pause,
}


def find_objective(name: str) -> type[Objective]:
    """The class that a short name or an import path (`package.module:Class`) means.

    Raises ValueError, with the way out, for a name that is neither.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    module_name, colon, class_name = name.partition(":")
    if not colon or not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(f"must be one of {', '.join(OBJECTIVES)} or an import path package.module:Class, got {name!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"{name!r} names a module that cannot be imported ({error}); install it, or add its folder to PYTHONPATH"
        ) from None
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ValueError(f"{name!r}: {module_name} has no subclass of objectives.Objective named {class_name!r}")
    if not issubclass(getattr(found, "Config", object), ObjectiveConfig):
        raise ValueError(f"{name!r}: {class_name}.Config must be a dataclass derived from objectives.ObjectiveConfig")
    return found
