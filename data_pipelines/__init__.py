"""From a data reference to batches of packed tokens.

    config     DataConfig: where the text comes from and how it is cut into rows
      ↓
    readers    a shard's rows as text, each defect counted, from any place on; `remote` waits for servers
      ↓
    sources    Documents: the reference's documents as (name, text), in a fixed order
      ↓
    tokenizer  Tokenizer: text to token ids; no text ever becomes a control token
      ↓
    corpus     all token ids in one flat array, cached on disk and memory-mapped
      ↓
    packing    documents shuffled per epoch and laid end to end; row r is N tokens of that stream
      ↓
    rows       PackedText: any training row by random access, held-out rows, a fingerprint of both

`open_data` runs the chain and returns a PackedText. For the reference `lab` it generates the documents instead of
reading them. `data_pipelines.data_module` feeds the rows of each step to Lightning; it is not imported here because
importing Lightning is slow. A new kind of text is a subclass of PackedText that builds its rows with `packed_rows`.
"""

from data_pipelines.config import DataConfig, DataError
from data_pipelines.opening import open_data
from data_pipelines.rows import PackedText, packed_rows
from data_pipelines.sources import Documents
from data_pipelines.tokenizer import Tokenizer

__all__ = ["DataConfig", "DataError", "Documents", "PackedText", "Tokenizer", "open_data", "packed_rows"]
