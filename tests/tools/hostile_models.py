"""A MODEL_DIR full of traps: pickles in disguise, broken headers, code, links that lead out."""

import json
import pickle
import struct
from pathlib import Path
from typing import Any

from tests.tools import weights

KINDS = {"checkpoint": "checkpoints", "vae": "vae", "lora": "lora", "controlnet": "controlnet"}
BROKEN = (
    "pickle.safetensors",
    "pickle.ckpt",
    "pickle.bin",
    "pickle",
    "zip.safetensors",
    "truncated.safetensors",
    "long-header.safetensors",
    "huge-header.safetensors",
    "many-tensors.safetensors",
    "overlapping.safetensors",
    "outside.safetensors",
    "deep-header.safetensors",
    "no-json.safetensors",
    "empty.safetensors",
)
"""Files that are there in each kind's folder, and that nobody may use."""
FORBIDDEN = (
    "../secret",
    "../checkpoints-of-others/sd15",
    "..%2fsecret",
    "%2e%2e/secret",
    "./good",
    "good/",
    "/good",
    "good/../good",
    "a/../../secret",
    "..\\secret",
    "good\0",
    "good\n",
    "x" * 300,
    "x/" * 200 + "x",
    "\u202egood",
    "link-out",
    "link-to-root",
    ".hidden",
    "~root",
    "file:///etc/hostname",
    "http://127.0.0.1:9/a",
    "//127.0.0.1/share",
    "C:\\models",
    "${HOME}",
)
"""Names that lead nowhere, or out of the folder."""


class Explosive:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def build(root: Path, mark: Path) -> Path:
    """`mark` is the file that appears when any of the code in it is run; MODEL_DIR is returned."""
    models = root / "models"
    for folder in KINDS.values():
        (models / folder).mkdir(parents=True)
        for name in BROKEN:
            (models / folder / name).write_bytes(content(name, mark))
    good = weights.checkpoint_files("sd15")
    weights.files(models / "checkpoints" / "good", good)
    weights.files(models / "checkpoints" / ".hidden", good)
    weights.files(models / "secret", good)
    weights.files(root / "checkpoints-of-others" / "sd15", good)
    weights.files(models / "checkpoints-of-others" / "sd15", good)
    weights.files(root / "outside" / "sd15", good)
    for folder in KINDS.values():
        (models / folder / "link-out").symlink_to(root / "outside" / "sd15")
        (models / folder / "link-to-root").symlink_to("/")
    remote_code(models / "checkpoints", mark)
    pickled_folder(models / "checkpoints" / "pickled", mark)
    return models


def content(name: str, mark: Path) -> bytes:
    if name.startswith("pickle"):
        return pickle.dumps(Explosive(mark))
    match name.removesuffix(".safetensors"):
        case "zip":  # what torch.save writes
            return b"PK\x03\x04" + bytes(100) + pickle.dumps(Explosive(mark))
        case "truncated":
            return framed({"a": tensor(0, 8)})[:-4]
        case "long-header":
            return struct.pack("<Q", 10_000) + b'{"a":'
        case "huge-header":
            return struct.pack("<Q", 101 * 2**20) + b"{" + b" " * (101 * 2**20 - 2) + b"}"
        case "many-tensors":
            return framed({f"t{i}": tensor(0, 0, (0,)) for i in range(100_001)})
        case "overlapping":
            return framed({"a": tensor(0, 8), "b": tensor(4, 12)}, 12)
        case "outside":
            return framed({"a": tensor(0, 2**60, (2**58,))})
        case "deep-header":
            return struct.pack("<Q", 200_000) + b"[" * 200_000
        case "no-json":
            return struct.pack("<Q", 16) + b"\xff" * 16
    return b""


def tensor(begin: int, end: int, shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def framed(header: dict[str, Any], size: int = 8) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def remote_code(checkpoints: Path, mark: Path) -> None:
    """Folders that would run code of their own where remote code is trusted."""
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
    good = weights.checkpoint_files("sd15")
    for name, index in {
        "own-pipeline": {"_class_name": ["pipeline", "OwnPipeline"]},
        "own-pipeline-name": {"_class_name": "OwnPipeline"},
        "own-unet": {"unet": ["unet", "OwnModel"]},
        "own-module": {"vae": ["os", "system"]},
    }.items():
        folder = weights.files(checkpoints / name, good)
        whole = good["model_index.json"] | index
        (folder / "model_index.json").write_text(json.dumps(whole))
        for place in ("pipeline.py", "unet.py", "unet/unet.py", "vae/vae.py"):
            (folder / place).write_text(code)


def pickled_folder(folder: Path, mark: Path) -> None:
    """A checkpoint whose UNet is there as a pickle alone."""
    weights.files(folder, weights.checkpoint_files("sd15"))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Explosive(mark)))
