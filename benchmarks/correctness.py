"""Does every attention backend, and everything built on it, compute the same on this device?

    python -m benchmarks.correctness [--out DIR] [--backend NAME]

needs no test framework; where there is one, the tests run the same checks. The tolerance is flash-attention's: against
fp64, at most twice the error of the plain definition in the same precision; in fp32, where both are off by a few
roundings, at most 1e-5. Errors are relative norms, one for the output and one for each gradient.

Shapes as in models/attention/reference.py.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.measure import Unsupported
from benchmarks.workloads import (
    TINY,
    make_model,
    make_text,
    next_token,
    quiet_star,
    rlp,
    transformers_model,
    unsupported_calls,
)
from models import attention
from models.attention import reference
from models.decoder import DecoderConfig, ThoughtCache
from models.logprobs import token_logprobs
from models.philox import Rng
from models.rollout import EAGER, RolloutRequest
from models.rollout.recorded import RecordedStep
from models.thinking import ThinkingModel
from models.thoughts import Anchors, Text, Thoughts
from objectives import Objective, Step

FP32_ERROR = 1e-5
# Largest errors allowed of a whole model in fp32, and of log-probs in nats.
MODEL_ERROR, LOGPROB_ERROR = 1e-4, 1e-3
DTYPES = (torch.bfloat16, torch.float32)
OUTPUTS = ("out", "dq", "dk", "dv", "dk_text", "dv_text")
CHECKED = tuple(backend for backend in attention.BACKENDS if backend != "reference")
MODEL = DecoderConfig(**vars(TINY) | {"head_dim": 64, "width": 96, "max_positions": 512})


@dataclass(frozen=True)
class Finding:
    """An error, and the largest one allowed."""

    what: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # NaN does not pass


# A check, run on a device. Raises Unsupported where there is nothing to check.
Check = Callable[[torch.device], list[Finding]]


def checks(few: bool = False, backends: Sequence[str] = CHECKED) -> dict[str, Check]:
    """All checks by name: those of each of `backends` and, along with the first backend's, those that concern none.
    few: only one dtype and one shape of heads."""
    found: dict[str, Check] = {}
    if CHECKED[0] in backends:
        found |= {"sampled log-probs match scored ones": sampled_is_scored, "draws match those of a CPU": same_draws}
        found |= {"logits match transformers": same_as_transformers, "sampling without syncs": sampling_syncs}
    for backend in backends:
        for dtype in DTYPES[:1] if few else DTYPES:
            kind = f"{backend}, {str(dtype).removeprefix('torch.')}"
            for where in ANCHORS:
                # Backends that compile for every shape take minutes in fp32.
                one = few or (backend in ("flex", "triton") and dtype == torch.float32)
                for heads in HEADS[:1] if one else HEADS:
                    name = f"thoughts {where}, {heads[0]}/{heads[1]} heads of {heads[2]}: {kind}"
                    found[name] = partial(whole_thoughts, backend, dtype, where, heads)
                found[f"newest token {where}: {kind}"] = partial(newest_token, backend, dtype, where)
            found[f"text: {kind}"] = partial(text_alone, backend, dtype)
            found[f"model, one pass and step by step: {kind}"] = partial(model_passes, backend, dtype)
            found[f"finite steps of all objectives: {kind}"] = partial(objective_steps, backend, dtype)
            if backend in ("aten", "triton"):
                found[f"recorded steps: {kind}"] = partial(recorded_steps, backend, dtype)
    return found


# Texts and anchors


def packed(lengths: Sequence[Sequence[int]], N: int, vocab_size: int = 97) -> Text:
    """Rows of documents of these lengths, padded to N."""
    B = len(lengths)
    document_BN, position_BN = torch.full((B, N), -1), torch.zeros(B, N, dtype=torch.int64)
    for row, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents):
            document_BN[row, start : start + length] = number
            position_BN[row, start : start + length] = torch.arange(length)
            start += length
    tokens_BN = torch.randint(3, vocab_size, (B, N), generator=torch.Generator().manual_seed(1))
    return Text(tokens_BN, document_BN, position_BN, torch.arange(B) + 7)


def _everywhere(device: torch.device) -> Anchors:
    return Anchors.everywhere(packed([[130], [130]], 130).to(device))


def _everywhere_packed(device: torch.device) -> Anchors:
    return Anchors.everywhere(packed([[67, 1, 40], [120]], 130).to(device))


def _few(device: torch.device) -> Anchors:
    text = packed([[30, 70], [130]], 130).to(device)
    return Anchors(text, torch.tensor([[3, 99, 41, -1], [129, 129, 64, 0]], device=device))


def _window(device: torch.device) -> Anchors:
    text = packed([[67, 1, 40], [120]], 130).to(device)
    return Anchors.everywhere(text).part(slice(50, 110))


ANCHORS = {
    "everywhere": _everywhere,
    "everywhere, packed and padded": _everywhere_packed,
    "in a window": _window,
    "at a few anchors": _few,
}
HEADS = ((9, 3, 64), (4, 4, 64), (8, 4, 128))


# Attention


def inputs(anchors: Anchors, K: int, S: int, T: int, heads: tuple[int, int, int]) -> list[Tensor]:
    """q, k, v, k_text, v_text in fp32, with values that are exact in bf16."""
    H, G, D = heads
    (B, N), M = anchors.text.shape, anchors.index_BM.shape[1]
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, K, S, M, H, D), (B, K, T, M, G, D), (B, K, T, M, G, D), (B, N, G, D), (B, N, G, D)]
    device = anchors.index_BM.device
    return [torch.randn(s, generator=generator).bfloat16().float().to(device) for s in shapes]


@contextmanager
def every_result_rounded() -> Iterator[None]:
    """The definition with every intermediate result in its inputs' dtype, as plain PyTorch would compute it."""
    exact = reference._exact
    reference._exact = lambda x: x
    try:
        yield
    finally:
        reference._exact = exact


def results(function: Callable[..., Tensor], arguments: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of all arguments, computed in `dtype`."""
    leaves = [x.to(dtype).requires_grad_() for x in arguments]
    out = function(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).bfloat16().to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def relative_error(value: Tensor, truth: Tensor) -> float:
    scale = truth.double().norm().item()
    return (value.double() - truth.double()).norm().item() / (scale if scale > 0 else 1.0)


def judged(got: list[Tensor], plain: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> list[Finding]:
    floor = FP32_ERROR if dtype == torch.float32 else 0.0
    return [
        Finding(name, relative_error(a, c), max(2 * relative_error(b, c), floor))
        for name, a, b, c in zip(OUTPUTS, got, plain, truth, strict=False)
    ]


def thoughts_by(backend: str, anchors: Anchors) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, k_text: Tensor, v_text: Tensor) -> Tensor:
        return attention.thought_attention(q, k, v, k_text, v_text, anchors, backend)

    return attend


def text_by(backend: str, text: Text) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.text_attention(q, k, v, text, backend)

    return attend


def whole_thoughts(
    backend: str, dtype: torch.dtype, where: str, heads: tuple[int, int, int], device: torch.device
) -> list[Finding]:
    """Forward and backward of a whole thought's attention."""
    anchors = ANCHORS[where](device)
    arguments = inputs(anchors, 2, 13, 13, heads)
    with unsupported_calls():
        got = results(thoughts_by(backend, anchors), arguments, dtype)
    truth = results(thoughts_by("reference", anchors), arguments, torch.float64)
    with every_result_rounded():
        plain = results(thoughts_by("reference", anchors), arguments, dtype)
    return judged(got, plain, truth, dtype)


def newest_token(backend: str, dtype: torch.dtype, where: str, device: torch.device) -> list[Finding]:
    """The newest of seven tokens, without gradient."""
    anchors = ANCHORS[where](device)
    arguments = inputs(anchors, 3, 1, 7, HEADS[0])
    rounded = [x.to(dtype) for x in arguments]
    with torch.no_grad(), unsupported_calls():
        got = thoughts_by(backend, anchors)(*rounded)
    truth = thoughts_by("reference", anchors)(*(x.double() for x in arguments))
    with every_result_rounded():
        plain = thoughts_by("reference", anchors)(*rounded)
    return judged([got], [plain], [truth], dtype)


def text_alone(backend: str, dtype: torch.dtype, device: torch.device) -> list[Finding]:
    """Forward and backward of packed text; gradients in the order of q, k, v."""
    found = []
    for text in (packed([[130], [130]], 130).to(device), packed([[67, 1, 40], [120]], 130).to(device)):
        H, G, D = HEADS[0]
        generator = torch.Generator().manual_seed(0)
        arguments = [torch.randn(2, 130, h, D, generator=generator).bfloat16().float().to(device) for h in (H, G, G)]
        with unsupported_calls():
            got = results(text_by(backend, text), arguments, dtype)
        truth = results(text_by("reference", text), arguments, torch.float64)
        with every_result_rounded():
            plain = results(text_by("reference", text), arguments, dtype)
        found += judged(got, plain, truth, dtype)
    return found


# Models


def _model(dtype: torch.dtype, device: torch.device, backend: str | None) -> ThinkingModel:
    model = make_model(MODEL, dtype, torch.device("cpu")).to(device)
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if "norm" not in name:
                parameter.mul_(5.0)  # large enough that attention is far from uniform
    model.decoder.attention_backend = backend
    return model


def model_passes(backend: str, dtype: torch.dtype, device: torch.device) -> list[Finding]:
    """Hidden states and gradients of one pass, and hidden states token by token; against the definition in fp32."""
    found = []
    for where, make in ANCHORS.items():
        anchors = make(device)
        B, M, K, S = *anchors.index_BM.shape, 2, 6
        tokens = torch.randint(3, MODEL.vocab_size, (B, K, S, M), generator=torch.Generator().manual_seed(2)).to(device)
        thoughts = Thoughts(tokens, anchors)
        # Padding, and thoughts anchored in it, do not count.
        real_BM = (anchors.index_BM >= 0) & (anchors.text.document_BN.gather(1, anchors.index_BM.clamp(min=0)) >= 0)

        with unsupported_calls():
            got = _passes(_model(dtype, device, backend), thoughts, real_BM)
        truth = _passes(_model(torch.float32, device, "reference"), thoughts, real_BM)
        plain = _passes(_model(dtype, device, "reference"), thoughts, real_BM)
        for name in truth:
            allowed = MODEL_ERROR if dtype == torch.float32 else 2 * relative_error(plain[name], truth[name])
            found.append(Finding(f"{name}, {where}", relative_error(got[name], truth[name]), allowed))
    return found


def _passes(model: ThinkingModel, thoughts: Thoughts, real_BM: Tensor) -> dict[str, Tensor]:
    tokens_BKSM, anchors, counts = thoughts.tokens_BKSM, thoughts.anchors, real_BM[:, None, None, :, None]
    B, K, S, M = tokens_BKSM.shape
    state = model.read(anchors.text)
    hidden = model.think(thoughts, state) * counts
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3)).to(hidden)
    (hidden * weight).sum().backward()
    with torch.no_grad():
        cache = ThoughtCache(MODEL, B, K, S, M, like=state.hidden_BNW)
        newest = [model.continue_thoughts(tokens_BKSM[:, :, s : s + 1], anchors, state, cache) for s in range(S)]
    gradient = torch.cat([p.grad.flatten() for p in model.decoder.parameters() if p.grad is not None])
    return {"one pass": hidden.detach(), "gradients": gradient, "step by step": torch.cat(newest, dim=2) * counts}


def recorded_steps(backend: str, dtype: torch.dtype, device: torch.device) -> list[Finding]:
    """Hidden states of thoughts at a few anchors, all steps but the first replayed; against the definition in fp32."""
    anchors = ANCHORS["at a few anchors"](device)
    B, M, K, T = *anchors.index_BM.shape, 2, 40
    tokens = torch.randint(3, MODEL.vocab_size, (B, K, T, M), generator=torch.Generator().manual_seed(2)).to(device)

    @torch.no_grad()
    def step_by_step(dtype: torch.dtype, backend: str, recorded: bool) -> Tensor:
        model = _model(dtype, device, backend)
        state = model.read(anchors.text)
        cache = ThoughtCache(MODEL, B, K, T, M, like=state.hidden_BNW)
        hidden = [model.continue_thoughts(tokens[:, :, :1], anchors, state, cache)]
        step = RecordedStep(model, anchors, state, cache) if recorded else None
        for t in range(1, T):
            newest = tokens[:, :, t : t + 1]
            hidden.append(step(newest).clone() if step else model.continue_thoughts(newest, anchors, state, cache))
        return torch.cat(hidden, dim=2)

    with unsupported_calls():
        got = step_by_step(dtype, backend, True)
    truth, plain = step_by_step(torch.float32, "reference", False), step_by_step(dtype, "reference", False)
    allowed = MODEL_ERROR if dtype == torch.float32 else 2 * relative_error(plain, truth)
    return [Finding("hidden states", relative_error(got, truth), allowed)]


def objective_steps(backend: str, dtype: torch.dtype, device: torch.device) -> list[Finding]:
    """Loss and gradients of a step of each objective are finite."""
    text = make_text(MODEL, 2, 40, device)
    found = []
    objectives: dict[str, Objective] = {
        "next_token": next_token(),
        "quiet_star": quiet_star(L=3, A=2, K=2),
        "rlp": rlp(P=40, G=3, T=4, anchors=2),
    }
    for name, objective in objectives.items():
        model = _model(dtype, device, backend)
        with unsupported_calls():
            (output,) = Step(objective, model, [text], Rng(0, 0)).losses()
        output.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        finite = all(bool(x.isfinite().all()) for x in [output.loss, *gradients])
        found.append(Finding(name, 0.0 if finite and gradients else math.inf, 0.0))
    return found


def sampled_is_scored(device: torch.device) -> list[Finding]:
    """fp32: the log-probs that sampling reports match those of a pass over the finished thoughts, in nats."""
    found = []
    for where, make in ANCHORS.items():
        model, anchors = _model(torch.float32, device, None), make(device)
        with torch.no_grad():
            state = model.read(anchors.text)
            rollout = EAGER.sample(RolloutRequest(model, state, anchors, 2, 7, Rng(5, 6), prompt=(4,)))
            hidden = model.think(rollout.thoughts, state)[:, :, :-1]
        targets, where_sampled = rollout.thoughts.tokens_BKSM[:, :, 1:], rollout.sampled_BKSM[:, :, 1:]
        scored = token_logprobs(hidden, model.head_weight_VW, targets.clamp(min=0), 1.0, model.banned_V)
        difference = (scored - rollout.logprobs_BKSM[:, :, 1:])[where_sampled].abs().max().item()
        found.append(Finding(where, difference, LOGPROB_ERROR))
    return found


def same_draws(device: torch.device) -> list[Finding]:
    """Random uniforms have the same bits on every device."""
    places = [torch.arange(n, device=device) for n in (3, 5, 7)]
    on_device = Rng(3, 4).uniform(places[0][:, None, None], places[1][:, None], places[2], 2)
    on_cpu = Rng(3, 4).uniform(places[0].cpu()[:, None, None], places[1].cpu()[:, None], places[2].cpu(), 2)
    return [Finding("largest difference", (on_device.cpu() - on_cpu).abs().max().item(), 0.0)]


def sampling_syncs(device: torch.device) -> list[Finding]:
    """bf16: tokens missing from a rollout that nothing ends early and that may not sync with the device."""
    if device.type != "cuda":
        raise Unsupported(f"torch detects syncs only on CUDA, not on {device.type}")
    found = []
    for where, make in ANCHORS.items():
        model, anchors = _model(torch.bfloat16, device, None), make(device)
        with torch.no_grad():
            state = model.read(anchors.text)
        sample = partial(EAGER.sample, RolloutRequest(model, state, anchors, 2, 10, Rng(5, 6), prompt=(4,)))
        sample()  # the first call may sync to build what is cached with the text and its anchors
        with syncs_raise(model):
            rollout = sample()
        missing_BM = (~rollout.sampled_BKSM[:, :, 1:]).sum((1, 2)) * (anchors.index_BM >= 0)
        found.append(Finding(where, missing_BM.sum().item(), 0.0))
    return found


@contextmanager
def syncs_raise(model: ThinkingModel) -> Iterator[None]:
    """From the model's next pass over thoughts on, syncing with the device raises RuntimeError. Not earlier, because
    copying a rollout's prompt to the device syncs."""

    def continue_thoughts(*call) -> Tensor:
        torch.cuda.set_sync_debug_mode("error")
        return ThinkingModel.continue_thoughts(model, *call)

    model.continue_thoughts = continue_thoughts  # type: ignore[method-assign, assignment]
    try:
        yield
        assert torch.cuda.get_sync_debug_mode() == 2, "there was no pass over thoughts"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        del model.continue_thoughts


def same_as_transformers(device: torch.device) -> list[Finding]:
    """fp32 logits of plain text."""
    found = []
    for family in ("llama", "qwen3"):
        config = DecoderConfig(**vars(MODEL) | {"family": family, "qk_norm": family == "qwen3"})
        model = make_model(config, torch.float32, torch.device("cpu")).to(device)
        text = make_text(config, 2, 40, device)
        try:
            theirs = transformers_model(model, torch.float32)
        except ImportError:
            raise Unsupported("transformers is not installed") from None
        with torch.no_grad():
            logits = model.read(text).hidden_BNW @ model.head_weight_VW.t()
            truth = theirs(text.tokens_BN).logits
        found.append(Finding(family, relative_error(logits, truth), MODEL_ERROR))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    from benchmarks.bench import choose_device

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="directory for correctness.json")
    parser.add_argument("--backend", choices=CHECKED, help="check only this one, and write correctness-NAME.json")
    parser.add_argument("--tiny", action="store_true", help="only one dtype and one shape of heads")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = choose_device()
    about, found = environment(device), {}
    counts = Counter(passed=0, failed=0, unsupported=0)
    backends = [arguments.backend] if arguments.backend else CHECKED
    path = arguments.out / f"correctness{'-' + arguments.backend if arguments.backend else ''}.json"
    for name, check in checks(arguments.tiny, backends).items():
        outcome, said, findings = run_check(check, device)
        counts[outcome] += 1
        found[name] = {
            "outcome": outcome,
            "said": said,
            "errors": {f.what: {"error": f.error, "allowed": f.allowed} for f in findings},
        }
        print(f"{name}: {outcome}{said and ': ' + said}", flush=True)
        results = {"environment": about, "counts": counts, "checks": found}
        path.write_text(json.dumps(results, indent=1) + "\n")
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return min(1, counts["failed"])


def run_check(check: Check, device: torch.device) -> tuple[str, str, list[Finding]]:
    """`passed`, `failed` or `unsupported`; the reason; and all errors."""
    try:
        findings = check(device)
    except Unsupported as reason:
        return "unsupported", str(reason), []
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}", []
    wrong = [f for f in findings if not f.passed]
    said = "; ".join(f"{f.what} is off by {f.error:.3g}, allowed is {f.allowed:.3g}" for f in wrong)
    return "failed" if wrong else "passed", said, findings


if __name__ == "__main__":
    raise SystemExit(main())
