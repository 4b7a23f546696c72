"""What llama.cpp's converter made of an export of SmolLM2-135M, read back by this project, has the export's weights.

python -m tests.external.back_from_gguf FILE EXPORT
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from checkpoints.hugging_face import load_decoder
from checkpoints.smollm2 import convert
from data_pipelines import Tokenizer

if __name__ == "__main__":
    file, export = Path(sys.argv[1]), Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as scratch:
        convert(file, Path(scratch))
        back, model = load_decoder(scratch), load_decoder(export)
        texts = ["def f(x):\n    return 3.14 * x", "naïve café, 東京"]
        assert Tokenizer.from_directory(scratch).encode(texts) == Tokenizer.from_directory(export).encode(texts)
    assert back.config == model.config, (back.config, model.config)
    weights = back.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    print(f"llama.cpp's converter: {len(weights)} tensors have the same bits in GGUF")
