"""Checkpoints on disk: safetensors read and written piece by piece, so that no tensor need fit into memory twice.

Nothing is computed here and nothing is unpickled. The safetensors library maps whole files into memory and writes
whole shards at once; `header` says where each tensor's bytes stand, so that `reader` and `writer` move any piece of
them. What they write is byte for byte what the library writes.
"""

from .files import atomic_folder, check_free_disk, file_sha256, fsync, parse_json, read_json, write_json
from .header import CheckpointError, TensorEntry, TensorSpec, read_header
from .reader import INDEX_NAME, WEIGHTS_NAME, CheckpointReader
from .sources import ByteSource, LocalFile
from .writer import DEFAULT_SHARD_SIZE, CheckpointWriter, replace_tensors

__all__ = [
    "DEFAULT_SHARD_SIZE",
    "INDEX_NAME",
    "WEIGHTS_NAME",
    "ByteSource",
    "CheckpointError",
    "CheckpointReader",
    "CheckpointWriter",
    "LocalFile",
    "TensorEntry",
    "TensorSpec",
    "atomic_folder",
    "check_free_disk",
    "file_sha256",
    "fsync",
    "parse_json",
    "read_header",
    "read_json",
    "replace_tensors",
    "write_json",
]
