"""vLLM as the engine, in the process that trains: for models so large, and thoughts so long and ragged, that they are
worth an engine of their own.

It holds the language model a second time and begins with random weights. After each optimizer step it is handed those
that are trained, one tensor at a time; where the device lets it, it sleeps while they are trained and frees its memory.
Nothing in vLLM says when some weights have not arrived, so the model itself scores some of the first tokens that are
sampled after each handover.

Thoughts are requests of their own, in continuous batches over a shared cache of prefixes, which is also what vLLM
makes of one request for several. There is neither top-p nor top-k: what is sampled from is what the model scores.

Shapes: B rows of text, M anchors, K thoughts, S tokens of a thought, U = B · K · M, J tokens that are checked.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.flops import count_rollout
from models.logprobs import token_logprobs
from models.philox import philox4x32
from models.precision import accumulation_dtype, optimizer_steps
from models.rollout.request import Rollout, RolloutRequest
from models.thinking import ThinkingModel
from models.thoughts import PAD, Thoughts

# Of each row's first thought so many tokens are checked.
CHECKED = 32
# Nats by which the log-probs of checked tokens may be from the model's own in the mean: some six to ten times what
# rounding was seen to do to 30 layers, 1e-5 to 3e-5 in fp32 and 0.04 in bf16. It tells weights that are wrong, or
# behind by more than rounding: in bf16 not by some steps at a rate of 1e-6, which only the metric sampler_gap may show.
TOLERANCE = {torch.float32: 3e-4, torch.bfloat16: 0.25}
# What vLLM's samplers take.
MOST_BANNED, HOTTEST = 1024, 2.0

Weights = Callable[[ThinkingModel], Iterator[tuple[str, Tensor]]]


class EngineError(RuntimeError):
    """vLLM cannot be started, or does not sample from the weights that are trained. One line."""


@dataclass
class Colocated:
    """vLLM's LLM in this process. sleeps: whether it can. holds: whose weights it has, and of which optimizer step."""

    llm: Any
    sleeps: bool
    asleep: bool = False
    holds: tuple[weakref.ref[ThinkingModel], int] | None = None


class Vllm:
    """Samples thoughts whose tokens are all in the vocabulary.

    It draws by its own generators: a thought has a seed of its own, from (seed, step, sample id, anchor, thought), but
    its numbers depend on what is sampled beside it.
    """

    name: ClassVar[str] = "vllm"
    reproducible: ClassVar[bool] = False

    def __init__(self, config: Mapping[str, Any], weights: Weights, longest: int, cache_gib: float):
        """config: config.json of the language model, in the dtype to sample in. weights: the tensors of a model by
        their names in transformers, whole, in the order of its layers. longest: tokens of a text and a thought.
        cache_gib: of the cache of keys and values."""
        self._config, self._weights, self._longest = json.dumps(config), weights, longest
        self._cache_bytes = int(cache_gib * 2**30)
        self.tolerance = TOLERANCE[getattr(torch, config["dtype"])]
        self.lag = 0

    def supports(self, request: RolloutRequest) -> tuple[bool, str]:
        banned = len(_banned(request))
        reasons = {
            "its delimiters have no vocabulary ids": any(token < 0 for token in request.prompt),
            f"temperature {request.temperature:g} is above {HOTTEST:g}": request.temperature > HOTTEST,
            f"{banned} ids are banned, and it takes {MOST_BANNED}": banned > MOST_BANNED,
        }
        found = [reason for reason, is_so in reasons.items() if is_so]
        return not found, "; ".join(found)

    @torch.no_grad()
    def sample(self, request: RolloutRequest) -> Rollout:
        supported, reason = self.supports(request)
        if not supported:
            raise ValueError(f"vLLM does not support this rollout: {reason}")
        colocated = start(self._config, self._longest, self._cache_bytes)
        handed_over = self._hand_over(colocated, request.model)
        assert colocated.holds is not None
        self.lag = optimizer_steps() - colocated.holds[1]
        thoughts = _thoughts(request)
        _generate(colocated.llm, request, thoughts)
        if colocated.sleeps:
            colocated.llm.sleep(level=2)
            colocated.asleep = True
        rollout = _rollout(request, thoughts)
        count_rollout(request.model.decoder, rollout.thoughts, rollout.sampled_BKSM)
        if handed_over:
            self._check(request, rollout)
        return rollout

    def _hand_over(self, colocated: Colocated, model: ThinkingModel) -> bool:
        """Wakes it with the model's weights as they are now; whether they had to be handed over."""
        llm, asleep = colocated.llm, colocated.asleep
        if asleep:
            llm.wake_up(tags=["weights"])
        holds = colocated.holds
        stale = holds is None or holds[0]() is not model or holds[1] != optimizer_steps()
        if stale or asleep:
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._weights(model)})
            llm.reset_prefix_cache()
            colocated.holds = weakref.ref(model), optimizer_steps()
        if asleep:
            llm.wake_up(tags=["kv_cache"])
            colocated.asleep = False
        return stale or asleep

    def _check(self, request: RolloutRequest, rollout: Rollout) -> None:
        """Raises EngineError."""
        model, first = request.model, slice(0, 1)
        some = (slice(None), first, slice(len(request.prompt) + CHECKED), first)
        tokens_B1S1, where_B1S1 = rollout.thoughts.tokens_BKSM[some], rollout.sampled_BKSM[some]
        if not where_B1S1.any():
            return
        hidden_B1S1W = model.think(Thoughts(tokens_B1S1, request.anchors.part(first)), request.state)
        hidden_JW = hidden_B1S1W[:, :, :-1][where_B1S1[:, :, 1:]]
        banned_V = torch.zeros_like(model.banned_V)
        banned_V[_banned(request)] = True
        temperature = request.temperature or 1.0
        own_J = token_logprobs(hidden_JW, model.head_weight_VW, tokens_B1S1[where_B1S1], temperature, banned_V)
        if not hidden_JW.isfinite().all():
            return  # a model that is not finite shows in its loss
        gap = (own_J - rollout.logprobs_BKSM[some][where_B1S1]).abs().mean().item()
        if not gap <= self.tolerance:
            raise EngineError(
                f"vLLM does not sample from the weights that are trained: its log-probs of {len(own_J)} tokens are "
                f"{gap:.2g} nats from the model's own in the mean, where rounding explains {self.tolerance:g}; use "
                "another version of vLLM, or rollout.engine auto"
            )


@functools.lru_cache(maxsize=1)
def start(config: str, longest: int, cache_bytes: int) -> Colocated:
    """One for all models of a config, so that runs after one another share it. Raises EngineError."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # which would put it into another process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm
    from vllm.platforms import current_platform

    sleeps = current_platform.is_sleep_mode_available()
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(config)
        try:
            llm = vllm.LLM(
                directory,
                load_format="dummy",
                skip_tokenizer_init=True,
                generation_config="vllm",
                dtype=json.loads(config)["dtype"],
                max_model_len=longest,
                kv_cache_memory_bytes=cache_bytes,
                enable_sleep_mode=sleeps,
                enforce_eager=current_platform.is_cpu(),
                logprobs_mode="processed_logprobs",
            )
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise EngineError(
                f"vLLM cannot be started with this model: {' '.join(str(error).split())[:300]}"
            ) from error
    return Colocated(llm, sleeps)


def is_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def _banned(request: RolloutRequest) -> list[int]:
    end = () if request.prediction is None else request.prediction.end
    allowed = {*request.close, *end, *request.allowed}
    return [token for token in request.model.banned_V.nonzero().flatten().tolist() if token not in allowed]


@dataclass
class Thought:
    """A thought as it grows. text: what it sees, as ids. sampled, logprobs: of each of its tokens. phase: the first
    token of what it samples now, its thinking or, if it is `predicting`, its prediction."""

    request: RolloutRequest
    seed: int
    text: list[int]
    tokens: list[int]
    sampled: list[bool]
    logprobs: list[float]
    phase: int
    closed: bool
    predicted: bool
    predicting: bool = False
    ended: bool = False

    @property
    def ending(self) -> list[int]:
        prediction = self.request.prediction
        return list(prediction.end if self.predicting and prediction is not None else self.request.close)

    @property
    def left(self) -> int:
        """Tokens that it may still sample in this phase."""
        prediction = self.request.prediction
        length = prediction.length if self.predicting and prediction is not None else self.request.length
        return length - (len(self.tokens) - self.phase)

    def extend(self, tokens: list[int], logprobs: list[float]) -> None:
        """Sampled tokens, up to the first that is the last one of the ending, which may be all there is of it."""
        self._append(tokens, logprobs, sampled=True)
        ending = self.ending
        ends = bool(ending) and self.tokens[self.phase :][-len(ending) :] == ending
        if not ends and self.left > 0:
            return
        if self.predicting:
            self.predicted, self.ended = self.predicted or ends, True
            return
        self.closed, self.ended = self.closed or ends, self.request.prediction is None
        if not self.ended:
            given = self.request.forced[len(ending) * ends :]
            self._append(list(given), [0.0] * len(given), sampled=False)
            self.phase, self.predicting = len(self.tokens), True

    def _append(self, tokens: list[int], logprobs: list[float], sampled: bool) -> None:
        self.tokens += tokens
        self.logprobs += logprobs
        self.sampled += [sampled] * len(tokens)


def _thoughts(request: RolloutRequest) -> list[Thought]:
    """Those of all anchors, in the order (b K + k) M + m; where there is no anchor one that has ended."""
    anchors, K, P = request.anchors, request.thoughts, len(request.prompt)
    B, M = anchors.index_BM.shape
    exists, rows = (anchors.index_BM >= 0).tolist(), anchors.text.tokens_BN.tolist()
    seen = {(b, m): rows[b][start:end] for b, m, start, end in anchors.prefixes}
    closed, predicted = not request.close, request.prediction is None or not request.prediction.end
    places = [(b, m) for b in range(B) for _ in range(K) for m in range(M)]
    return [
        Thought(
            *(request, seed, seen.get((b, m), []), list(request.prompt), [False] * P, [0.0] * P, P),
            *(closed, predicted),
            ended=not exists[b][m],
        )
        for (b, m), seed in zip(places, _seeds(request), strict=True)
    ]


def _seeds(request: RolloutRequest) -> list[int]:
    anchors, rng = request.anchors, request.rng
    k_K1 = torch.arange(request.thoughts, device=anchors.index_BM.device)[:, None]
    place = anchors.text.sample_id_B[:, None, None], anchors.index_BM[:, None], k_K1, torch.zeros_like(k_K1)
    high_BKM, low_BKM, *_ = philox4x32(place, (rng.seed, rng.step))
    return ((high_BKM >> 2 << 32) | low_BKM).flatten().tolist()


def _generate(llm: Any, request: RolloutRequest, thoughts: list[Thought]) -> None:
    """Samples until all have ended."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    engine, bans = llm.llm_engine, dict.fromkeys(_banned(request), -torch.inf)

    def ask(number: int) -> None:
        thought = thoughts[number]
        if thought.ended:
            return
        params = SamplingParams(
            temperature=request.temperature,
            max_tokens=thought.left,
            # The last token of the ending: where it turns out to end nothing, the thought goes on as another request.
            stop_token_ids=thought.ending[-1:],
            ignore_eos=True,
            seed=thought.seed + len(thought.tokens),
            logprobs=0,
            logit_bias=bans or None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine.add_request(str(number), tokens_input([*thought.text, *thought.tokens]), params)

    for number in range(len(thoughts)):
        ask(number)
    while engine.has_unfinished_requests():
        for result in engine.step():
            number, (said,) = int(result.request_id), result.outputs
            logprobs = [at[token].logprob for token, at in zip(said.token_ids, said.logprobs, strict=True)]
            thoughts[number].extend(list(said.token_ids), logprobs)
            ask(number)


def _rollout(request: RolloutRequest, thoughts: list[Thought]) -> Rollout:
    B, M = request.anchors.index_BM.shape
    longest = max((len(t.tokens) for t in thoughts), default=len(request.prompt))
    state = request.state.hidden_BNW

    def per_token(rows: list[list[Any]], padding: Any, dtype: torch.dtype) -> Tensor:
        padded = [row + [padding] * (longest - len(row)) for row in rows]
        values_US = torch.tensor(padded, dtype=dtype, device=state.device)
        return values_US.view(B, request.thoughts, M, longest).movedim(-1, 2)

    def per_thought(flags: list[bool]) -> Tensor:
        return torch.tensor(flags, device=state.device).view(B, request.thoughts, M)

    predicting = [[t.predicting and i >= t.phase for i in range(len(t.tokens))] for t in thoughts]
    return Rollout(
        Thoughts(per_token([t.tokens for t in thoughts], PAD, torch.int64), request.anchors),
        per_token([t.sampled for t in thoughts], False, torch.bool),
        per_token([t.logprobs for t in thoughts], 0.0, accumulation_dtype(state.dtype)),
        per_thought([t.closed for t in thoughts]),
        per_token(predicting, False, torch.bool),
        per_thought([t.predicted for t in thoughts]),
        len(request.close),
    )
