"""How to spoil the MODEL_DIR of tests/unit/conftest.py, and what is then said."""

import json
from pathlib import Path
from typing import Any

import pytest

from supervisor.errors import Problem
from supervisor.families import Kind
from supervisor.models import Models

LORA = {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 768)}


def refusal(models: Models, kind: Kind, name: str) -> Problem:
    with pytest.raises(Problem) as caught:
        models.resolve(kind, name)
    assert "/models" not in caught.value.detail
    return caught.value


def broken(root: Path, changes: dict[str, Any], family: str = "sd15") -> None:
    """Change files of the checkpoint: None removes one, bytes replace it, else JSON."""
    for name, content in changes.items():
        path = root / "checkpoints" / family / name
        path.parent.mkdir(exist_ok=True)
        if content is None:
            path.unlink()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(json.dumps(content))
