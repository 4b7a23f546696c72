"""From a data reference to batches of packed tokens.

    config     DataConfig: where the text comes from and how it is cut into rows
      ↓
    finding    the reference's shards: files on this machine, behind URLs, or of a hub dataset
      ↓
    readers    a shard's rows as text, each defect counted, from any place on; `remote` waits for servers
      ↓
    encoding   text to token ids; no text ever becomes a control token
      ↓
      ├─ corpus     all token ids in one flat array, cached on disk and memory-mapped
      │  packing    documents shuffled per epoch and laid end to end; row r is N tokens of that stream
      │
      └─ manifest   the blocks of all shards, and what the shards contain
         lanes      independent readers of blocks that mix, pack and know where they are
         stream     global row g is row g div L of lane g mod L
      ↓
    rows       PackedText: training rows, held-out rows, a fingerprint of both

`open_data` runs the chain and returns a PackedText: CorpusText with random access for text that fits on this machine,
StreamText for all other, LabText for what is generated. `data_pipelines.data_module` feeds the rows of each step to
Lightning; it is not imported here because importing Lightning is slow. A new kind of text is a subclass of PackedText
that builds its rows with `packed_rows`.
"""

from data_pipelines.config import DataConfig, DataError, SourceConfig
from data_pipelines.opening import open_data
from data_pipelines.rows import PackedText, packed_rows
from data_pipelines.sources import Documents
from data_pipelines.stream import StreamText
from data_pipelines.tokenizer import Tokenizer

__all__ = [
    "DataConfig",
    "DataError",
    "Documents",
    "PackedText",
    "SourceConfig",
    "StreamText",
    "Tokenizer",
    "open_data",
    "packed_rows",
]
