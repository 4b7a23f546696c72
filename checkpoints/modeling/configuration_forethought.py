"""Configuration of a language model that thinks: the model's own config, and how it was trained to think."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

EVERY_TOKEN, BEFORE_ANSWER, OFF = MODES = ("every-token", "before-answer", "off")


class ForethoughtConfig(PretrainedConfig):
    """base_config: the language model's own, of a model_type that transformers knows; a dictionary is read as one.

    think: what it was trained for, `every-token` (Quiet-STaR), `before-answer` (RLP, RPT) or `off`.
    thought_length: sampled tokens of a thought; before an answer, at most so many, the closing tag included.
    open_ids, close_ids: before an answer, the tokens that open a thought (instruction and tag) and those that close it.
    banned_ids: tokens that no thought may contain: control tokens, and ids that the tokenizer does not have.
    """

    model_type = "forethought"
    sub_configs = {"base_config": AutoConfig}  # noqa: RUF012 - as transformers has it
    is_composition = True  # transformers 4: there is no default to compare with when it is saved

    def __init__(
        self,
        base_config: Any = None,
        think: str = OFF,
        thought_length: int | None = None,
        open_ids: list[int] | None = None,
        close_ids: list[int] | None = None,
        banned_ids: list[int] | None = None,
        **kwargs: Any,
    ):
        if think not in MODES:
            raise ValueError(f"think is {think!r}; choose one of {', '.join(MODES)}")
        if not isinstance(base_config, PretrainedConfig):
            base_config = AutoConfig.for_model(**({"model_type": "llama"} | (base_config or {})))
        self.base_config = base_config
        self.think = think
        self.thought_length = thought_length
        self.open_ids, self.close_ids = open_ids or [], close_ids or []
        self.banned_ids = banned_ids or []
        kwargs.setdefault("tie_word_embeddings", base_config.tie_word_embeddings)
        super().__init__(**kwargs)

    # What transformers and evaluation harnesses ask any language model's config for.

    @property
    def vocab_size(self) -> int:
        return self.base_config.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.base_config.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.base_config.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        return self.base_config.num_attention_heads

    @property
    def max_position_embeddings(self) -> int:
        return self.base_config.max_position_embeddings
