"""Writes what other software is to load: one small export of each family, and of a run of each thinking objective.

    python -m tests.external.exports OUT

Each is OUT/plain/NAME, with the lab's tokenizer; OUT/thinking/NAME is its thinking export. NAME.reference.safetensors
beside them hold prompts, int64 [20, 24], and what this project makes of them: `logits`, fp32 [20, 24, V], without
thoughts. For a thinking export also `sequences`, the prompts as they go on greedily; where it thinks at every token,
greedy `thoughts` [20, 24, L] and the logits after them, `mixed`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoints import export, load_thinking_model
from checkpoints.families import FAMILIES
from checkpoints.hugging_face import trained_thinking
from checkpoints.references import LAB
from models import EAGER, Decoder, DecoderConfig, Rng, Text, ThinkingModel
from models.thinking import TrainedThinking
from objectives import QuietStar, QuietStarConfig
from pretrain.cli import main

# Heads of 32, the smallest that vLLM has on CPUs, and width / heads, which it takes Qwen2's to be; a few embeddings
# more than the tokenizer has tokens.
SIZES = dict(vocab_size=64, width=128, ffn_width=192, layers=4, heads=4, kv_heads=2, head_dim=32, max_positions=512)
ROTARY = {"olmo3": ("plain", "plain", "plain", "scaled"), "smollm3": ("scaled", "scaled", "scaled", "none")}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
RECIPES = {"quiet_star": "lab-quiet-star", "rlp": "quickstart", "rpt": "lab-rpt"}


EVERY_TOKEN = TrainedThinking("every-token", 4)
NEW_TOKENS = 8


def random_model(config: DecoderConfig) -> ThinkingModel:
    """Random weights, norms and biases included, large enough for greedy tokens to be clear and various."""
    model = ThinkingModel(Decoder(config), delimiters=True, mixing_head=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * (0.005 if "delimiters" in name else 0.3)
            parameter.copy_(noise + 1.0 if "norm" in name else noise)
    return model


def write_families(out: Path) -> None:
    for name, family in FAMILIES.items():
        windows = dict(sliding_window=256, windowed_layers=(0, 1, 2), rope_scaling=YARN) if name == "olmo3" else {}
        fixed = dict(family.fixed) | dict(family=name, rope_theta=5000.0, rotary=ROTARY.get(name, ()))
        model = random_model(DecoderConfig(**SIZES, **fixed, **windows))
        model.ban(61, (0, 1))
        export(model.decoder, out / "plain" / name, LAB, shard_bytes=100_000)
        settings = dict(trained=EVERY_TOKEN, shard_bytes=100_000, thinking=True)
        export(model, out / "thinking" / name, LAB, **settings)


def write_runs(out: Path) -> None:
    """Two steps of each thinking objective, from the command line to the export."""
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        export(random_model(DecoderConfig(**SIZES, tie_embeddings=True)).decoder, base, LAB)
        for name, recipe in RECIPES.items():
            run = str(Path(scratch) / name)
            few = ["--steps", "2", "--evaluation.rows", "2", "--control", "null", "--logging.wandb", "disabled"]
            assert main(["fit", recipe, "--model", str(base), "--run-dir", run, *few]) == 0
            assert main(["export", run, str(out / "plain" / name)]) == 0
            assert main(["export", run, str(out / "thinking" / name), "--thinking"]) == 0


def logits_of(model: ThinkingModel, tokens: torch.Tensor) -> torch.Tensor:
    return model.read(Text.from_rows(tokens)).hidden_BNW @ model.head_weight_VW.T


def mixed_logits(model: ThinkingModel, tokens: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, N, V] after greedy thoughts at every token, and the thoughts [B, N, L]."""
    objective = QuietStar(QuietStarConfig(length=length))
    text = Text.from_rows(tokens)
    bodies = objective.evaluate(model, text, Rng(0, 0), EAGER).bodies
    hidden = objective.hidden_after(model, model.read(text), bodies)
    return hidden @ model.head_weight_VW.T, bodies.tokens_BLM.transpose(1, 2)


def greedy_answer(model: ThinkingModel, trained: TrainedThinking, prompt: list[int]) -> list[int]:
    """Token by token, each by a pass over all before it."""

    def following(ids: list[int], banned: torch.Tensor | None = None) -> int:
        logits = logits_of(model, torch.tensor([ids]))[0, -1]
        return int((logits if banned is None else logits.masked_fill(banned, -torch.inf)).argmax())

    banned = model.banned_V.clone()
    banned[list(trained.close_ids)] = False
    body: list[int] = []
    assert trained.length is not None
    while len(body) < trained.length and tuple(body[-len(trained.close_ids) :]) != trained.close_ids:
        body.append(following([*prompt, *trained.open_ids, *body], banned))
    if tuple(body[-len(trained.close_ids) :]) == trained.close_ids:
        body = body[: -len(trained.close_ids)]
    ids = [*prompt, *trained.open_ids, *body, *trained.close_ids]
    answer: list[int] = []
    for _ in range(NEW_TOKENS):
        answer.append(following([*ids, *answer]))
    return [*prompt, *answer]


@torch.no_grad()
def write_reference(directory: Path) -> None:
    model, trained = load_thinking_model(directory), trained_thinking(directory)
    tokens = torch.randint(61, (20, 24), generator=torch.Generator().manual_seed(1))
    reference = {"tokens": tokens, "logits": logits_of(model, tokens)}
    if directory.parent.name == "thinking":
        assert trained is not None and trained.length is not None
        if trained.think == "every-token":
            reference["mixed"], reference["thoughts"] = mixed_logits(model, tokens, trained.length)
            sequences = tokens
            for _ in range(NEW_TOKENS):
                following = mixed_logits(model, sequences, trained.length)[0][:, -1:].argmax(-1)
                sequences = torch.cat([sequences, following], dim=1)
        else:
            sequences = torch.tensor([greedy_answer(model, trained, row) for row in tokens.tolist()])
        reference["sequences"] = sequences
    reference = {name: tensor.contiguous() for name, tensor in reference.items()}
    save_file(reference, directory.with_name(f"{directory.name}.reference.safetensors"))


if __name__ == "__main__":
    out = Path(sys.argv[1])
    write_families(out)
    write_runs(out)
    for directory in sorted(path for path in out.glob("*/*") if path.is_dir()):
        write_reference(directory)
