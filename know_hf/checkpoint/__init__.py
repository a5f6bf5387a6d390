"""Safetensors checkpoints, read and written piece by piece, and atomic files and folders.

The safetensors library maps complete files into memory and writes complete shards. Here, the position of each tensor's
bytes in the header lets reader and writer move any piece. The files are byte for byte those of the library.
"""

from .atomic_folders import atomic_folder, check_empty, check_holds_no_trajectory, check_output, locked_folder
from .byte_sources import ByteSource, LocalFile
from .files import (
    apply_umask,
    check_free_disk,
    file_sha256,
    fsync,
    parse_json,
    read_json,
    read_json_object,
    write_json,
)
from .header import CheckpointError, TensorEntry, TensorSpec, read_header
from .reader import ADAPTER_NAME, INDEX_NAME, WEIGHTS_NAME, CheckpointReader
from .writer import DEFAULT_SHARD_SIZE, CheckpointWriter, replace_tensors

__all__ = [
    "ADAPTER_NAME",
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
    "apply_umask",
    "atomic_folder",
    "check_empty",
    "check_free_disk",
    "check_holds_no_trajectory",
    "check_output",
    "file_sha256",
    "fsync",
    "locked_folder",
    "parse_json",
    "read_header",
    "read_json",
    "read_json_object",
    "replace_tensors",
    "write_json",
]
