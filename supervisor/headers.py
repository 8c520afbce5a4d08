"""Safetensors headers: what a weight file holds, read without opening its weights.

Content decides, never the suffix. Nothing is unpickled, nothing but the header is
read, and every number in it is checked against the file before it is believed.
Format: https://huggingface.co/docs/safetensors (a length of 8 bytes, little-endian;
JSON; the tensors, one after the other, without holes).
"""

import math
import os
import stat
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

MAX_HEADER_BYTES = 32 * 2**20
"""The format allows 100 MB; the largest real ones, with training notes, hold a few MB."""
MAX_TENSORS = 50_000
"""SDXL in one file has 2,515 tensors."""

MAX_DIMENSIONS = 16
LENGTH_BYTES = 8
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64,
    "I64": 64, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64, "F4": 4,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
}  # fmt: skip

OTHER_FORMATS = {
    b"PK\x03\x04": "is a zip archive, as PyTorch's pickles are",
    b"PK\x05\x06": "is a zip archive, as PyTorch's pickles are",
    b"\x80\x02": "is a pickle",
    b"\x80\x03": "is a pickle",
    b"\x80\x04": "is a pickle",
    b"\x80\x05": "is a pickle",
    b"GGUF": "is a GGUF file",
    b"\x89HDF": "is an HDF5 file",
    b"version ": "is a Git LFS pointer, its weights were not fetched",
    b"<!DOCTYP": "is a web page",
    b"<!doctyp": "is a web page",
    b"<html": "is a web page",
}


class InvalidModel(Exception):
    """A model cannot be used; the message tells why, without a path or a name."""


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


class Header(NamedTuple):
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    """`format` and `modelspec.prediction_type`, where they are told."""


Size = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class _Metadata(msgspec.Struct, frozen=True):
    """The texts that are used here; the others, megabytes of training notes, are skipped."""

    format: str | None = None
    prediction_type: str | None = msgspec.field(name="modelspec.prediction_type", default=None)


class _Top(msgspec.Struct, frozen=True):
    metadata: msgspec.Raw = msgspec.field(name="__metadata__", default=msgspec.Raw(b"{}"))


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str = ""
    shape: tuple[Size, ...] = ()
    data_offsets: tuple[Size, Size] = (0, 0)


# Typed decoders stop at the first value of another form, before much is built from it.
_top = msgspec.json.Decoder(_Top)
_metadata = msgspec.json.Decoder(_Metadata)
_entries = msgspec.json.Decoder(dict[str, _Entry])


def read_header(path: Path) -> Header:
    """Raises InvalidModel when the file is not whole, sane safetensors."""
    text, data_bytes = _read_text(path)
    try:
        return parse_header(text, data_bytes)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise InvalidModel("its safetensors header is not valid") from None


def parse_header(text: bytes, data_bytes: int) -> Header:
    """The header of a file whose tensors take `data_bytes` in all."""
    raw = bytes(_top.decode(text).metadata)
    metadata = msgspec.to_builtins(_metadata.decode(raw))
    text = text.replace(raw, b"{}", 1)
    if text.count(b"{") > MAX_TENSORS + 2:  # before an object is made for each
        raise InvalidModel(f"it holds more than {MAX_TENSORS} tensors")
    if text.count(b",") > MAX_TENSORS * 10:  # ten for each: long lists, or none of tensors
        raise InvalidModel("its safetensors header is not valid")
    entries = _entries.decode(text)
    entries.pop("__metadata__", None)
    _check_layout(entries, data_bytes)
    return Header(
        {name: Tensor(entry.dtype, entry.shape) for name, entry in entries.items()},
        {name: value for name, value in metadata.items() if value is not None},
    )


def _read_text(path: Path) -> tuple[bytes, int]:
    """The header's JSON and the number of bytes after it."""
    try:
        # O_NONBLOCK: a named pipe must not hold the thread for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InvalidModel("it is not a regular file")
            length = _check_length(file.read(LENGTH_BYTES), status.st_size)
            text = file.read(length)
    except OSError:
        raise InvalidModel("it cannot be read") from None
    return text, status.st_size - LENGTH_BYTES - length


def _check_length(start: bytes, file_bytes: int) -> int:
    for magic, what in OTHER_FORMATS.items():
        if start.startswith(magic):
            raise InvalidModel(f"it {what}, and only safetensors files are loaded")
    if len(start) < LENGTH_BYTES:
        raise InvalidModel(f"it has {file_bytes} bytes, too few for a safetensors file")
    length = int.from_bytes(start, "little")
    if length > file_bytes - LENGTH_BYTES:
        raise InvalidModel("it is cut short or not a safetensors file: its header does not fit")
    if length > MAX_HEADER_BYTES:
        raise InvalidModel(
            f"its header has {length} bytes, more than the limit of {MAX_HEADER_BYTES}"
        )
    return length


def _check_layout(entries: dict[str, _Entry], data_bytes: int) -> None:
    """The tensors must fill the rest of the file, in some order, without a hole."""
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.data_offsets):
        if len(entry.shape) > MAX_DIMENSIONS:
            raise InvalidModel("its tensors have too many dimensions")
        if entry.dtype not in DTYPE_BITS:
            raise InvalidModel("one of its tensors is of a type that safetensors does not have")
        begin, after = entry.data_offsets
        bits = math.prod(entry.shape) * DTYPE_BITS[entry.dtype]
        if begin != end or (after - begin) * 8 != bits:
            raise InvalidModel("its tensors' places and shapes do not agree")
        end = after
    if end != data_bytes:
        problem = "it is cut short" if end > data_bytes else "it is longer than its header says"
        raise InvalidModel(f"{problem}: {end} bytes of tensors announced, {data_bytes} there")
    if not entries:
        raise InvalidModel("it holds no tensors")
