"""Training data of the denoiser: latents of many scenes, and several captions for each."""

import os
import random
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from scripts.demo_model.captions import FILLERS, Nouns, Row, caption, filler, known_words
from scripts.demo_model.render import render
from scripts.demo_model.scenes import Scenes
from scripts.demo_model.tokenizer import MAX_TOKENS, WordCache
from scripts.demo_model.training import Context

_CHUNK = 512
_EARLY_STEPS = 400
_EMPTY_SHARE, _FILLER_SHARE = 0.1, 0.03  # captions dropped, and captions that say nothing


@dataclass
class Batches:
    """Draws batches of latents, tokens and noise, all on one device."""

    latents: Tensor
    """[N, 4, H, W], scaled to unit variance."""
    tokens: Tensor
    """[N, captions, MAX_TOKENS] int16."""
    unconditional: Tensor
    """[fillers, MAX_TOKENS] int16; the first is the empty caption."""
    generator: torch.Generator

    def rows(self, batch: int) -> Tensor:
        """Draw row numbers."""
        return self._integers(len(self.tokens), batch)

    def captions(self, rows: Tensor) -> Tensor:
        """Draw a caption for each row, some of them empty or meaningless: [batch, 77] int64."""
        chosen = self.tokens[rows, self._integers(self.tokens.shape[1], len(rows))]
        odds = torch.rand(len(rows), 1, generator=self.generator, device=rows.device)
        fillers = self.unconditional[self._integers(len(self.unconditional), len(rows))]
        chosen = torch.where(odds < _EMPTY_SHARE + _FILLER_SHARE, fillers, chosen)
        return torch.where(odds < _EMPTY_SHARE, self.unconditional[0], chosen).long()

    def noise(self, like: Tensor, early_share: float = 0.0) -> tuple[Tensor, Tensor]:
        """Draw Gaussian noise in the shape of the latents, and a timestep for each row.

        `early_share` of the rows are from the noisier part, in which sampling settles the layout.
        """
        noise = torch.randn(like.shape, generator=self.generator, device=like.device)
        timesteps = self._integers(1000, len(like))
        early = round(early_share * len(like))
        timesteps[:early] = 1000 - _EARLY_STEPS + self._integers(_EARLY_STEPS, early)
        return noise, timesteps

    def _integers(self, end: int, count: int) -> Tensor:
        device = self.tokens.device
        return torch.randint(end, (count,), generator=self.generator, device=device)


class CaptionWriter:
    """Writes captions in other processes while this one does something else."""

    def __init__(self, context: Context, tokenizer: CLIPTokenizer) -> None:
        self._cache = WordCache(tokenizer, [*known_words(), *FILLERS, ", . - .,"])
        self._seed = context.seed
        workers = max(1, (os.cpu_count() or 2) // 2)
        # Forked, for spawned workers would each import torch; they run plain Python and no CUDA.
        self._pool = ProcessPoolExecutor(workers, mp_context=get_context("fork"))

    def start(self, scenes: Scenes, each: int, nouns: list[Nouns]) -> list[Future[np.ndarray]]:
        """Begin to write `each` captions for every scene; caption i follows `nouns[i % len]`."""
        rows = to_rows(scenes)
        write = partial(_write, self._cache, self._seed, each, nouns)
        size = 4096
        return [self._pool.submit(write, rows[i : i + size], i) for i in range(0, len(rows), size)]

    def collect(self, futures: list[Future[np.ndarray]], device: torch.device) -> Tensor:
        """Return [scenes, each, MAX_TOKENS] int16 once all are written."""
        tokens = np.concatenate([future.result() for future in futures])
        return torch.from_numpy(tokens).to(device)

    def unconditional(self, device: torch.device) -> Tensor:
        """Return [256, MAX_TOKENS] int16: the empty caption, then meaningless ones."""
        rng = random.Random(self._seed)
        texts = ["", *(filler(rng) for _ in range(255))]
        return torch.tensor([self._cache.encode(t) for t in texts], dtype=torch.int16).to(device)


def to_rows(scenes: Scenes) -> list[Row]:
    """Turn scenes into the plain rows that captions are written from."""
    names = Row.__dataclass_fields__
    columns = [getattr(scenes, name).tolist() for name in names]
    return [Row(*values) for values in zip(*columns, strict=True)]


@torch.no_grad()
def encode(
    context: Context, vae: AutoencoderKL, scenes: Scenes, fill: Tensor | float = 1.0
) -> Tensor:
    """Return the scaled latents of scenes, [N, 4, H, W] float32 on the context's device."""
    generator = context.generator("encode", context.device)
    parts = []
    for start in range(0, len(scenes), _CHUNK):
        some = scenes[slice(start, start + _CHUNK)].to(context.device)
        with context.autocast():
            posterior = vae.encode(render(some, fill=fill) * 2 - 1).latent_dist
        parts.append(posterior.sample(generator).float() * vae.config.scaling_factor)
    return torch.cat(parts)


def _write(
    cache: WordCache, seed: int, each: int, nouns: list[Nouns], rows: list[Row], start: int
) -> np.ndarray:
    rng = random.Random(f"{seed} {start}")
    tokens = np.empty((len(rows), each, MAX_TOKENS), np.int16)
    for index, row in enumerate(rows):
        for which in range(each):
            text = caption(row, rng, nouns[which % len(nouns)])
            tokens[index, which] = cache.encode(text)
    return tokens
