"""The README.md of an exported run, from the run's own records. Licences are named where known, never guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from checkpoints.references import HUB_ID
from pretrain import __version__
from pretrain.opening import OpenedModel
from pretrain.recipe_files import recipe_to_yaml
from pretrain.report import CONDITIONS, HELD_OUT, sentences
from pretrain.run_directory import RunDirectory

# Short references → hub id if there is one, and the licence.
BASES: dict[str, tuple[str | None, str]] = {
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    "lab": (None, "apache-2.0"),
}
DATA = {"python-docs": "PSF-2.0, as Python", "lab": "generated problems, free of rights"}
PLAIN = """\
A plain language model, which any engine loads. `thinking/`, if it is there, holds what is used only for thinking;
`forethought sample` reads it."""
THINKING = """\
A language model that thinks {when}. transformers loads it with the code beside it:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
found = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=64, return_thoughts=True)
print(tokenizer.decode(found.sequences[0]), [tokenizer.decode(t[t >= 0]) for t in found.thoughts[0]])
```

`generate` takes all its usual arguments for the text, and for thoughts `think` ("off" for none), `thought_length` and
`thought_temperature` (0, the default, is greedy)."""
WHEN = {"every-token": "behind every token it writes", "before-answer": "before it answers"}
LICENCE_KEYS = ("license", "license_name", "license_link")


def front_matter(card: Path) -> dict[str, Any]:
    """The YAML block at the head of a model card; empty where there is none, or none that can be read."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    head, rest = text[:4], text[4:].partition("\n---")[0]
    try:
        found = yaml.safe_load(rest) if head == "---\n" else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def model_card(opened: OpenedModel, thinking: bool = False) -> str | None:
    """Of a run's checkpoint, plain or as a thinking export; of any other model the card that it came with, if any."""
    recipe, state, own = opened.recipe, opened.state, opened.tokenizer_directory / "README.md"
    if recipe is None or state is None:
        return own.read_text(encoding="utf-8", errors="replace") if own.exists() else None
    directory = RunDirectory(opened.tokenizer_directory.parent)
    step, objective = state["step"], recipe.trained_with
    base, licence = _base(recipe.model, own)
    hub_data = [source.reference for source in recipe.data.sources.values() if _is_hub_id(source.reference)]
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": base} if base is not None else {}),
        **({"datasets": hub_data} if hub_data else {}),
        **licence,
        "tags": ["forethought", *dict.fromkeys(c.name.rpartition(":")[2] for c in recipe.trained.values())],
    }
    facts = {
        "objective": " ".join([f"{objective}.", *sentences(recipe)]),
        "base model": recipe.model,
        "data": ", ".join(source.reference for source in recipe.data.sources.values()),
        "steps": f"{step:,}" if recipe.steps is None else f"{step:,} of {recipe.steps:,}",
        "text": f"{state['tokens']:,} tokens",
        "compute": f"{state['flops']:.3g} FLOPs",
        "trained with": f"forethought {__version__}",
    }
    licences = {recipe.model: licence.get("license_name") or licence.get("license") or "not known here; see its page"}
    for source in recipe.data.sources.values():
        licences[source.reference] = DATA.get(source.reference.partition(":")[0], "not known here; see its page")
    results = _results(directory, step)
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False, allow_unicode=True) + "---",
            f"# {recipe.model.rpartition('/')[2]} after {step:,} steps of {objective}",
            "",
            THINKING.format(when=WHEN[opened.thinking.think]) if thinking and opened.thinking is not None else PLAIN,
            "",
            *_table(("training", ""), facts),
            "",
            *(_table(("held-out text", "nats/token or share"), results) if results else ["No text was held out."]),
            "",
            *_table(("licence of", ""), licences),
            "",
            "## Recipe",
            "",
            "```yaml",
            recipe_to_yaml(recipe).rstrip(),
            "```",
            "",
        ]
    )


def _is_hub_id(reference: str) -> bool:
    return HUB_ID.fullmatch(reference) is not None and not Path(reference).exists()


def _base(reference: str, card: Path) -> tuple[str | None, dict[str, Any]]:
    """The base model's hub id, if it has one, and its licence, if it is known, as keys of a model card."""
    if reference in BASES:
        name, licence = BASES[reference]
        return name, {"license": licence}
    found = front_matter(card)
    name = reference.partition("@")[0] if _is_hub_id(reference) else None
    return name, {key: found[key] for key in LICENCE_KEYS if key in found}


def _results(directory: RunDirectory, step: int) -> dict[str, str]:
    """What the last evaluation up to the step found."""
    found = [e for e in directory.read(directory.evaluations) if e["step"] <= step]
    last = found[-1] if found else {}
    rows = {label: last[name] for name, label in HELD_OUT.items() if name in last}
    shown = {label: f"{value:.4f}" for label, value in rows.items() if not math.isnan(value)}
    for condition, label in CONDITIONS.items():
        if condition in last.get("counterfactual", {}):
            nll = last["counterfactual"][condition]
            shown[f"after {label}"] = f"{nll['nll']:.4f} ({nll['low']:.4f} to {nll['high']:.4f})"
    return {f"{label}, step {last['step']:,}": value for label, value in shown.items()}


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
