"""What is measured: models with random weights, texts, and the one training step that every figure is of.

Shapes: B rows, N text positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from benchmarks.measure import Unsupported
from models.attention import UnsupportedCall
from models.decoder import Decoder, DecoderConfig
from models.flops import Ledger
from models.philox import Rng
from models.precision import COPIES
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
# 57M parameters and a vocabulary of 32k: the size at which the cost of the public Quiet-STaR code was published.
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
# SmolLM2's layers with fewer of them and a smaller vocabulary, so that a curve's longest point is not all of a day.
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

OPEN, CLOSE = (1,), (2,)  # ids that serve as tags


def make_model(config: DecoderConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> ThinkingModel:
    """A model with fp32 masters that computes in `dtype`, delimiters and mixing head included."""
    with device:
        decoder = Decoder(config, compute_dtype=None if dtype == torch.float32 else dtype)
        model = ThinkingModel(decoder, delimiters=True, mixing_head=True)
    generator = torch.Generator(device).manual_seed(seed)
    decoder.init_weights(generator)
    assert model.delimiters is not None and model.mixing_head is not None
    with torch.no_grad():
        embeddings = decoder.embed_tokens.weight
        model.delimiters.init_from(embeddings[0], embeddings[0])
        # A fresh head ignores the thoughts, so none would be rewarded and the policy's log-probs would cost nothing.
        model.mixing_head.out.weight.normal_(0.0, 0.1, generator=generator)
    return model


def make_text(config: DecoderConfig, B: int, N: int, device: torch.device, seed: int = 0) -> Text:
    """Rows of one document each, with random tokens."""
    generator = torch.Generator().manual_seed(seed)
    text = Text.from_rows(torch.randint(3, config.vocab_size, (B, N), generator=generator)).to(device)
    _ = text.spans
    return text


def repeated(text: Text, times: int) -> Text:
    """Every row so many times, as samples of their own."""
    rows = text.tokens_BN.repeat_interleave(times, dim=0)
    return Text.from_rows(rows)


def quiet_star(L: int, A: int, K: int, at_once: int | None = None) -> QuietStar:
    """Thoughts of L sampled tokens, K at every position, A tokens predicted; those of `at_once` positions are held at
    once."""
    return QuietStar(QuietStarConfig(length=L, lookahead=A, thoughts=K, anchors_at_once=at_once))


def rlp(P: int, G: int, T: int, anchors: int = 1) -> Rlp:
    """G thoughts of up to T sampled tokens at each of the last `anchors` positions that can have one, of P."""
    config = RlpConfig(length=T, thoughts=G, anchors_per_document=anchors, min_prefix=P - anchors)
    return Rlp(config, Template(OPEN, CLOSE))


def next_token() -> NextToken:
    return NextToken()


def training_step(objective: Objective, model: ThinkingModel, text: Text) -> dict[str, float]:
    """Loss and gradients of one step, without the optimizer's own update; the FLOPs of the project's ledger.

    Gradients are allocated and freed within it, so that they count as memory of the step. Low-precision copies of
    weights are made by the first one and kept, while in training each step makes them again: that is the same for all
    objectives, and weighs most on the cheapest.
    """
    with Ledger() as ledger:
        for output in Step(objective, model, [text], Rng(0, 0)).losses():
            output.loss.backward()
    model.zero_grad(set_to_none=True)
    return {"flops": ledger.total}


def model_bytes(model: ThinkingModel, samples: bool = True) -> int:
    """Bytes of a model's weights: masters, and the low-precision copies that were made of them; with those that are
    packed for sampling, if it samples."""
    names = COPIES if samples else COPIES[:1]
    copies = [getattr(p, name)[1] for p in model.parameters() for name in names if hasattr(p, name)]
    return sum(x.numel() * x.element_size() for x in [*model.parameters(), *copies])


def last_position(text: Text) -> Anchors:
    """One anchor a row, at its end."""
    B, N = text.shape
    return Anchors(text, torch.full((B, 1), N - 1, device=text.tokens_BN.device))


def copy_bytes(size: int, device: torch.device) -> dict[str, float]:
    """A copy within the device, of more than its caches hold; what it reads and what it writes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    torch.empty_like(source).copy_(source)
    return {"bytes": 2 * source.numel()}


@contextmanager
def unsupported_calls() -> Iterator[None]:
    """Turns an attention backend's refusal of a call into Unsupported."""
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
    # Buffers are no weights: they were made without values and are made again.
    rotary = type(theirs.model.rotary_emb)(config).to(model.head_weight_VW.device)
    theirs.model.rotary_emb = rotary
    # `generate` takes what it is not given from here, and random weights draw the end, too.
    theirs.generation_config.eos_token_id = None
    return theirs.eval()
