"""One token more for every thought on a CPU, the whole stack of layers in one call of a kernel written in C++.

Layer by layer a step of a few thoughts is hundreds of calls of torch, whose products read the weights at half the speed
of memory and whose attention works on a handful of rows. The kernel (native.cpp) is compiled at its first use, for the
processor at hand, and shares torch's threads.

Shapes: B rows of text, N text positions, M anchors, K thoughts, R thoughts that are sampled now, W width, G key-value
heads, D head size, L columns of a panel, E neighbours along the summed axis that lie together in a panel.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
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
from models.logprobs import sample_tokens
from models.precision import Linear, kept, working_copy
from models.rollout.eager import Eager, sample_thoughts
from models.rollout.request import Rollout, RolloutRequest
from models.thinking import ThinkingModel
from models.thoughts import Anchors

FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC")
MULTIPLE = 16  # of what sizes are, so that every processor's panels are full
# Keys of a text that one thread attends to at a time.
SPLIT = 256
# Thoughts that are sampled at a time where nothing else is asked for.
ROWS = 32
# Rows are filled anew once one of so many has ended, since each time costs some hundred small operations.
FEW = 16
_POINTERS = (
    "attention_norm", "mlp_norm", "query_norm", "key_norm", "query_key_value", "out", "gate_up", "down",
    "query_key_value_bias", "out_bias", "gate_up_bias", "down_bias",
    "text_keys", "text_values", "own_keys", "own_values", "cos", "sin",
)  # fmt: skip
_SIZES = (
    "layers", "width", "ffn_width", "heads", "kv_heads", "head_dim", "anchors", "text_capacity", "own_capacity",
    "low_precision", "post_norm", "norms_all_heads",
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
    loaded.forethought_step.argtypes = [*[address] * 9, threads]
    loaded.forethought_pack.argtypes = [address, count, count, address, count, threads]
    loaded.forethought_draw.argtypes = [*[count] * 4, *[address] * 3, ctypes.c_float, *[address] * 4, threads]
    for constant in (loaded.forethought_lanes, loaded.forethought_block, loaded.forethought_drawn):
        constant.restype = count
    for procedure in (loaded.forethought_step, loaded.forethought_pack, loaded.forethought_draw):
        procedure.restype = None
    return loaded


def _run(compiler: str, *arguments: str) -> None:
    run = subprocess.run([compiler, *arguments], capture_output=True, text=True)
    if run.returncode:
        said = run.stderr.strip().partition("\n")[0]
        raise RuntimeError(f"{compiler} cannot compile native.cpp; leave the key compile out: {said}")


class Native(Eager):
    """Steps of a compiled kernel, at a few anchors on a CPU, where no attention backend was asked for.

    Not for sharded models, whose weights no rank has: whoever shards lets it sample from a plain copy.
    """

    name = "native"

    def supports(self, request: RolloutRequest) -> tuple[bool, str]:
        config, hidden = request.model.decoder.config, request.state.hidden_BNW
        backend = asked_backend(request.model.decoder.attention_backend)
        reasons = {
            "thoughts at every position are not its shape": request.anchors.window is not None,
            f"it runs on a CPU, the model is on {hidden.device.type}": hidden.device.type != "cpu",
            f"it computes in fp32 and bf16, not in {hidden.dtype}": hidden.dtype not in (torch.float32, torch.bfloat16),
            f"width, FFN width and head size must be multiples of {MULTIPLE}": any(
                size % MULTIPLE for size in (config.width, config.ffn_width, config.head_dim)
            ),
            f"attention backend {backend!r} was asked for": backend is not None,
        }
        reason = next((reason for reason, applies in reasons.items() if applies), "")
        return not reason, reason

    def _in_parts(self, request: RolloutRequest) -> Rollout:
        rows = ROWS
        if request.anchors_at_once is not None:
            rows = len(request.anchors.index_BM) * request.anchors_at_once * request.thoughts
        return sample_thoughts(request, InTurn(request, rows))


class InTurn:
    """At most so many thoughts at a time, in the order of their anchors; one that has ended makes room for the next."""

    look_every = 1

    def __init__(self, request: RolloutRequest, rows: int):
        anchors, K = request.anchors, request.thoughts
        M = anchors.index_BM.shape[1]
        self._prompt, self._size = request.prompt[:-1], (K, M)
        anchor_X1 = (anchors.index_BM >= 0).flatten().nonzero()
        # Numbers as in eager.py.
        self._waiting = (anchor_X1 // M * K * M + anchor_X1 % M + torch.arange(K) * M).flatten()
        seats = min(rows, len(self._waiting))
        self._step = NativeStep(request.model, anchors, request.state, seats, request.slots)
        self._draw = NativeDraw(request.model, request.temperature)
        self.thought_R = self._seat_R = self._length_R = torch.empty(0, dtype=torch.int64)
        self._take_in(torch.arange(seats))

    def step(self, tokens_R: Tensor) -> Tensor:
        hidden_RW = self._step(tokens_R, self._anchors_of(self.thought_R), self._seat_R, self._length_R)
        # What becomes of a thought that has ended and stays for a while is of no interest.
        self._length_R = (self._length_R + 1).clamp(max=self._step.capacity - 1)
        return hidden_RW

    def draw(self, hidden_RW: Tensor, uniforms_R: Tensor, banned_V: Tensor) -> tuple[Tensor, Tensor]:
        return self._draw(hidden_RW, uniforms_R, banned_V)

    def turn_over(self, ended_R: Tensor) -> bool:
        ended = int(ended_R.sum())
        if ended == 0 or ended * FEW < len(ended_R) or (ended == len(ended_R) and not len(self._waiting)):
            return False
        free = self._seat_R[ended_R]
        self.thought_R, self._seat_R, self._length_R = (
            x_R[~ended_R] for x_R in (self.thought_R, self._seat_R, self._length_R)
        )
        self._take_in(free)
        return True

    def _take_in(self, seats: Tensor) -> None:
        """Thoughts that wait take these seats, as far as there are any, and read their prompts."""
        new, self._waiting = self._waiting[: len(seats)], self._waiting[len(seats) :]
        seats, length = seats[: len(new)], torch.zeros_like(new)
        for token in self._prompt if len(new) else ():
            self._step(torch.full_like(new, token), self._anchors_of(new), seats, length)
            length = length + 1
        self.thought_R = torch.cat([self.thought_R, new])
        order_R = self._anchors_of(self.thought_R).argsort(stable=True)
        self.thought_R = self.thought_R[order_R]
        self._seat_R = torch.cat([self._seat_R, seats])[order_R]
        self._length_R = torch.cat([self._length_R, length])[order_R]

    def _anchors_of(self, thought_R: Tensor) -> Tensor:
        K, M = self._size
        return thought_R // (K * M) * M + thought_R % M


class NativeStep:
    """The next token of some thoughts → their hidden states [R, W]. Each has a seat, where its keys and values are.

    The numbers are those of `continue_thoughts`, up to the order of sums: per row, whatever rows there are beside it.
    It holds its own copy of the text's keys and values, and those of up to `capacity` tokens in each seat.
    """

    def __init__(self, model: ThinkingModel, anchors: Anchors, state: TextState, seats: int, capacity: int):
        config, (B, M) = model.decoder.config, anchors.index_BM.shape
        self._model, self._anchors, self.capacity = model, anchors, capacity
        dtype = state.hidden_BNW.dtype
        N = state.text.shape[1]
        text_capacity, own_capacity = filled_up(N), filled_up(capacity)
        G, D = config.kv_heads, config.head_dim
        # Zeros, because what lies behind the last token is multiplied by shares of zero.
        own = [torch.zeros(2, seats, G, own_capacity * D, dtype=dtype) for _ in range(config.layers)]
        text = [
            (_packed_keys(k, text_capacity), _packed_values(v, text_capacity))
            for k, v in zip(state.keys, state.values, strict=True)
        ]
        weights = [_weights(cast(Block | PostNormBlock, block), dtype) for block in model.decoder.layers]
        rotations = [pair or (None, None) for pair in model.decoder.rotations_at(torch.arange(N + capacity), dtype)]
        self._held = list(zip(weights, text, own, rotations, strict=True))
        self._shape = _Shape(
            config.layers, config.width, config.ffn_width, config.heads, G, D,
            B * M, text_capacity, own_capacity, dtype == torch.bfloat16, config.post_norm,
            config.qk_norm_all_heads, config.rms_norm_eps,
        )  # fmt: skip
        self._layers = (_Layer * config.layers)(
            *(_Layer(*map(_address, itertools.chain(*tensors))) for tensors in self._held)
        )
        self._position_A = anchors.position_BM.flatten().contiguous()
        self._spans, self._spans_of = _spans(anchors)
        self._step = library().forethought_step

    @torch.no_grad()
    def __call__(self, tokens_R: Tensor, anchor_R: Tensor, seat_R: Tensor, length_R: Tensor) -> Tensor:
        """int64 each: the token, the number b M + m of the anchor, in order, the seat, and the tokens there already."""
        longest = int(length_R.max())
        if longest >= self.capacity:
            raise ValueError(f"thought cache is full ({self.capacity} tokens)")
        decoder, anchors = self._model.decoder, self._anchors
        decoder.check_positions(anchors.text.shape[1] + longest + 1)
        x_RW = self._model.embed_thoughts(tokens_R).contiguous()
        rows_of = F.pad(anchor_R.bincount(minlength=anchors.index_BM.numel()).cumsum(0), (1, 0))
        of_anchors, of_rows = (self._spans, self._spans_of, self._position_A), (rows_of, seat_R, length_R, x_RW)
        addresses = map(_address, (*of_anchors, *of_rows))
        self._step(ctypes.byref(self._shape), self._layers, *addresses, torch.get_num_threads())
        return decoder.norm(x_RW)


class NativeDraw:
    """`sample_tokens` in one call: the head's product, masses and the token, with the head's panels held once more."""

    def __init__(self, model: ThinkingModel, temperature: float):
        self._head_VW, self._temperature = model.head_weight_VW, temperature
        V, block = len(self._head_VW), library().forethought_block()
        self._columns = -(-V // block) * block
        self._logits = torch.empty(library().forethought_drawn(), self._columns)
        self._banned_V: Tensor | None = None

    def __call__(self, hidden_RW: Tensor, uniforms_R: Tensor, banned_V: Tensor) -> tuple[Tensor, Tensor]:
        if self._temperature == 0:
            return sample_tokens(hidden_RW, self._head_VW, uniforms_R, 0.0, banned_V)
        if banned_V is not self._banned_V:
            more = self._columns - len(banned_V)
            self._penalty = torch.zeros(self._columns).masked_fill_(F.pad(banned_V, (0, more), value=True), -math.inf)
            self._banned_V = banned_V
        hidden_RW, uniforms_R = hidden_RW.contiguous(), uniforms_R.contiguous()
        (R, W), dtype = hidden_RW.shape, hidden_RW.dtype
        tokens_R, logprobs_R = torch.empty(R, dtype=torch.int64), torch.empty(R)
        arguments = map(_address, (hidden_RW, self._panels(dtype), self._penalty))
        results = map(_address, (uniforms_R, self._logits, tokens_R, logprobs_R))
        library().forethought_draw(
            *(R, W, self._columns, dtype == torch.bfloat16),
            *(*arguments, self._temperature, *results, torch.get_num_threads()),
        )
        return tokens_R, logprobs_R

    def _panels(self, dtype: torch.dtype) -> Tensor:
        def pack(head_VW: Tensor) -> Tensor:
            return _panels([F.pad(head_VW.to(dtype), (0, 0, 0, self._columns - len(head_VW)))])

        return kept([self._head_VW], "_native_copy", dtype, pack)


def filled_up(tokens: int) -> int:
    """The capacity of keys and values that are to hold so many tokens: whole panels."""
    return -(-tokens // MULTIPLE) * MULTIPLE


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

    lanes = library().forethought_lanes()

    def bias(*layers: Linear, alternating: bool = False) -> Tensor | None:
        if layers[0].bias is None:
            return None
        biases = [layer.bias.detach().to(dtype).float().view(-1, lanes) for layer in layers]
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
    start, lanes = 0, library().forethought_lanes()
    for x_NI in (part.contiguous() for part in parts):
        N, words = len(x_NI), x_NI.shape[1] * x_NI.element_size() // 4
        distance = lanes * words * (len(parts) if alternating else 1)
        to = packed.data_ptr() + start * packed.element_size()
        library().forethought_pack(x_NI.data_ptr(), N, words, to, distance, torch.get_num_threads())
        start += x_NI[:lanes].numel() if alternating else x_NI.numel()
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
