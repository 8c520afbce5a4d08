"""What trains the demo: the layouts that it learns from, their reader, and the export."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from scripts.demo_model import models
from scripts.demo_model.captions import known_words
from scripts.demo_model.companions import OUTLINE_FILE
from scripts.demo_model.export import export
from scripts.demo_model.latents import to_rows
from scripts.demo_model.layout import GRID, LayoutReader, Layouts, layouts, read_relations
from scripts.demo_model.questions import Question
from scripts.demo_model.render import palette, render
from scripts.demo_model.scenes import Scenes, sample_scenes
from scripts.demo_model.tokenizer import write_tokenizer
from scripts.demo_model.world import BACKGROUNDS, COLOUR_NAMES, NATIVE_SIZE, SHAPES

CPU = torch.device("cpu")
CELL = NATIVE_SIZE // GRID
WIDTH = 8
SURE = 20.0
"""A logit that leaves no doubt."""


class Knowing(LayoutReader):
    """Says what it was told, whatever it reads."""

    def __init__(self, told: Layouts, columns: Tensor) -> None:
        super().__init__(WIDTH)
        self.told, self.columns = told, columns

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        told = self.told[torch.arange(len(self.told.object))]
        present = SURE * (2 * told.object[..., None].float() - 1)
        cells = torch.cat((present, sure(told.colour, COLOUR_NAMES), sure(told.shape, SHAPES)), -1)
        grounds = (sure(ground, COLOUR_NAMES) for ground in told.ground.unbind(1))
        return cells[:, self.columns], torch.cat((sure(told.background, BACKGROUNDS), *grounds), -1)


class Blank(nn.Module):
    """An encoder that says nothing."""

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        return (torch.zeros(*tokens.shape, WIDTH),)


def sure(indices: Tensor, names: Any) -> Tensor:
    return SURE * nn.functional.one_hot(indices, len(names)).float()


AS_THEY_ARE = torch.arange(GRID * GRID)
TURNED = AS_THEY_ARE.flip(0)  # by half a turn: left is right, and above is below


@pytest.fixture(scope="module")
def pairs() -> Scenes:
    return sample_scenes(
        64, torch.Generator().manual_seed(3), held_out=True, objects=2, background="plain"
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return write_tokenizer(known_words(), tmp_path_factory.mktemp("tokenizer"))


def test_a_cell_holds_an_object_where_the_picture_shows_it(pairs: Scenes) -> None:
    seen = seen_in_cells(pairs)[..., 1:].sum(-1)
    held = layouts(pairs, CPU).object.bool()
    # A rim that just touches the circle inscribed in a cell may cover no pixel; one that stays out
    # of that circle covers corners only, 21 % of the cell.
    assert (seen[held] > 0).float().mean() > 0.99
    assert seen[~held].max() < 0.22


def test_a_cells_colour_and_shape_are_those_of_the_object_seen_there(pairs: Scenes) -> None:
    seen = seen_in_cells(pairs)[..., 1:]
    wanted = layouts(pairs, CPU)[torch.arange(len(pairs))]
    for which in (0, 1):
        # Shadows and rims mix the colours: a few pixels may look like the other object's.
        cells = (wanted.object == 1) & (seen[..., which] > 0.3) & (seen[..., 1 - which] < 0.1)
        rows = torch.nonzero(cells)[:, 0]
        assert len(rows) > 3 * len(pairs)
        assert torch.equal(wanted.colour[cells], pairs.colour[rows, which])
        assert torch.equal(wanted.shape[cells], pairs.shape[rows, which])


def test_a_layout_knows_its_background() -> None:
    scenes = sample_scenes(32, torch.Generator().manual_seed(4))
    wanted = layouts(scenes, CPU)
    assert torch.equal(wanted.background.long(), scenes.background)
    assert torch.equal(wanted.ground.long(), scenes.ground)


@pytest.mark.parametrize(("columns", "percent"), [(AS_THEY_ARE, 100), (TURNED, 0)])
def test_relations_are_read_as_the_reader_puts_the_objects(
    columns: Tensor, percent: float, pairs: Scenes, tokenizer: CLIPTokenizer
) -> None:
    questions = [Question("a red circle left of a blue ring", row, 0) for row in to_rows(pairs)]
    reader = Knowing(layouts(pairs, CPU), columns)
    assert read_relations(Blank(), reader, tokenizer, questions) == percent


def test_only_prompts_of_two_objects_are_asked_about(
    pairs: Scenes, tokenizer: CLIPTokenizer
) -> None:
    alone = to_rows(sample_scenes(5, torch.Generator().manual_seed(5), objects=1))
    questions = [Question("a heart", row, 0) for row in (*alone, *to_rows(pairs))]
    reader = Knowing(layouts(pairs, CPU), AS_THEY_ARE)  # as long as there are pairs
    assert read_relations(Blank(), reader, tokenizer, questions) == 100


def test_a_reader_that_knows_has_no_loss_and_one_that_errs_has(pairs: Scenes) -> None:
    told = layouts(pairs, CPU)
    wanted = told[torch.arange(len(pairs))]
    right, wrong = (Knowing(told, columns) for columns in (AS_THEY_ARE, TURNED))
    nothing = torch.zeros(len(pairs), 1, WIDTH)
    assert float(right.loss(nothing, wanted)) < 0.01
    assert float(wrong.loss(nothing, wanted)) > 5


def test_an_export_says_nothing_of_the_folder_it_was_made_in(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    untrained(work)
    export(work, out)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {path.relative_to(out).parts[0] for path in files} == {
        "checkpoint",
        "controlnet_edges",
        "outline_lora.safetensors",
        "vae_paper",
    }
    for path in files:
        assert str(tmp_path).encode() not in path.read_bytes(), path
        assert b"_name_or_path" not in path.read_bytes(), path
    assert DiffusionPipeline.from_pretrained(out / "checkpoint").unet.dtype == torch.float32


def untrained(work: Path) -> None:
    """Leaves what the stages leave, with random weights."""
    tokenizer = write_tokenizer(known_words(), work / "tokenizer")
    unet, vae = models.new_unet(), models.new_autoencoder()
    unet.save_pretrained(work / "diffusion" / "unet")
    models.new_text_encoder(tokenizer).save_pretrained(work / "diffusion" / "text_encoder")
    vae.save_pretrained(work / "autoencoder")
    vae.save_pretrained(work / "paper")
    models.new_controlnet(unet).save_pretrained(work / "edges")
    (work / "outline").mkdir()
    save_file({"unet.lora": torch.zeros(2, 2)}, work / "outline" / OUTLINE_FILE)


def seen_in_cells(scenes: Scenes) -> Tensor:
    """The shares of each cell's pixels in the colour of ground, first and second: [N, cells, 3]."""
    pixels = render(scenes).movedim(1, -1)
    present = torch.cat((scenes.ground[:, :1], scenes.colour), 1)
    colours = palette()[present][:, None, None]
    nearest = (pixels[..., None, :] - colours).norm(dim=-1).argmin(-1)
    cells = nearest.reshape(len(scenes), GRID, CELL, GRID, CELL).transpose(2, 3).flatten(3)
    return nn.functional.one_hot(cells.flatten(1, 2), 3).float().mean(2)
