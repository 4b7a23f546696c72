"""What is measured: models with random weights, texts, and the training step behind every figure.

Shapes: B rows, N text positions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from benchmarks.measure import Unsupported, synchronise
from models.attention import UnsupportedCall
from models.decoder import Decoder, DecoderConfig
from models.flops import Ledger
from models.philox import Rng
from models.precision import COPIES
from models.rollout import EAGER, Engine
from models.thinking import ThinkingModel
from models.thoughts import Anchors, Text
from objectives import NextToken, Objective, QuietStar, QuietStarConfig, Rlp, RlpConfig, Step, Template

SMOLLM2_135M = DecoderConfig(
    vocab_size=49152,
    width=576,
    ffn_width=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    max_positions=8192,
    rope_theta=100000.0,
    rms_norm_eps=1e-5,
    tie_embeddings=True,
)
# 57M parameters, 32k vocabulary: the size for which the cost of the public Quiet-STaR code was published.
PUBLIC_57M = DecoderConfig(
    vocab_size=32000,
    width=512,
    ffn_width=1536,
    layers=12,
    heads=8,
    kv_heads=8,
    head_dim=64,
    max_positions=2048,
    tie_embeddings=True,
)
QWEN3_1_7B = DecoderConfig(
    vocab_size=151936,
    width=2048,
    ffn_width=6144,
    layers=28,
    heads=16,
    kv_heads=8,
    head_dim=128,
    max_positions=40960,
    rope_theta=1e6,
    tie_embeddings=True,
    qk_norm=True,
    family="qwen3",
)
# SmolLM2 with fewer layers and a smaller vocabulary, so that a curve's longest point does not take all day.
CURVE_26M = replace(SMOLLM2_135M, vocab_size=8192, layers=6)
TINY = DecoderConfig(
    vocab_size=97,
    width=48,
    ffn_width=64,
    layers=2,
    heads=3,
    kv_heads=1,
    head_dim=16,
    max_positions=256,
    tie_embeddings=True,
)

OPEN, CLOSE = (1,), (2,)  # token ids used as tags


def make_model(config: DecoderConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> ThinkingModel:
    """A model with fp32 masters that computes in `dtype`, with delimiters and mixing head."""
    with device:
        decoder = Decoder(config, compute_dtype=None if dtype == torch.float32 else dtype)
        model = ThinkingModel(decoder, delimiters=True, mixing_head=True)
    generator = torch.Generator(device).manual_seed(seed)
    decoder.init_weights(generator)
    assert model.delimiters is not None and model.mixing_head is not None
    with torch.no_grad():
        embeddings = decoder.embed_tokens.weight
        model.delimiters.init_from(embeddings[0], embeddings[0])
        # A fresh head ignores the thoughts: none would be rewarded, and the policy's log-probs would cost nothing.
        model.mixing_head.out.weight.normal_(0.0, 0.1, generator=generator)
    return model


def make_text(config: DecoderConfig, B: int, N: int, device: torch.device, seed: int = 0) -> Text:
    """Rows of one document each, with random tokens."""
    generator = torch.Generator().manual_seed(seed)
    text = Text.from_rows(torch.randint(3, config.vocab_size, (B, N), generator=generator)).to(device)
    _ = text.spans
    return text


def repeated(text: Text, times: int) -> Text:
    """Every row `times` times, each a sample of its own."""
    rows = text.tokens_BN.repeat_interleave(times, dim=0)
    return Text.from_rows(rows)


def quiet_star(L: int, A: int, K: int, at_once: int | None = None) -> QuietStar:
    """K thoughts of L sampled tokens at every position, each predicting A tokens; those of `at_once` positions are held
    in memory at once."""
    return QuietStar(QuietStarConfig(length=L, lookahead=A, thoughts=K, anchors_at_once=at_once))


def rlp(P: int, G: int, T: int, anchors: int = 1) -> Rlp:
    """G thoughts of up to T sampled tokens at each of the last `anchors` eligible positions of P."""
    config = RlpConfig(length=T, thoughts=G, anchors_per_document=anchors, min_prefix=P - anchors)
    return Rlp(config, Template(OPEN, CLOSE))


def next_token() -> NextToken:
    return NextToken()


def training_step(objective: Objective, model: ThinkingModel, text: Text, engine: Engine = EAGER) -> dict[str, float]:
    """Loss and gradients of one step, without the optimizer update. Returns the FLOPs in the project's ledger, and how
    many of them recompute.

    Gradients are allocated and freed inside, so they count towards the step's memory. Low-precision weight copies are
    made by the first step and kept, while in training every step makes them again; that costs all objectives the same,
    and so matters most for the cheapest.
    """
    with Ledger() as ledger:
        for output in Step(objective, model, [text], Rng(0, 0), engine).losses():
            output.loss.backward()
    model.zero_grad(set_to_none=True)
    return {"flops": ledger.total, "recomputed_flops": ledger.recomputed}


def optimizer_step(model: ThinkingModel) -> dict[str, float]:
    """One update of AdamW, as training makes it, with all gradients there. The seconds are those of the update alone:
    its moments are allocated by a first update before, and freed with the gradients at the end."""
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    optimizer.step()
    device = parameters[0].device
    synchronise(device)
    started = time.perf_counter()
    optimizer.step()
    synchronise(device)
    seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return {"seconds": seconds}


def model_bytes(model: ThinkingModel, samples: bool = True, compiled: bool = False) -> int:
    """Bytes of a model's weights: masters and their low-precision copies; if it `samples`, also those packed for
    sampling, and if that is `compiled`, for the compiled step."""
    names = COPIES[: 3 if compiled else 2] if samples else COPIES[:1]
    copies = [getattr(p, name)[1] for p in model.parameters() for name in names if hasattr(p, name)]
    return sum(x.numel() * x.element_size() for x in [*model.parameters(), *copies])


def ending_at_random(model: ThinkingModel, mean: int) -> tuple[int, ...]:
    """Lets thoughts sample no more than `mean` tokens, of which the one that is returned closes a thought: weights are
    random and so is what they sample, so that lengths are geometric, with about that mean."""
    model.banned_V.fill_(True)
    model.banned_V[CLOSE[0] : CLOSE[0] + mean] = False
    return CLOSE


def last_position(text: Text) -> Anchors:
    """One anchor per row, at its last position."""
    B, N = text.shape
    return Anchors(text, torch.full((B, 1), N - 1, device=text.tokens_BN.device))


def copy_bytes(size: int, device: torch.device) -> dict[str, float]:
    """A copy within the device, larger than its caches; returns the bytes read and written."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    torch.empty_like(source).copy_(source)
    return {"bytes": 2 * source.numel()}


@contextmanager
def unsupported_calls() -> Iterator[None]:
    """Turns an attention backend's UnsupportedCall into Unsupported."""
    try:
        yield
    except UnsupportedCall as refusal:
        raise Unsupported(refusal.reason) from None


def transformers_model(model: ThinkingModel, dtype: torch.dtype) -> Any:
    """The same decoder in transformers, with the same weights in `dtype`. Raises ImportError without it."""
    import transformers

    from checkpoints.hugging_face import config_to_hf

    transformers.logging.set_verbosity_error()
    hf = config_to_hf(model.decoder.config, dtype)
    config = transformers.AutoConfig.for_model(**hf)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    names = {n: n if n.startswith("lm_head") else f"model.{n}" for n in model.decoder.state_dict()}
    weights = {names[n]: x.detach().to(dtype) for n, x in model.decoder.state_dict().items()}
    if model.decoder.lm_head is None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    theirs.load_state_dict(weights, assign=True)
    # Buffers are not in the state dict: they were created on the meta device and are created again.
    rotary = type(theirs.model.rotary_emb)(config).to(model.head_weight_VW.device)
    theirs.model.rotary_emb = rotary
    # `generate` takes its defaults from here, and random weights sample eos now and then.
    theirs.generation_config.eos_token_id = None
    return theirs.eval()
