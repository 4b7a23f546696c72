"""What a run will take, by arithmetic: memory of each device, FLOPs, and seconds by stated rates of the hardware.

FLOPs are those of `objectives.workload`, which the ledger's formulas make, and bytes of activations those of
`models.memory`. Seconds are forecasts: passes at a share of the rated FLOP/s, decoding at a share of the memory's
bandwidth, which reads weights, keys and values for every token, collectives at a share of the links', hidden behind the
passes that they belong to.

Bytes are of one device unless said otherwise.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from models import logprobs
from models.decoder import Decoder, DecoderConfig
from models.memory import beside_backward, kept, kept_by_block, keys_and_values
from models.precision import FEW_ROWS, Linear
from models.thinking import ThinkingModel
from objectives.base import Needs
from objectives.workload import Workload

# Shares of rated figures that are taken to be reached, and what else is assumed; the command says so.
ATTAINED, STREAMED, TRANSFERRED = 0.4, 0.7, 0.7
# Kernels of a decoding step of one block, and seconds from one to the next: launched by the host, and replayed.
KERNELS, LAUNCHED, REPLAYED = 40, 5e-6, 1.5e-6
# Of a device's memory, what contexts, collectives' buffers and fragmentation leave to the run.
USABLE = 0.9
# Bytes of a parameter: master, gradient, both moments of Adam.
MASTER, GRADIENT, MOMENTS = 4, 4, 8
FP32 = 4
DECODING = ("seconds", "steps", "rows", "token_seconds", "weight_seconds", "cache_seconds", "launch_seconds")
BUCKET = 2**26  # elements of gradients that whole models sum at once


@dataclass(frozen=True)
class Hardware:
    """A device by its vendor's figures. memory: bytes; flops: dense products in bf16, a second; bandwidth: of its
    memory, link: to the others of its node, network: to those of other nodes, bytes/s each way."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    cuda: bool = True


HARDWARE = {
    "a100": Hardware("A100 SXM", 80e9, 312e12, 2.04e12, 300e9, 25e9),
    "h100": Hardware("H100 SXM", 80e9, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Hardware("H200 SXM", 141e9, 989e12, 4.8e12, 450e9, 50e9),
    "b200": Hardware("B200 SXM", 180e9, 2250e12, 8e12, 900e9, 50e9),
    # A core's fp32 products with AVX2, at 3 GHz.
    "cpu": Hardware("CPU", 16e9, (os.cpu_count() or 1) * 96e9, 20e9, 10e9, 1e9, cuda=False),
}


def machine() -> Hardware:
    """The device that this process would train on; of a CPU with the memory of the machine, or of the control group."""
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        known = next((h for name, h in HARDWARE.items() if name.upper() in about.name.upper()), HARDWARE["h100"])
        return replace(known, name=about.name, memory=about.total_memory)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (said := limit.read_text().strip()).isdigit():
        memory = min(memory, int(said))
    return replace(HARDWARE["cpu"], memory=memory)


@dataclass(frozen=True)
class Parameters:
    """blocks: matrices of the blocks, computed with in the compute dtype; mixing: of the mixing head, likewise; head:
    of the vocabulary; block: of the largest matrix; total: of all."""

    blocks: int
    mixing: int
    head: int
    largest: int
    total: int

    @property
    def rest(self) -> int:
        """Embedding and head, norms, mixing head and delimiters."""
        return self.total - self.blocks

    @staticmethod
    def of(config: DecoderConfig, needs: Needs) -> Parameters:
        with torch.device("meta"):
            model = ThinkingModel(Decoder(config), needs.delimiters is not None, needs.mixing_head)
        linear = [m for block in model.decoder.layers for m in block.modules() if isinstance(m, Linear)]
        blocks = sum(p.numel() for m in linear for p in m.parameters())
        mixing = 0 if model.mixing_head is None else sum(p.numel() for p in model.mixing_head.parameters())
        largest = max(m.weight.numel() for m in linear)
        total = sum(p.numel() for p in model.parameters())
        return Parameters(blocks, mixing, model.head_weight_VW.numel(), largest, total)


@dataclass(frozen=True)
class Job:
    """A run, as far as memory and time depend on it.

    rows: of a step, over all `ranks`, `devices` of which are a node; shard: ranks that hold one copy of the states
    together. micro_batch_rows, anchors_at_once, thoughts_at_once, sampled_at_once: as in a recipe; None: all.
    sampled_rows: rows whose thoughts are sampled together; None: those of a micro-batch. thought_tokens: mean length of
    the sampled thoughts, where they are taken to end early. replica: shards sample from a copy of the model, not from
    gathered blocks. graphs: decoding steps are replayed. sync_each_backward: whether shards sum gradients in each
    backward, and not once per update. idle_teachers: of a run's other stages.
    """

    config: DecoderConfig
    parameters: Parameters
    work: Workload
    hardware: Hardware
    rows: int
    ranks: int = 1
    devices: int = 8
    shard: int = 1
    activations: torch.dtype = torch.bfloat16
    checkpointing: bool = False
    micro_batch_rows: int | None = None
    anchors_at_once: int | None = None
    thoughts_at_once: int | None = None
    sampled_at_once: int | None = None
    sampled_rows: int | None = None
    thought_tokens: float | None = None
    replica: bool = True
    graphs: bool = False
    sync_each_backward: bool = False
    idle_teachers: int = 0

    # How a step is cut

    @property
    def rank_rows(self) -> int:
        return math.ceil(self.rows / self.ranks)

    @property
    def micro_rows(self) -> int:
        return min(self.rank_rows, self.micro_batch_rows or self.rank_rows)

    @property
    def micro_batches(self) -> int:
        return math.ceil(self.rank_rows / self.micro_rows)

    @property
    def anchors(self) -> int:
        """Of a row, at most: what is held for each row is held for as many as the fullest row has."""
        return math.ceil(self.work.anchors)

    @property
    def held(self) -> int:
        """Anchors of a row whose thoughts are held with gradient at once."""
        return min(self.anchors, self.anchors_at_once or self.anchors)

    @property
    def thoughts_held(self) -> int:
        """Thoughts of an anchor whose activations are held at once."""
        return min(self.work.thoughts, self.thoughts_at_once or self.work.thoughts)

    @property
    def divided(self) -> bool:
        """Whether backward computes the thoughts of an anchor in parts again."""
        return self.thoughts_held < self.work.thoughts

    @property
    def sampled(self) -> int:
        """Anchors of a row whose thoughts are sampled at once."""
        return min(self.anchors, self.sampled_at_once or self.anchors_at_once or self.anchors)

    @property
    def rollout_rows(self) -> int:
        """Rows whose thoughts are sampled together."""
        return min(self.rank_rows, self.sampled_rows or self.micro_rows)

    @property
    def chunks(self) -> int:
        return math.ceil(self.anchors / self.held) if self.held else 0

    @property
    def chunked(self) -> bool:
        return bool(self.chunks) and self.anchors_at_once is not None

    @property
    def losses(self) -> int:
        """Backward passes of an update."""
        return self.micro_batches * (self.chunks + 1 if self.chunked else 1)

    @property
    def sharded(self) -> bool:
        return self.shard > 1

    # Memory

    @cached_property
    def states(self) -> dict[str, float]:
        """What stays from step to step."""
        p, element = self.parameters, self.activations.itemsize
        models = 1 + self.work.teacher
        found = {"weights": MASTER * p.total / self.shard, "optimizer": MOMENTS * p.total / self.shard}
        if self.work.teacher:
            found["teacher"] = MASTER * p.total / self.shard
        if self.idle_teachers:
            found["teachers of other stages"] = self.idle_teachers * MASTER * p.total / self.shard
        sampled = self.sharded and self.replica and self.work.thoughts > 0
        if sampled:
            found["sampling replica"] = element * p.blocks + FP32 * p.rest
        if element < FP32:
            # Of shards, blocks are gathered in it; a CPU holds the rounded head in fp32.
            head = element * p.mixing + (element if self.hardware.cuda else FP32) * p.head
            blocks = 0 if self.sharded else models * element * p.blocks
            found["copies of weights in the compute dtype"] = (models + sampled) * head + blocks
        if not self.hardware.cuda and 0 < self.rollout_rows * self.work.thoughts * self.sampled <= FEW_ROWS:
            # Packed for few rows; a head that is multiplied layer by layer in fp32.
            found["copies of weights for sampling"] = element * p.blocks + FP32 * p.head
        return found

    @property
    def gradients(self) -> float:
        """Of shards that are summed once per update, whole until then."""
        whole = self.losses > 1 and not self.sync_each_backward
        return GRADIENT * self.parameters.total / (1 if whole else self.shard)

    @property
    def gathered(self) -> float:
        """Two blocks of a sharded model and the gradient of one; all that is outside of blocks, with its gradient."""
        if not self.sharded:
            return 0.0
        p, element = self.parameters, self.activations.itemsize
        block = p.blocks / self.config.layers
        return (2 * element + element + FP32) * block + 2 * FP32 * p.rest

    @cached_property
    def phases(self) -> dict[str, dict[str, float]]:
        """What is held beside the states at the fullest moment of each phase, by what it is."""
        w, c, p, act = self.work, self.config, self.parameters, self.activations
        element, rows, length = act.itemsize, self.micro_rows, self.work.length
        text_tokens = rows * length
        text = text_tokens * kept(c, act, self.checkpointing)
        if self.checkpointing and not w.thoughts:
            text -= text_tokens * keys_and_values(c, act)  # which nobody sees
        again = kept_by_block(c, act) if self.checkpointing else 0
        working = beside_backward(c, act) + again
        gradients = {"gradients": self.gradients, "gathered weights": self.gathered}
        first = {"gathered weights": self.gathered}
        before = gradients if self.losses > 1 else first
        # A product's gradient in the compute dtype, and in fp32.
        weight = (element + FP32) * p.largest
        found: dict[str, dict[str, float]] = {}

        if w.sampled:
            sampling = self.rollout_rows * self.sampled * w.thoughts
            slots, read_tokens = w.prompt + math.ceil(w.sampled), self.rollout_rows * length
            # Without gradient, of a text stay its hidden states, keys and values.
            read = read_tokens * (c.width * element + keys_and_values(c, act))
            state = read if w.readings or self.rollout_rows > rows else text
            copied = not self.hardware.cuda and element < FP32 and not w.everywhere
            found["sampling"] = before | {
                "text": state,
                "text, read by the teacher": w.teacher * read,
                # Copied once half of the thoughts have ended, where they can.
                "keys and values of thoughts": sampling * slots * keys_and_values(c, act) * (1 if w.everywhere else 1.5)
                + copied * read_tokens * keys_and_values(c, act),
                "gathered blocks": element * p.blocks * (self.sharded and not self.replica),
                "activations": sampling * kept_by_block(c, act),
                "logits": self._logits(sampling),
            }

        if w.thoughts:
            scored = rows * self.held * self.thoughts_held * w.scored
            predicted = rows * self.held * w.thoughts * (w.predicted + w.rewarded * w.sampled)
            of_thought = kept(c, act, self.checkpointing)
            # A thought's keys and values are seen by itself alone: they are made again.
            of_thought -= keys_and_values(c, act) if self.checkpointing else 0
            mixed = rows * self.held * w.thoughts * w.mixed * c.width * (3 * element + FP32)
            mixing = rows * self.held * w.thoughts * w.mixed * c.width * 3 * FP32
            of_text = rows * length * (c.width + keys_and_values(c, act) / element) * FP32
            passed = scored * of_thought
            # Of thoughts that backward computes in parts again there are hidden states alone, and one part in its turn.
            in_turn = passed if self.divided else 0.0
            found["thoughts"] = (before if self.chunks * self.micro_batches > 1 else first) | {
                "text": text,
                "thoughts": passed - in_turn + predicted * c.width * element + mixed,
                "gradient of the text": of_text if self.chunked else 0,
                "backward": max(self._head(predicted), in_turn + scored * working + weight, mixing),
            }

        predicted = rows * w.text_predicted
        at_once = found.get("thoughts", {}) if w.thoughts and not self.chunked else {}
        found["text"] = before | {
            "text": text,
            "thoughts": at_once.get("thoughts", 0.0),
            "gradient of the text": (text_tokens * (c.width + keys_and_values(c, act) / element) * (FP32 + element))
            if self.chunked
            else 0,
            "backward": max(self._head(predicted), text_tokens * working + weight),
        }
        # Every gradient is there, and the embedding's a second time before it is added to the head's.
        # Whole models sum their gradients in buckets.
        bucket = FP32 * min(BUCKET, p.total) if self.ranks > 1 and not self.sharded else 0
        found["update"] = gradients | {"gradient of the embedding": max(bucket, FP32 * p.head)}
        return {phase: {what: size for what, size in held.items() if size} for phase, held in found.items()}

    def _logits(self, rows: float) -> float:
        """Of as many rows as are held at once."""
        V = self.config.vocab_size
        most = logprobs.CUDA_CHUNK_ELEMENTS if self.hardware.cuda else logprobs.CHUNK_ELEMENTS
        return min(rows * V, max(V, most)) * FP32

    def _head(self, rows: float) -> float:
        """Backward of the vocabulary: logits, on CUDA their gradient in the compute dtype, and the gradient of the
        head, where there are several chunks that of one of them, too."""
        logits, V = self._logits(rows), self.config.vocab_size
        lower = logits * self.activations.itemsize / FP32 * self.hardware.cuda
        chunks = min(2, math.ceil(rows * V * FP32 / logits)) if rows else 0
        return logits + lower + chunks * FP32 * self.parameters.head

    @property
    def peak(self) -> float:
        """Bytes of a device at the fullest moment of a step."""
        return sum(self.states.values()) + max(sum(held.values()) for held in self.phases.values())

    @property
    def staged(self) -> float:
        """Bytes of the host's memory that each of the `writers` copies a snapshot to, and keeps for the next."""
        return (MASTER * (1 + self.work.teacher) + MOMENTS) * self.parameters.total / self.shard

    @property
    def writers(self) -> int:
        """Ranks of a node that write snapshots, at most: those with the first copy of the model."""
        return min(self.shard, self.devices)

    def fits(self, memory: float) -> bool:
        host = 0.0 if self.hardware.cuda else self.staged  # which is then the device's own
        return self.peak + host <= USABLE * memory

    # FLOPs and seconds

    @cached_property
    def flops(self) -> dict[str, float]:
        """Of a step, over all ranks, as the ledger counts them."""
        work = self.work if self.thought_tokens is None else self.work.ending_after(self.thought_tokens)
        flops = work.flops(self.config, self.checkpointing, self.divided)
        return {stage: self.rows * cost for stage, cost in flops.items()}

    @property
    def tokens(self) -> int:
        """Of text, in a step."""
        return self.rows * self.work.length

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Of a step, by phase."""
        w, rate = self.work, self.hardware.flops * ATTAINED * self.ranks
        flops, passes = self.flops, 3 + self.checkpointing
        readings = passes * w.updates + w.readings + w.other_readings
        thinkings = (passes + self.divided) * w.updates + w.other_thinkings + w.moved
        forward_text = flops["text"] * (readings - (passes - 1) * w.updates) / readings
        forward_thoughts = flops["thoughts"] * (thinkings - (passes + self.divided - 1) * w.updates) / thinkings
        score = forward_thoughts + (flops["vocabulary"] / 4) + flops["mixing"] / 3
        everything = sum(flops.values()) - flops["rollout"]
        found = {
            "read": forward_text / rate,
            "sample": self.decoding["seconds"],
            "score": score / rate,
            "backward": (everything - forward_text - score) / rate,
            "optimizer": self._optimizer,
        }
        compute = found["read"] + found["score"] + found["backward"]
        found["communication"] = max(0.0, self.transfers["passes"] - compute) + self.transfers["update"]
        return found

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def _optimizer(self) -> float:
        """AdamW reads master, gradient and moments and writes all but the gradient; a teacher and copies follow."""
        p = self.parameters.total / self.shard
        moved = 28 + 12 * self.work.teacher + (MASTER + self.activations.itemsize)
        return self.work.updates * moved * p / (self.hardware.bandwidth * STREAMED)

    @cached_property
    def decoding(self) -> dict[str, float]:
        """seconds of a step's rollouts; steps, one after the other; rows, thoughts at once; token_seconds of a step of
        them, and what reading the weights, reading keys and values, and launching kernels takes of that."""
        w, c, p, h = self.work, self.config, self.parameters, self.hardware
        if not w.sampled:
            return dict.fromkeys(DECODING, 0.0)
        at_once = self.rollout_rows * self.sampled
        batches = math.ceil(self.rank_rows / self.rollout_rows) * math.ceil(self.anchors / self.sampled)
        rows, steps = at_once * w.thoughts, batches * w.sampled
        bandwidth = h.bandwidth * STREAMED
        weights = self.activations.itemsize * (p.blocks + p.head)
        # The thoughts of an anchor share what it sees of the text. At every position a tile of queries does.
        seen = w.prefix * at_once / (64 if w.everywhere else 1)
        # Thoughts that have ended leave the batch, and steps go on until the longest has. Of lengths without memory the
        # mean square is twice the square of the mean.
        early = self.thought_tokens is not None and self.thought_tokens < w.sampled
        length = self.thought_tokens if early and self.thought_tokens is not None else w.sampled
        own, share = w.prompt + length * (1 if early else 0.5), length / w.sampled
        cache = keys_and_values(c, self.activations) * share * (rows * own + seen)
        products = self.flops["rollout"] / self.ranks / steps
        launches = c.layers * KERNELS * (REPLAYED if self.graphs else LAUNCHED) if h.cuda else 0.0
        token = max((weights + cache) / bandwidth, products / (h.flops * ATTAINED)) + launches
        figures = steps * token, steps, rows, token, weights / bandwidth, cache / bandwidth, launches
        return dict(zip(DECODING, figures, strict=True))

    @cached_property
    def moved(self) -> dict[str, float]:
        """Bytes that each rank sends in a step: gathering weights and summing gradients for `passes`, and once an
        `update` (gradients of whole models, or of the copies of a sharded one, and the sampling replica)."""
        p, element, w = self.parameters, self.activations.itemsize, self.work
        copies = self.ranks // self.shard
        found = {"passes": 0.0, "update": 0.0}
        if self.sharded:
            others = (self.shard - 1) / self.shard
            # Blocks are gathered for every pass forward and back, what is outside of them once.
            forward = self.micro_batches * (w.updates + w.readings + w.other_readings)
            # A part of an anchor's thoughts takes a pass forward, and two of its own when backward comes to it.
            parts = math.ceil(w.thoughts / self.thoughts_held) if self.divided else 1
            thinkings = (3 * parts - 1 if self.divided else 1) * w.updates + parts * (w.other_thinkings + w.moved)
            forward += self.micro_batches * self.chunks * thinkings
            gathers = forward + self.losses * w.updates
            found["passes"] = others * (gathers * element * p.blocks + w.updates * FP32 * p.rest)
            summed = self.losses if self.sync_each_backward else 1
            found["passes"] += others * summed * w.updates * FP32 * p.total
            if w.thoughts:
                gathered = 1 if self.replica else math.ceil(self.rank_rows / self.rollout_rows)
                found["update"] += others * (gathered * element * p.blocks + FP32 * p.rest)
        if copies > 1:
            found["update"] += w.updates * 2 * (copies - 1) / copies * FP32 * p.total / self.shard
        return found

    @cached_property
    def transfers(self) -> dict[str, float]:
        """Seconds of `moved`."""
        links = {
            "passes": self.hardware.link if self.shard <= self.devices else self.hardware.network,
            "update": self.hardware.link if self.ranks <= self.devices else self.hardware.network,
        }
        return {name: size / (links[name] * TRANSFERRED) for name, size in self.moved.items()}

    @property
    def bound(self) -> str:
        """The phase that takes the largest share of a step; of sampling, what binds it."""
        phase = max(self.seconds, key=lambda name: self.seconds[name])
        if phase != "sample":
            return phase
        d = self.decoding
        parts = {"weights": d["weight_seconds"], "cache": d["cache_seconds"], "launches": d["launch_seconds"]}
        parts["products"] = d["token_seconds"] - d["launch_seconds"]
        streamed = parts["weights"] + parts["cache"] >= 0.99 * parts["products"]
        del parts["products" if streamed else "weights"]
        return f"sampling: {max(parts, key=lambda name: parts[name])}"


# What fits

KEYS = (
    "micro_batch_rows",
    "sampled_rows",
    "objective.anchors_at_once",
    "objective.thoughts_at_once",
    "objective.sampled_at_once",
)


def fitting(job: Job, memory: float, keys: Iterable[str] = KEYS) -> Job | None:
    """The job with the largest of these sizes that fit together: first as few passes with gradient as can be, then as
    little time for sampling. None if none fit."""
    keys, deep = set(keys), job.anchors > 0
    rows = _parts(job.rank_rows) if "micro_batch_rows" in keys else [job.micro_batch_rows]
    held = [job.anchors_at_once]
    if deep and "objective.anchors_at_once" in keys:
        held = [None, *_parts(job.anchors)]
    divided = [job.thoughts_at_once]
    if deep and "objective.thoughts_at_once" in keys:
        divided = [None, *_parts(job.work.thoughts)[1:]]
    sampled = _parts(job.anchors) if deep and "objective.sampled_at_once" in keys else [job.sampled_at_once]
    found: list[Job] = []
    for micro in rows:
        one = replace(job, micro_batch_rows=micro, sampled_at_once=sampled[-1])
        together = [job.sampled_rows]
        if "sampled_rows" in keys:
            several = deep and one.micro_batches > 1
            together = [n * one.micro_rows for n in _parts(one.micro_batches)] if several else [None]
        # Thoughts of one anchor only where there are no fewer anchors: their passes are computed again.
        sizes = [(n, divided[0]) for n in held] + [(held[-1], k) for k in divided[1:]]
        cut = (replace(one, anchors_at_once=n, thoughts_at_once=k, sampled_rows=together[-1]) for n, k in sizes)
        if (most := next((j for j in cut if j.fits(memory)), None)) is not None:
            ways = (replace(most, sampled_rows=r, sampled_at_once=n) for r in together for n in sampled)
            found.append(min((j for j in ways if j.fits(memory)), key=lambda j: j.decoding["seconds"]))
    return min(found, key=lambda j: (j.divided, j.losses, j.decoding["seconds"], -j.micro_rows), default=None)


def _parts(count: int) -> list[int]:
    """What `count` can be cut into, each as even as it can be, from the whole to ones."""
    return sorted({math.ceil(count / n) for n in range(1, count + 1)}, reverse=True)
