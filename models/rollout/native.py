"""One token more for every thought on a CPU, the whole stack of layers in one call of a kernel written in C++.

Layer by layer a step of a few thoughts is hundreds of calls of torch, whose products read the weights at half the speed
of memory and whose attention works on a handful of rows. The kernel (native.cpp) is compiled at its first use, for the
processor at hand, and shares torch's threads.

Shapes: B rows, N text positions, M anchors, K thoughts, S new tokens of a thought, T all tokens of a thought, W width,
G key-value heads, D head size, L columns of a panel, E neighbours along the summed axis that lie together in a panel.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import asked_backend
from models.decoder import Block, PostNormBlock, TextState
from models.precision import Linear, kept, working_copy
from models.rollout.eager import Eager
from models.rollout.request import NextTokens, RolloutRequest
from models.thinking import ThinkingModel
from models.thoughts import Anchors

FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC")
LANES = 16
# Keys of a text that one thread attends to at a time.
SPLIT = 256
_POINTERS = (
    "attention_norm", "mlp_norm", "query_norm", "key_norm", "query_key_value", "out", "gate_up", "down",
    "query_key_value_bias", "out_bias", "gate_up_bias", "down_bias",
    "text_keys", "text_values", "own_keys", "own_values",
)  # fmt: skip
_SIZES = (
    "layers", "width", "ffn_width", "heads", "kv_heads", "head_dim", "anchors", "thoughts", "text_capacity",
    "own_capacity", "low_precision", "post_norm", "norms_all_heads",
)  # fmt: skip


class _Shape(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in _SIZES), ("epsilon", ctypes.c_float)]


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS]


def compiler() -> str | None:
    """The C++ compiler that would be called: $CXX, else the first that is there of c++, g++ and clang++."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "c++", "g++", "clang++"))), None)


@functools.cache
def library() -> ctypes.CDLL:
    """The kernel, compiled at the first call. Raises RuntimeError, with what the compiler says, where it cannot be."""
    found = compiler()
    if found is None:
        raise RuntimeError("compile takes a C++ compiler on CPU and there is none; install g++ or leave the key out")
    source = Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory() as directory:
        built, linked = Path(directory, "native.o"), Path(directory, "native.so")
        _run(found, *FLAGS, "-c", str(source), "-o", str(built))
        # Linked without a thread pool, so that torch's, loaded with it, is found and not a second one.
        _run(found, "-shared", str(built), "-o", str(linked))
        try:
            loaded = ctypes.CDLL(str(linked))
        except OSError:  # The pool that the compiler writes for is another than torch's.
            linked = linked.with_stem("native-with-threads")
            _run(found, "-shared", "-fopenmp", str(built), "-o", str(linked))
            loaded = ctypes.CDLL(str(linked))
    address, count, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    loaded.forethought_step.argtypes = [*[address] * 7, count, threads]
    loaded.forethought_pack.argtypes = [address, count, count, address, count, threads]
    loaded.forethought_step.restype = loaded.forethought_pack.restype = None
    return loaded


def _run(compiler: str, *arguments: str) -> None:
    run = subprocess.run([compiler, *arguments], capture_output=True, text=True)
    if run.returncode:
        said = run.stderr.strip().partition("\n")[0]
        raise RuntimeError(f"{compiler} cannot compile native.cpp; leave the key compile out: {said}")


class Native(Eager):
    """Steps of a compiled kernel, at a few anchors on a CPU, where no attention backend was asked for.

    Not for sharded models, whose weights no rank has: whoever shards leaves this engine out.
    """

    def supports(self, request: RolloutRequest) -> tuple[bool, str]:
        config, hidden = request.model.decoder.config, request.state.hidden_BNW
        backend = asked_backend(request.model.decoder.attention_backend)
        reasons = {
            "thoughts at every position are not its shape": request.anchors.window is not None,
            f"it runs on a CPU, the model is on {hidden.device.type}": hidden.device.type != "cpu",
            f"it computes in fp32 and bf16, not in {hidden.dtype}": hidden.dtype not in (torch.float32, torch.bfloat16),
            f"width, FFN width and head size must be multiples of {LANES}": any(
                size % LANES for size in (config.width, config.ffn_width, config.head_dim)
            ),
            f"attention backend {backend!r} was asked for": backend is not None,
        }
        reason = next((reason for reason, applies in reasons.items() if applies), "")
        return not reason, reason

    def steps(self, request: RolloutRequest) -> NextTokens:
        return NativeStep(request.model, request.anchors, request.state, request.thoughts, request.slots)


class NativeStep:
    """Called with the next S tokens of each thought, int64 [B, K, S, M] → hidden states [B, K, 1, M, W] of the last.

    The numbers are those of `continue_thoughts`, up to the order of sums: per row, whatever rows there are beside it.
    It holds its own copy of the text's keys and values, and those of up to `capacity` tokens of each thought.
    """

    def __init__(self, model: ThinkingModel, anchors: Anchors, state: TextState, thoughts: int, capacity: int):
        config, (B, M) = model.decoder.config, anchors.index_BM.shape
        self._model, self._anchors, self._capacity, self._length = model, anchors, capacity, 0
        self._dtype = dtype = state.hidden_BNW.dtype
        N = state.text.shape[1]
        text_capacity, own_capacity = filled_up(N), filled_up(capacity)
        R, G, D = B * M * thoughts, config.kv_heads, config.head_dim
        # Zeros, because what lies behind the last token is multiplied by shares of zero.
        own = [torch.zeros(2, R, G, own_capacity * D, dtype=dtype) for _ in range(config.layers)]
        text = [
            (_packed_keys(k, text_capacity), _packed_values(v, text_capacity))
            for k, v in zip(state.keys, state.values, strict=True)
        ]
        weights = [_weights(cast(Block | PostNormBlock, block), dtype) for block in model.decoder.layers]
        self._held = list(zip(weights, text, own, strict=True))
        self._shape = _Shape(
            config.layers, config.width, config.ffn_width, config.heads, G, D,
            B * M, thoughts, text_capacity, own_capacity, dtype == torch.bfloat16, config.post_norm,
            config.qk_norm_all_heads, config.rms_norm_eps,
        )  # fmt: skip
        self._layers = (_Layer * config.layers)(
            *(_Layer(*map(_address, (*weights, *text, *own))) for weights, text, own in self._held)
        )
        self._spans, self._spans_of = _spans(anchors)
        self._step = library().forethought_step

    @torch.no_grad()
    def __call__(self, tokens_BKSM: Tensor) -> Tensor:
        for token_BK1M in tokens_BKSM.split(1, dim=2):
            hidden_BK1MW = self._one(token_BK1M)
        return hidden_BK1MW

    def _one(self, token_BK1M: Tensor) -> Tensor:
        if self._length == self._capacity:
            raise ValueError(f"thought cache is full ({self._capacity} tokens)")
        decoder, anchors, (B, K, _, M) = self._model.decoder, self._anchors, token_BK1M.shape
        decoder.check_positions(anchors.text.shape[1] + self._length + 1)
        x_BMKW = self._model.embed_thoughts(token_BK1M)[:, :, 0].transpose(1, 2).contiguous()
        position_BMK = (anchors.position_BM + self._length + 1)[..., None].expand(B, M, K).contiguous()
        rotations = decoder.rotations_at(position_BMK, self._dtype)
        cos, sin = (
            (ctypes.c_void_p * len(rotations))(*(None if pair is None else _address(pair[i]) for pair in rotations))
            for i in range(2)
        )
        addresses = map(_address, (self._spans, self._spans_of, x_BMKW))
        self._step(ctypes.byref(self._shape), self._layers, *addresses, cos, sin, self._length, torch.get_num_threads())
        self._length += 1
        return decoder.norm(x_BMKW).transpose(1, 2)[:, :, None]


def filled_up(tokens: int) -> int:
    """The capacity of keys and values that are to hold so many tokens: whole panels."""
    return -(-tokens // LANES) * LANES


def _spans(anchors: Anchors) -> tuple[Tensor, Tensor]:
    """int32 [spans, 4], anchor, row, first and last (exclusive) key, of the text each anchor sees, cut at multiples of
    SPLIT; int64 [anchors + 1], where those of each anchor begin."""
    B, M = anchors.index_BM.shape
    spans, counts = [], [0] * (B * M)
    for row, m, start, end in anchors.prefixes:
        cuts = [start, *range((start // SPLIT + 1) * SPLIT, end, SPLIT), end]
        spans += [(row * M + m, row, first, last) for first, last in itertools.pairwise(cuts)]
        counts[row * M + m] = len(cuts) - 1
    return torch.tensor(spans, dtype=torch.int32), torch.tensor([0, *itertools.accumulate(counts)])


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _weights(block: Block | PostNormBlock, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """In the order of the kernel's `Layer`."""
    attention, mlp = block.self_attn, block.mlp
    qkv, gate_up = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
    norms = *block.norms, attention.q_norm, attention.k_norm

    def packed(*layers: Linear, alternating: bool = False) -> Tensor:
        def pack(*_: Tensor) -> Tensor:
            return _panels([working_copy(layer.weight, dtype) for layer in layers], alternating)

        return kept([layer.weight for layer in layers], "_native_copy", dtype, pack)

    def bias(*layers: Linear, alternating: bool = False) -> Tensor | None:
        if layers[0].bias is None:
            return None
        biases = [layer.bias.detach().to(dtype).float().view(-1, LANES) for layer in layers]
        return torch.stack(biases, dim=1) if alternating else torch.cat(biases)

    return (
        *(None if norm is None else norm.weight.detach().float() for norm in norms),
        *(packed(*qkv), packed(attention.o_proj), packed(*gate_up, alternating=True), packed(mlp.down_proj)),
        *(bias(*qkv), bias(attention.o_proj), bias(*gate_up, alternating=True), bias(mlp.down_proj)),
    )


def _panels(parts: Sequence[Tensor], alternating: bool = False) -> Tensor:
    """[N / L, I / E, L, E] of all the N columns, summed over I, of parts [_, I]; flat. The panels of one part follow
    those of another, or alternate with them."""
    packed = parts[0].new_empty(sum(x_NI.numel() for x_NI in parts))
    start = 0
    for x_NI in (part.contiguous() for part in parts):
        N, words = len(x_NI), x_NI.shape[1] * x_NI.element_size() // 4
        distance = LANES * words * (len(parts) if alternating else 1)
        to = packed.data_ptr() + start * packed.element_size()
        library().forethought_pack(x_NI.data_ptr(), N, words, to, distance, torch.get_num_threads())
        start += x_NI[:LANES].numel() if alternating else x_NI.numel()
    return packed


def _packed_keys(k_BNGD: Tensor, capacity: int) -> Tensor:
    """[B, G, capacity / L, D / E, L, E], flat."""
    k_BTGD = F.pad(k_BNGD.detach(), (0, 0, 0, 0, 0, capacity - k_BNGD.shape[1]))
    return _panels([k_BTGD.transpose(1, 2).flatten(0, 2)])


def _packed_values(v_BNGD: Tensor, capacity: int) -> Tensor:
    """[B, G, capacity / E, D, E]."""
    E = 4 // v_BNGD.element_size()
    v_BTGD = F.pad(v_BNGD.detach(), (0, 0, 0, 0, 0, capacity - v_BNGD.shape[1]))
    return v_BTGD.unflatten(1, (-1, E)).permute(0, 3, 1, 4, 2).contiguous()
