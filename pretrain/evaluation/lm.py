"""lm-evaluation-harness's model class for models that think: `--model forethought` once this module is imported.

    off             the plain language model, as HFLM has it
    every-token     a thought behind each token that is read of a continuation, mixed into the prediction of the next
                    one (Quiet-STaR); generation likewise
    before-answer   one thought behind a context, shared by all its continuations, which are then read without any
                    (RLP, RPT); generation likewise

A context is read once, whatever continues it: its cache is reused (without thoughts in the families that we know).
Thoughts that are sampled are sampled once, so a log-likelihood is that of the text after these thoughts.

Shapes: B contexts, T tokens of a context and the thought behind it, R rows, each a context and a continuation without
its last token, H tokens of the longest of these, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from checkpoints.errors import CheckpointError
from checkpoints.families import FAMILIES, THINKING
from checkpoints.hugging_face import read_json
from checkpoints.modeling.configuration_forethought import BEFORE_ANSWER, EVERY_TOKEN, MODES, OFF
from checkpoints.modeling.modeling_forethought import ForethoughtForCausalLM
from checkpoints.thinking_export import load_forethought
from data_pipelines import Tokenizer
from objectives.template import encode_tag

TAGS = ("<think>", "</think>")  # of a model that was not trained to think
Request = tuple[Any, list[int], list[int]]  # a key, and the tokens of a context and of what continues it
Row = tuple[int, tuple[int, ...]]  # the number of a context, and the tokens read behind it


@register_model("forethought")
class ForethoughtLM(HFLM):
    """A directory of a plain or a thinking export, evaluated with thoughts or without.

    thought_length: sampled tokens of a thought, by default as trained. thought_temperature: 0 is greedy. Whatever is
    sampled is sampled with torch's global generator, which lm-eval seeds. Raises CheckpointError for a model that
    cannot think so; other arguments are HFLM's.
    """

    _max_length: int | None  # HFLM's

    def __init__(
        self,
        pretrained: str,
        think: str = OFF,
        thought_length: int | None = None,
        thought_temperature: float = 0.0,
        device: str | None = None,
        **settings: Any,
    ):
        if think not in MODES:
            raise ValueError(f"think is {think!r}; choose one of {', '.join(MODES)}")
        self.think = think
        self.thinking = dict(thought_length=thought_length, thought_temperature=thought_temperature)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if think == OFF and not _is_thinking_export(Path(pretrained)):
            super().__init__(pretrained, device=device, **settings)
            return
        model = load_forethought(Path(pretrained)).to(device)
        room = model.config.max_position_embeddings
        if think != OFF:
            room -= _prepare_thinking(model, think, pretrained, thought_length)
        settings = dict(tokenizer=pretrained, backend="causal", max_length=room) | settings
        super().__init__(model.base if think == OFF else model, **settings)

    @contextmanager
    def windows(self, length: int) -> Iterator[None]:
        """Texts are read in pieces of at most so many tokens, each without what stands before it."""
        kept = self._max_length
        self._max_length = min(self.max_length, length)
        try:
            yield
        finally:
            self._max_length = kept

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        if self.think != OFF:
            settings |= dict(think=self.think, **self.thinking)
        return super()._model_generate(context, max_length, stop, **settings)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.think == OFF and not self._share_contexts(requests):
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        of_context: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, _) in enumerate(requests):
            of_context.setdefault(tuple(context), []).append(i)
        contexts = sorted(of_context, key=lambda c: -max(len(c) + len(requests[i][2]) for i in of_context[c]))
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="log-likelihoods") as bar:
            for first in range(0, len(contexts), size := override_bs or int(self.batch_size)):
                batch = contexts[first : first + size]
                members = [[(i, requests[i][2]) for i in of_context[context]] for context in batch]
                scores = self._scores(batch, [[cont for _, cont in member] for member in members])
                for i, score in zip((i for member in members for i, _ in member), scores, strict=True):
                    found[i] = score
                    if requests[i][0] is not None:  # rolling windows have no key
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
                bar.update(sum(map(len, members)))
        return [found[i] for i in range(len(requests))]

    def _share_contexts(self, requests: Sequence[Request]) -> bool:
        """Whether HFLM's model reads contexts apart from what continues them: where that saves work and cuts nothing.

        Windows of a text, which have no key, have next to no context.
        """
        if self.config.model_type not in FAMILIES or requests[0][0] is None:
            return False
        fit = all(len(context) + len(continuation) <= self.max_length for _, context, continuation in requests)
        return fit and len({tuple(context) for _, context, _ in requests}) < len(requests)

    def _scores(
        self, contexts: Sequence[tuple[int, ...]], continuations: Sequence[Sequence[list[int]]]
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation of each context, and whether each of its tokens is the likeliest."""
        # Continuations that differ in their last token alone, or of which one begins another, are one row.
        rows: list[Row] = []
        row_of: dict[Row, int] = {}
        for b, several in enumerate(continuations):
            for head in sorted({tuple(cont[:-1]) for cont in several}, reverse=True):
                if not rows or rows[-1][0] != b or rows[-1][1][: len(head)] != head:
                    rows.append((b, head))
                row_of[b, head] = len(rows) - 1
        longest = max(len(head) for _, head in rows)
        ids_BT, mask_BT, cache = self._read([list(c)[-max(1, self.max_length - longest) :] for c in contexts])
        logprobs: list[Tensor] = []  # of each row, [H + 1, V]
        size = max(len(contexts), int(self.batch_size))
        for first in range(0, len(rows), size):
            part, last = rows[first : first + size], first + size >= len(rows)
            logprobs += self._after(ids_BT, mask_BT, cache if last else deepcopy(cache), part)
        scores = []
        for b, several in enumerate(continuations):
            for cont in several:
                logprobs_HV = logprobs[row_of[b, tuple(cont[:-1])]][: len(cont)]
                token_H = torch.tensor(cont, device=logprobs_HV.device)
                likeliest = bool((logprobs_HV.argmax(-1) == token_H).all())
                scores.append((logprobs_HV.gather(-1, token_H[:, None]).sum().item(), likeliest))
        return scores

    def _after(self, ids_BT: Tensor, mask_BT: Tensor, cache: Any, rows: Sequence[Row]) -> Tensor:
        """Log-probs [R, H + 1, V] behind a context and each token of a row; the cache is used up."""
        context_R = torch.tensor([b for b, _ in rows], device=self.device)
        head_RH, real_RH = self._padded([head for _, head in rows], "right")
        read = cache.get_seq_length()
        cache.batch_select_indices(context_R)
        ids_RT = torch.cat([ids_BT[context_R, read:], head_RH], dim=1)
        mask_RT = torch.cat([mask_BT[context_R], real_RH], dim=1)
        thinks = self.think == EVERY_TOKEN
        return self._logits(ids_RT, mask_RT, cache, head_RH.shape[1] + 1, thinks).float().log_softmax(-1)

    def _read(self, contexts: Sequence[list[int]]) -> tuple[Tensor, Tensor, Any]:
        """Contexts, and what is thought behind them: ids [B, T], their mask [B, T], and a cache of all but the last."""
        ids_BT, mask_BT = self._padded(contexts, "left")
        if self.think == BEFORE_ANSWER:
            return self.model.think_first(ids_BT, mask_BT, **self.thinking)[:3]
        cache = DynamicCache()
        if ids_BT.shape[1] > 1:
            self._logits(ids_BT[:, :-1], mask_BT[:, :-1], cache, 1)
        return ids_BT, mask_BT, cache

    def _logits(self, ids_RT: Tensor, mask_RT: Tensor, cache: Any, keep: int, thinks: bool = False) -> Tensor:
        """The last `keep` logits [R, keep, V] behind the ids that follow the cache, which they join."""
        settings: dict[str, Any]
        if self.think == OFF:
            settings = dict(position_ids=(mask_RT.cumsum(-1) - 1).clamp(min=0)[:, -ids_RT.shape[1] :])
        else:
            settings = dict(think=EVERY_TOKEN, **self.thinking) if thinks else dict(think=OFF)
        return self.model(
            ids_RT, attention_mask=mask_RT, past_key_values=cache, use_cache=True, logits_to_keep=keep, **settings
        ).logits

    def _padded(self, rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
        """int64 ids [B, T] and their mask, 0 on padding at that side."""
        ids = [torch.tensor(row, dtype=torch.int64, device=self.device) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        padded = [pad(x, batch_first=True, padding_side=side) for x in (ids, [torch.ones_like(x) for x in ids])]
        return padded[0], padded[1]


def _prepare_thinking(model: ForethoughtForCausalLM, think: str, name: str, length: int | None) -> int:
    """Positions that a thought needs. A model that was not trained to think gets tags. Raises CheckpointError."""
    config = model.config
    if think == EVERY_TOKEN and model.mixing_head is None:
        raise CheckpointError(
            f"{name} has no mixing head, so it cannot think at every token; give --think before-answer, or a run of "
            "quiet_star"
        )
    if think == BEFORE_ANSWER and not config.close_ids:
        tokenizer = Tokenizer.from_directory(name)
        config.open_ids, config.close_ids = (list(encode_tag(tokenizer, tag)) for tag in TAGS)
        config.banned_ids = [*tokenizer.control_ids, *range(tokenizer.size, config.vocab_size)]
    length = length or config.thought_length
    if length is None:
        raise CheckpointError(f"{name} does not say how long its thoughts are; give --length")
    needed = length + (len(config.open_ids) + len(config.close_ids) if think == BEFORE_ANSWER else 2)
    if needed >= config.max_position_embeddings:
        raise CheckpointError(
            f"thoughts of {length} tokens do not fit into the {config.max_position_embeddings} positions of {name}; "
            "give a shorter --length"
        )
    return needed


def _is_thinking_export(directory: Path) -> bool:
    return (directory / "config.json").exists() and read_json(directory / "config.json").get("model_type") == THINKING
