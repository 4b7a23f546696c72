"""From a data reference to batches of packed tokens.

sources (documents as text) → corpus (token ids, cached on disk) → packing (rows of any step).
`data_pipelines.data_module` hands those rows to Lightning. It is not imported here, to spare others the wait.
"""

from data_pipelines.config import DataConfig, DataError
from data_pipelines.packing import PackedText, open_data
from data_pipelines.tokenizer import Tokenizer

__all__ = ["DataConfig", "DataError", "PackedText", "Tokenizer", "open_data"]
