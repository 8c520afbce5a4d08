"""Weight files of hostile and of broken makers, and what the header reader says to them."""

import contextlib
import json
import os
import pickle
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.headers import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    Header,
    InvalidModel,
    Tensor,
    parse_header,
    read_header,
)

F16_PAIR = {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}


def file_of(path: Path, header: object, data: bytes = b"\0\0\0\0") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_a_header_tells_types_shapes_and_metadata(path: Path) -> None:
    file_of(path, {"__metadata__": {"format": "pt"}, "a": F16_PAIR})
    assert read_header(path) == Header({"a": Tensor("F16", (2,))}, {"format": "pt"})


def test_training_notes_of_any_size_are_passed_over(path: Path) -> None:
    notes = {"ss_tag_frequency": '{"a": 1, ' * 200_000, "modelspec.prediction_type": "v"}
    file_of(path, {"__metadata__": notes, "a": F16_PAIR})
    assert read_header(path).metadata == {"modelspec.prediction_type": "v"}


def test_scalars_and_empty_tensors_are_fine(path: Path) -> None:
    scalar = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
    empty = {"dtype": "F32", "shape": [0, 3], "data_offsets": [4, 4]}
    assert len(read_header(file_of(path, {"a": scalar, "b": empty})).tensors) == 2


class Alarm:
    """Unpickling it makes a folder: proof that a pickle was opened."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.where,)


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_a_pickle_is_refused_and_not_opened(path: Path, protocol: int) -> None:
    alarm = path.parent / "opened"
    path.write_bytes(pickle.dumps(Alarm(str(alarm)), protocol=protocol))
    with pytest.raises(InvalidModel):
        read_header(path)
    assert not alarm.exists()


def test_a_pytorch_archive_is_named_as_what_it_is(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([1]))
    with pytest.raises(InvalidModel, match="zip archive"):
        read_header(path)


def test_an_unfetched_large_file_is_named_as_what_it_is(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(InvalidModel, match="Git LFS"):
        read_header(path)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({**F16_PAIR, "data_offsets": [0, 8]}, "do not agree"),
        ({**F16_PAIR, "data_offsets": [4, 8]}, "do not agree"),
        ({**F16_PAIR, "data_offsets": [4, 0]}, "do not agree"),
        ({**F16_PAIR, "shape": [2, 2], "data_offsets": [0, 8]}, "cut short"),
        ({**F16_PAIR, "shape": [1], "data_offsets": [0, 2]}, "longer than"),
        ({**F16_PAIR, "dtype": "OBJECT"}, "type"),
        ({**F16_PAIR, "shape": [-2]}, "not valid"),
        ({**F16_PAIR, "shape": [10**400]}, "not valid"),
        ({**F16_PAIR, "shape": [1] * 17}, "dimensions"),
        ({**F16_PAIR, "shape": [1] * 1_000_000}, "not valid"),
        ({**F16_PAIR, "shape": [True, 2]}, "not valid"),
        ({**F16_PAIR, "extra": 1}, "not valid"),
        ({"dtype": "F16"}, "do not agree"),
        ({"shape": [4], "data_offsets": [0, 4]}, "type"),
        ([], "not valid"),
    ],
)
def test_a_tensor_that_lies_is_refused(path: Path, entry: object, reason: str) -> None:
    with pytest.raises(InvalidModel, match=reason):
        read_header(file_of(path, {"a": entry}))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"\xff" * 9,
        b'{"a\xff": 1}',
        b'{"a":' * 100_000,
        b"[" * 100_000,
        b'{"__metadata__": {"format": 1}}',
        b'{"__metadata__": []}',
        b'{"__metadata__": {"a": "b"}, "__metadata__": {}}',
        b"{" + b",".join(b'"%d":1' % number for number in range(1_000_000)) + b"}",
    ],
)
def test_a_header_that_is_not_json_of_the_right_form_is_refused(path: Path, text: bytes) -> None:
    with pytest.raises(InvalidModel, match="not valid"):
        read_header(file_of(path, text))


def test_overlapping_tensors_are_refused(path: Path) -> None:
    with pytest.raises(InvalidModel, match="do not agree"):
        read_header(file_of(path, {"a": F16_PAIR, "b": F16_PAIR}))


def test_a_file_without_tensors_is_refused(path: Path) -> None:
    with pytest.raises(InvalidModel, match="no tensors"):
        read_header(file_of(path, {}, b""))


def test_a_header_longer_than_its_file_is_refused(path: Path) -> None:
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(InvalidModel, match="cut short"):
        read_header(path)


def test_a_truncated_file_is_refused_at_every_length(path: Path) -> None:
    whole = file_of(path, {"a": F16_PAIR}).read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidModel):
            read_header(path)


def test_a_header_of_101_megabytes_is_refused_unread(path: Path) -> None:
    size = 101 * 2**20
    with path.open("wb") as file:
        file.write(size.to_bytes(8, "little"))
        file.truncate(size + 100)
    started = time.monotonic()
    with pytest.raises(InvalidModel, match="limit"):
        read_header(path)
    assert time.monotonic() - started < 0.1


def test_a_hundred_thousand_tensors_are_refused_within_a_second(path: Path) -> None:
    assert MAX_TENSORS < 100_000
    entry = json.dumps({**F16_PAIR, "shape": [0], "data_offsets": [0, 0]})
    text = "{" + ",".join(f'"tensor.{i}": {entry}' for i in range(100_000)) + "}"
    assert len(text) < MAX_HEADER_BYTES
    file_of(path, text.encode(), b"")
    started = time.monotonic()
    with pytest.raises(InvalidModel, match="more than"):
        read_header(path)
    assert time.monotonic() - started < 1


def test_a_named_pipe_does_not_hold_the_reader(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(InvalidModel, match="regular file"):
        read_header(path)


def test_a_folder_and_a_missing_file_are_refused_without_their_paths(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InvalidModel) as caught:
            read_header(path)
        assert str(tmp_path) not in str(caught.value)


@given(st.binary(max_size=300), st.integers(0, 300))
def test_any_bytes_are_read_or_refused_cleanly(text: bytes, data_bytes: int) -> None:
    # msgspec's errors are ValueErrors; read_header turns all of these into InvalidModel
    with contextlib.suppress(InvalidModel, UnicodeDecodeError, RecursionError, ValueError):
        parse_header(text, data_bytes)
