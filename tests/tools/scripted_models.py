"""A MODEL_DIR for scripted workers: files that the supervisor accepts and nobody computes with."""

from pathlib import Path

from tests.tools import weights


def model_dir(root: Path) -> Path:
    """Checkpoints `sd15`, `sdxl` and `some/group/nested`."""
    for name, family in (("sd15", "sd15"), ("sdxl", "sdxl"), ("some/group/nested", "sd15")):
        weights.files(root / "checkpoints" / name, weights.checkpoint_files(family))
    return root
