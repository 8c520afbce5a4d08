"""A MODEL_DIR for scripted workers: files that the supervisor accepts and nobody computes with."""

from pathlib import Path

from tests.tools import weights


def model_dir(root: Path) -> Path:
    """Checkpoints `sd15` and `sdxl`, the VAE `vae` among them as folders."""
    for family in ("sd15", "sdxl"):
        weights.files(root / "checkpoints" / family, weights.checkpoint_files(family))
    return root
