"""Greedy generation with a thought behind every token: from the cache of the text, against reading the text again for
each token of each thought. Both give the same tokens.

python -m benchmarks.thinking_generation MODEL [--prompt 128] [--new 128] [--length 8] [--every 1]

With --every N only each N-th new token is computed again, and its time counts N times.

A MODEL without mixing head gets a random one, and random delimiters: what they are costs nothing. Needs transformers.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import time

import torch

from checkpoints import load_thinking_model, resolve
from checkpoints.thinking_export import as_forethought
from data_pipelines import Tokenizer
from models import ThinkingModel
from models.thinking import TrainedThinking


def with_thoughts(model: ThinkingModel) -> ThinkingModel:
    if model.delimiters is not None and model.mixing_head is not None:
        return model
    made = ThinkingModel(model.decoder, delimiters=True, mixing_head=True)
    assert made.delimiters is not None and made.mixing_head is not None
    generator = torch.Generator().manual_seed(0)
    embeddings_VW = model.decoder.embed_tokens.weight
    made.delimiters.init_from(*embeddings_VW[torch.randint(len(embeddings_VW), (2,), generator=generator)])
    made.mixing_head.init_weights(generator)
    with torch.no_grad():
        made.mixing_head.out.weight.normal_(0, 0.1, generator=generator)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.thinking_generation")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--length", type=int, default=8, help="tokens of a thought")
    parser.add_argument("--every", type=int, default=1, help="which new tokens are computed again")
    arguments = parser.parse_args()
    directory = resolve(arguments.model)
    tokenizer = Tokenizer.from_directory(directory)
    model = with_thoughts(load_thinking_model(directory))
    model.ban(tokenizer.size, tokenizer.control_ids)
    thinking = as_forethought(model, TrainedThinking("every-token", arguments.length))
    prompt = torch.tensor([tokenizer.encode([pydoc_data.topics.topics["assignment"]])[0][: arguments.prompt]])
    new, every, started = arguments.new, arguments.every, time.perf_counter()
    settings = dict(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, return_thoughts=True)
    found = thinking.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    cached = time.perf_counter() - started
    print(f"cached: {new} tokens in {cached:.2f} s, {new / cached:.2f} tokens/s", flush=True)
    again, started = range(every - 1, new, every), time.perf_counter()
    for i in again:
        end = prompt.shape[1] + i
        with torch.no_grad():
            output = thinking(found.sequences[:, :end], use_cache=False, logits_to_keep=1)
        assert torch.equal(output.thoughts[:, 0], found.thoughts[:, i]), f"thought {i} differs"
        assert torch.equal(output.logits[:, -1].argmax(-1), found.sequences[:, end]), f"token {i} differs"
    recomputed = (time.perf_counter() - started) * new / len(again)
    print(f"recomputed: {len(again)} of {new} tokens, all of them in {recomputed:.2f} s; the same tokens and thoughts")
    print(f"from the cache {recomputed / cached:.1f} times as fast")


if __name__ == "__main__":
    main()
