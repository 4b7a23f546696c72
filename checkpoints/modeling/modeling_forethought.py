"""A language model that thinks while it generates, for transformers 4.50 to 5.

`every-token` (Quiet-STaR, 2403.09629): behind each token of the text it writes a thought, `start`, L tokens, `end`, and
predicts the next token from the mixture of what it expects without and with the thought. A thought sees the text up to
its anchor, the token it stands behind, and itself; its k-th token is at the anchor's position + k. It is dropped again,
so that the cache holds the text alone.

`before-answer` (RLP, 2510.01265; RPT, 2506.08007): behind the prompt it writes one thought between tags, and then the
answer.

Shapes: B rows, N tokens of the text that are new, T all tokens of the text, M anchors, S tokens of a thought, L sampled
ones of them, Q new tokens of all thoughts (S·M of them, anchor by anchor for each token), G key heads, D their size, W
width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_forethought import BEFORE_ANSWER, EVERY_TOKEN, MODES, OFF, ForethoughtConfig

# Anchors that think together. Each step's attention goes over the text and all of their thoughts, of which each sees
# its own: more of them are fewer passes and more waste.
ANCHORS_AT_ONCE = 64
NO_TOKEN = -1  # behind the end of a thought that is shorter than others
# What a cache is called, as argument and in outputs: from transformers 5.24 on `cache`.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
MASKED_ATTENTION = ("eager", "sdpa")  # attention that takes a mask of its own for every query


@dataclass
class ForethoughtOutput(CausalLMOutputWithPast):
    """logits [B, M, V]: behind a thought the mixed ones. thoughts: int64 [B, M, L], None where it did not think."""

    thoughts: Tensor | None = None


class Delimiters(nn.Module):
    """Embeddings of a thought's start and end, stored divided by SCALE."""

    SCALE = 100.0

    def __init__(self, width: int):
        super().__init__()
        self.start_W = nn.Parameter(torch.zeros(width))
        self.end_W = nn.Parameter(torch.zeros(width))


class MixingHead(nn.Module):
    """The weight w of a thought's prediction against the text's own (Quiet-STaR §4.3)."""

    def __init__(self, width: int):
        super().__init__()
        self.from_text = nn.Linear(width, width, bias=False)
        self.from_thought = nn.Linear(width, width)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, 1, bias=False)

    def forward(self, text_W: Tensor, thought_W: Tensor) -> Tensor:
        """Final hidden states [..., W] → w [..., 1]; 0 is "ignore the thought"."""
        first = (self.from_text(text_W) + self.from_thought(thought_W)).relu()
        return self.out(self.hidden(first).relu())


class ThoughtCache(DynamicCache):
    """The keys and values of a text, and behind them those of thoughts, which the text's own cache never sees.

    tokens: of all thoughts together, at most. Each layer has one buffer [B, G, T + tokens, D], filled as they grow.
    """

    def __init__(self, text: DynamicCache, tokens: int):
        super().__init__()
        self._text, self._tokens = text_keys_and_values(text), tokens
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._ends = [keys.shape[2] for keys, _ in self._text]

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        return self._ends[layer_idx or 0]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """The new tokens' keys and values [B, G, Q, D] → all up to them."""
        if layer_idx == len(self._buffers):
            self._buffers.append(tuple(self._buffer(x) for x in self._text[layer_idx]))  # type: ignore[arg-type]
        start, end = self._ends[layer_idx], self._ends[layer_idx] + key_states.shape[2]
        for buffer, states in zip(self._buffers[layer_idx], (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self._ends[layer_idx] = end
        return tuple(buffer[:, :, :end] for buffer in self._buffers[layer_idx])

    def _buffer(self, text_BGTD: Tensor) -> Tensor:
        B, G, T, D = text_BGTD.shape
        buffer = text_BGTD.new_empty(B, G, T + self._tokens, D)
        buffer[:, :, :T] = text_BGTD
        return buffer


def text_keys_and_values(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """[B, G, T, D] each, of every layer."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache, strict=True))  # transformers before 4.54


@dataclass
class Reading:
    """A text that was read, as thoughts need it.

    hidden_BNW: final hidden states of its new tokens. position_BN: their position ids. visible_BT: bool, which of all
    its tokens are there, and not padding.
    """

    hidden_BNW: Tensor
    position_BN: Tensor
    visible_BT: Tensor
    cache: DynamicCache | None


class ForethoughtPreTrainedModel(PreTrainedModel):
    config_class = ForethoughtConfig
    base_model_prefix = "base"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _supports_cache_class = True
    # Kernels of FlashAttention and FlexAttention take no mask of their own for every query.
    _supports_flash_attn = _supports_flash_attn_2 = _supports_flex_attn = False
    _supports_static_cache = False

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, MixingHead):
            nn.init.zeros_(module.out.weight)


class ForethoughtForCausalLM(ForethoughtPreTrainedModel, GenerationMixin):
    """The language model `base`, and what thinking at every token adds to it."""

    def __init__(self, config: ForethoughtConfig):
        super().__init__(config)
        self.base = AutoModelForCausalLM.from_config(config.base_config)
        thinks = config.think == EVERY_TOKEN
        self.delimiters = Delimiters(config.hidden_size) if thinks else None
        self.mixing_head = MixingHead(config.hidden_size) if thinks else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.base.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.base.get_decoder()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        cache: DynamicCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        think: str | None = None,
        thought_length: int | None = None,
        thought_temperature: float = 0.0,
        generator: torch.Generator | None = None,
        thoughts: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ForethoughtOutput | tuple:
        """Reads N tokens behind those in the cache; thinks, if at every token, behind those whose logits are kept.

        input_ids int64 [B, N]; attention_mask [B, T], 0 on padding, wherever it is; position_ids [B, N], by default
        counted by the mask. past_key_values, or cache: of the text before. logits_to_keep: the last so many of the N
        tokens, 0 for all; or their numbers, int64 [M]. think: by default as trained. thought_length: L;
        thought_temperature 0 is greedy, else thoughts are sampled with `generator`. thoughts: int64 [B, M, L], to score
        instead of writing any. use_cache False keeps no keys and values from one pass to the next and reads the text
        again for each token of a thought: slow, to check others by.

        Raises ValueError for what the model cannot do.
        """
        mode = self._mode(think)
        use_cache = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        read = 0 if cache is None else cache.get_seq_length()
        B, N = input_ids.shape
        visible_BT = self._visible(attention_mask, B, read + N)
        if position_ids is None:
            position_ids = (visible_BT.cumsum(1) - 1).clamp(min=0)[:, read:]

        def reading(cache: DynamicCache | None) -> Reading:
            output = self.get_decoder()(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=cache is not None,
                **{CACHE: cache},
            )
            return Reading(output.last_hidden_state, position_ids, visible_BT, cache)

        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if mode != EVERY_TOKEN:
            text = reading(cache if cache is not None or not use_cache else DynamicCache())
            hidden_BMW, written = text.hidden_BNW[:, keep], None
        else:
            if not use_cache and cache is not None:
                raise ValueError("a cache was given with use_cache=False; leave one of them out")
            text = reading(DynamicCache() if cache is None else cache)
            again = None if use_cache else lambda: reading(DynamicCache())
            at_M = torch.arange(N, device=input_ids.device)[keep]
            length = self._thought_length(thought_length) if thoughts is None else thoughts.shape[2]
            sample = self._sampler(thought_temperature, generator)
            parts = []
            for here_M, number_M in zip(
                at_M.split(ANCHORS_AT_ONCE), torch.arange(len(at_M)).split(ANCHORS_AT_ONCE), strict=True
            ):
                given = None if thoughts is None else thoughts[:, number_M]
                parts.append(self._mixed(text, here_M, length, sample, given, again))
            hidden_BMW, written = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))

        logits = self.get_output_embeddings()(hidden_BMW)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        kept = {CACHE: text.cache if use_cache else None}
        output = ForethoughtOutput(loss=loss, logits=logits, thoughts=written, **kept)
        return output.to_tuple() if return_dict is False else output

    # Thinking at every token

    def _mixed(
        self,
        text: Reading,
        at_M: Tensor,
        length: int,
        sample: Callable[[Tensor], Tensor],
        thoughts_BML: Tensor | None,
        again: Callable[[], Reading] | None,
    ) -> tuple[Tensor, Tensor]:
        """Mixed hidden states [B, M, W] behind the text's tokens number `at_M`, and the thoughts [B, M, L] there.

        again: reads the text before each pass, instead of keeping anything.
        """
        delimiters, head, M = self.delimiters, self.mixing_head, len(at_M)
        assert delimiters is not None and head is not None and text.cache is not None
        self._check_window(text.visible_BT.shape[1], length + 2)
        if any(keys.shape[2] != text.visible_BT.shape[1] for keys, _ in text_keys_and_values(text.cache)):
            raise ValueError("thoughts need a cache of the whole text; use a DynamicCache without a config")
        embed, (B, _, W) = self.get_input_embeddings(), text.hidden_BNW.shape
        start_B1MW, end_B1MW = (
            (delimiter_W * Delimiters.SCALE).to(text.hidden_BNW.dtype).expand(B, 1, M, W)
            for delimiter_W in (delimiters.start_W, delimiters.end_W)
        )

        held: ThoughtCache | None = None

        def last(x_BSMW: Tensor) -> Tensor:
            """Final hidden states [B, M, W] of the last of the thoughts' tokens so far, which the cache joins."""
            nonlocal held
            if held is None or again is not None:
                held = ThoughtCache((text if again is None else again()).cache, (length + 2) * M)
            return self._continue(x_BSMW, text, at_M, held)[:, -1]

        x_BSMW = start_B1MW
        if thoughts_BML is None:
            written: list[Tensor] = []
            with torch.no_grad():
                for _ in range(length):
                    written.append(sample(last(x_BSMW)))
                    x_BSMW = torch.cat([x_BSMW, embed(written[-1])[:, None]], dim=1)
            thoughts_BML = torch.stack(written, dim=2)
            if torch.is_grad_enabled():
                held = None
        thought_BMW = last(torch.cat([start_B1MW, embed(thoughts_BML).transpose(1, 2), end_B1MW], dim=1))
        text_BMW = text.hidden_BNW[:, at_M]
        w_BM1 = head(text_BMW, thought_BMW)
        return ((1 - w_BM1) * text_BMW + w_BM1 * thought_BMW).to(text_BMW.dtype), thoughts_BML

    def _continue(self, x_BSMW: Tensor, text: Reading, at_M: Tensor, cache: ThoughtCache) -> Tensor:
        """Final hidden states [B, S, M, W] of those of the thoughts' tokens that are not in the cache yet."""
        (T, N), M = (text.visible_BT.shape[1], text.hidden_BNW.shape[1]), len(at_M)
        done, device = (cache.get_seq_length() - T) // M, x_BSMW.device
        x_BSMW, all_Z = x_BSMW[:, done:], torch.arange(x_BSMW.shape[1], device=device)
        new_S, (B, S, _, _) = all_Z[done:], x_BSMW.shape
        text_BMT = text.visible_BT[:, None] & (torch.arange(T, device=device) <= (T - N + at_M)[:, None])
        own_MM = torch.eye(M, dtype=torch.bool, device=device)
        own_SMZM = own_MM[None, :, None] & (all_Z <= new_S[:, None])[:, None, :, None]
        visible_BSMK = torch.cat(
            [text_BMT[:, None].expand(-1, S, -1, -1), own_SMZM.flatten(2).expand(B, -1, -1, -1)], dim=-1
        )
        # Added to the scores, as both kinds of attention take it, from whatever version.
        mask_B1QK = torch.zeros_like(visible_BSMK, dtype=x_BSMW.dtype)
        mask_B1QK = mask_B1QK.masked_fill(~visible_BSMK, torch.finfo(x_BSMW.dtype).min).flatten(1, 2)[:, None]
        position_BSM = text.position_BN[:, at_M][:, None] + (new_S + 1)[:, None]
        output = self.get_decoder()(
            inputs_embeds=x_BSMW.flatten(1, 2),
            attention_mask=mask_B1QK,
            position_ids=position_BSM.flatten(1, 2),
            use_cache=True,
            **{CACHE: cache},
        )
        return output.last_hidden_state.unflatten(1, (S, M))

    def _sampler(
        self, temperature: float, generator: torch.Generator | None, closing: Sequence[int] = ()
    ) -> Callable[[Tensor], Tensor]:
        """From hidden states [B, M, W] to the next tokens of their thoughts, int64 [B, M]. closing: ids not banned."""
        banned = torch.tensor([token for token in self.config.banned_ids if token not in closing], device=self.device)

        def sample(hidden_BMW: Tensor) -> Tensor:
            logits = self.get_output_embeddings()(hidden_BMW)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logits.index_fill_(-1, banned.long(), -torch.inf)
            if temperature == 0:
                return logits.argmax(-1)
            masses = (logits / temperature).softmax(-1)
            return torch.multinomial(masses.flatten(0, -2), 1, generator=generator).view(masses.shape[:-1])

        return sample

    # Thinking before an answer

    @torch.no_grad()
    def think_first(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        thought_length: int | None = None,
        thought_temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, DynamicCache, Tensor]:
        """Prompts [B, N], padded on the left, with a thought behind each.

        Returns ids [B, T] of prompt, opening tag, thought and closing tag; their mask [B, T], 0 where a row is shorter;
        a cache of all but the last ids; and the thoughts without tags, int64 [B, L], NO_TOKEN behind their ends.
        A thought ends with the closing tag, which its `thought_length` tokens include, or is closed behind them.
        """
        open_ids, close_ids = self.config.open_ids, self.config.close_ids
        if not close_ids:
            raise ValueError("the model has no tag that closes a thought; set config.open_ids and config.close_ids")
        length, (B, N) = self._thought_length(thought_length), input_ids.shape
        self._check_window(N, len(open_ids) + length + len(close_ids))
        sample = self._sampler(thought_temperature, generator, close_ids)

        def everywhere(ids: list[int]) -> Tensor:
            return torch.tensor(ids, dtype=torch.int64, device=input_ids.device).expand(B, -1)

        ids_BT = torch.cat([input_ids, everywhere(open_ids)], dim=1)
        visible_BT = torch.nn.functional.pad(self._visible(attention_mask, B, N), (0, len(open_ids)), value=True)
        first, cache = ids_BT.shape[1], DynamicCache()
        thinking_B = torch.ones(B, dtype=torch.bool, device=input_ids.device)
        for count in range(1, length + 1):
            output = self.get_decoder()(
                input_ids=ids_BT[:, cache.get_seq_length() :],
                attention_mask=visible_BT.long(),
                position_ids=(visible_BT.cumsum(1) - 1).clamp(min=0)[:, cache.get_seq_length() :],
                use_cache=True,
                **{CACHE: cache},
            )
            token_B1 = sample(output.last_hidden_state[:, -1:])
            ids_BT = torch.cat([ids_BT, token_B1], dim=1)
            visible_BT = torch.cat([visible_BT, thinking_B[:, None]], dim=1)
            if count >= len(close_ids):
                # The tag it wrote is taken back: every row gets one at the end, so that all answers start together.
                closes_B = thinking_B & (ids_BT[:, -len(close_ids) :] == everywhere(close_ids)).all(1)
                visible_BT[:, -len(close_ids) :] &= ~closes_B[:, None]
                thinking_B = thinking_B & ~closes_B
                if not thinking_B.any():
                    break
        thoughts = ids_BT[:, first:].masked_fill(~visible_BT[:, first:], NO_TOKEN)
        ids_BT = torch.cat([ids_BT, everywhere(close_ids)], dim=1)
        return ids_BT, torch.nn.functional.pad(visible_BT, (0, len(close_ids)), value=True).long(), cache, thoughts

    # Generation

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        think: str | None = None,
        thought_length: int | None = None,
        thought_temperature: float = 0.0,
        generator: torch.Generator | None = None,
        return_thoughts: bool = False,
        **kwargs: Any,
    ) -> Any:
        """GenerationMixin.generate, whose arguments are those of the text or answer, with thoughts.

        think, thought_length, thought_temperature, generator: see `forward`. With return_thoughts the result is a
        dictionary, in which `thoughts` are int64 [B, new tokens, L], or [B, 1, L] before an answer, NO_TOKEN behind the
        end of shorter ones. Prompts of different length are padded on the left, with an attention_mask.
        """
        mode = self._mode(think)
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        if return_thoughts:
            kwargs["return_dict_in_generate"] = True
        if mode == OFF:
            return super().generate(inputs, generation_config, think=mode, **kwargs)
        if inputs is None:
            raise ValueError("there is nothing to think about; give input_ids")
        if mode == BEFORE_ANSWER:
            how = dict(thought_length=thought_length, thought_temperature=thought_temperature, generator=generator)
            return self._answer(inputs, generation_config, how, **kwargs)
        if return_thoughts and self._asked("num_beams", 1, generation_config, kwargs) > 1:
            raise ValueError("beams exchange their texts, so their thoughts cannot be returned; use num_beams=1")
        log: list[Tensor] = []
        output = super().generate(
            inputs,
            generation_config,
            think=mode,
            thought_length=self._thought_length(thought_length),
            thought_temperature=thought_temperature,
            generator=generator,
            thought_log=log,
            **kwargs,
        )
        if return_thoughts:
            # On a GPU transformers may look ahead of the end.
            output["thoughts"] = torch.stack(log, dim=1)[:, : output.sequences.shape[1] - inputs.shape[1]]
        return output

    def _answer(
        self,
        inputs: Tensor,
        generation_config: Any,
        how: dict[str, Any],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Prompts and answers, from the cache of the thoughts between them, which are cut out."""
        beams = self._asked("num_beams", 1, generation_config, kwargs) > 1
        if not beams:  # of several answers to a prompt, each has its own thought
            several = self._asked("num_return_sequences", 1, generation_config, kwargs)
            inputs = inputs.repeat_interleave(several, dim=0)
            attention_mask = None if attention_mask is None else attention_mask.repeat_interleave(several, dim=0)
            kwargs["num_return_sequences"] = 1
        ids_BT, mask_BT, cache, thoughts_BL = self.think_first(inputs, attention_mask, **how)
        for name in ("max_length", "min_length"):
            given = kwargs.get(name, getattr(generation_config, name, None))
            if given:
                kwargs[name] = given + ids_BT.shape[1] - inputs.shape[1]
        if not beams and self._asked("use_cache", True, generation_config, kwargs):
            kwargs[CACHE] = cache
        output = super().generate(ids_BT, generation_config, attention_mask=mask_BT, think=OFF, **kwargs)
        answer = output if isinstance(output, Tensor) else output.sequences
        prompt = inputs.repeat_interleave(len(answer) // len(inputs), dim=0)
        sequences = torch.cat([prompt, answer[:, ids_BT.shape[1] :]], dim=1)
        if isinstance(output, Tensor):
            return sequences
        output["sequences"], output["thoughts"] = sequences, thoughts_BL[:, None]
        return output

    def _asked(self, name: str, default: Any, generation_config: Any, kwargs: dict[str, Any]) -> Any:
        """A setting of generate, from wherever it was given."""
        value = kwargs.get(name, getattr(generation_config or self.generation_config, name, None))
        return default if value is None else value

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: DynamicCache | None = None,
        cache: DynamicCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | None = None,
        think: str | None = None,
        thought_length: int | None = None,
        thought_temperature: float = 0.0,
        generator: torch.Generator | None = None,
        thought_log: list | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """What the cache does not hold yet; positions are counted by the mask."""
        cache = past_key_values if cache is None else cache
        return dict(
            input_ids=input_ids[:, 0 if cache is None else cache.get_seq_length() :],
            attention_mask=attention_mask,
            cache=cache,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep or 1,
            think=think,
            thought_length=thought_length,
            thought_temperature=thought_temperature,
            generator=generator,
        )

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        if model_kwargs.get("thought_log") is not None:
            model_kwargs["thought_log"].append(outputs.thoughts[:, -1])
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)

    # Checks

    def _mode(self, think: str | None) -> str:
        mode = self.config.think if think is None else think
        if mode not in MODES:
            raise ValueError(f"think is {mode!r}; choose one of {', '.join(MODES)}")
        if mode == EVERY_TOKEN:
            if self.mixing_head is None:
                raise ValueError(
                    "the model has no mixing head, so it cannot think at every token; choose think='before-answer' or "
                    "'off'"
                )
            attention = self.base.config._attn_implementation
            if attention not in MASKED_ATTENTION:
                raise ValueError(
                    f"attention {attention!r} takes no mask of its own for every query; load the model with "
                    "attn_implementation='sdpa'"
                )
        return mode

    def _thought_length(self, length: int | None) -> int:
        length = self.config.thought_length if length is None else length
        if length is None or length < 1:
            raise ValueError(f"thought_length is {length}; give a number of tokens, at least 1")
        return length

    def _check_window(self, T: int, thought: int) -> None:
        window = getattr(self.config.base_config, "sliding_window", None)
        if window is not None and T + thought > window:
            raise ValueError(
                f"a text of {T} tokens and thoughts of {thought} exceed the model's sliding window of {window}; give a "
                "shorter text or thought_length"
            )

    def _visible(self, attention_mask: Tensor | None, B: int, T: int) -> Tensor:
        """bool [B, T], which tokens are no padding."""
        if attention_mask is None:
            return torch.ones(B, T, dtype=torch.bool, device=self.device)
        if attention_mask.shape != (B, T):
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, not [rows, all tokens] = {(B, T)}")
        return attention_mask.bool()
