"""Prompts that a pipeline cannot read by itself, as embeddings: weighted, long, with clip_skip.

A prompt is plain when it holds none of Compel's operators or escapes and fits the text
encoder. Plain prompts, parentheses and quotes included, are left to the pipeline's own
encoding, letter for letter. Everything else goes through Compel, whose syntax is that
of its documentation: `(some words)1.2`, `word++`, `"some words"-`, `("a", "b").and()`,
`("a", "b").blend(1, 2)`, and `\\(` for a parenthesis that is only that.
"""

import inspect
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from compel import Compel, ReturnedEmbeddingsType
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

from gpu_worker.failures import Refusal
from gpu_worker.prompt_syntax import needs_compel, parsed

MAX_CHARACTERS = 5_000
"""Of a prompt that is not plain; operators throughout take the parser about three seconds."""


def encode(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments, with the texts replaced by embeddings where that is needed.

    To be called where the pipeline would call its text encoders; they are called as
    modules, nothing else. Stable Diffusion 1 and 2, SDXL and its refiner are known; the
    arguments of other pipelines come back as they are, and so do those of a call whose
    prompts are plain and whose clip_skip the pipeline can do by itself.

    As in Diffusers, clip_skip concerns the prompt, not the negative prompt; and where
    SDXL is given no negative prompt its embedding is zeros, if the pipeline's
    configuration says so, not that of an empty text. Raises Refusal.
    """
    encoders = _text_encoders(pipe)
    texts = {name: _text(arguments.get(name)) for name in TEXTS}
    if encoders is None or texts["prompt"] is None:
        return dict(arguments)
    clip_skip = _checked_clip_skip(encoders, arguments.get("clip_skip"))
    if not _is_concerned(encoders, texts, clip_skip):
        return dict(arguments)
    for field, text in texts.items():
        if text is not None:
            _check(field, text)
    kept = {name: value for name, value in arguments.items() if name not in REPLACED}
    accepted = inspect.signature(type(pipe).__call__).parameters
    embedded = _embeddings(pipe, encoders, texts, clip_skip or 0)
    return kept | {name: value for name, value in embedded.items() if name in accepted}


TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
REPLACED = {*TEXTS, "clip_skip"}


class TextEncoders(NamedTuple):
    """A pipeline's tokenizers and text encoders in order, and whether it is an SDXL."""

    pairs: list[tuple[Any, Any]]
    is_xl: bool


def _text_encoders(pipe: Any) -> TextEncoders | None:
    """None for a pipeline that reads prompts in a way of its own."""
    names = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
    both = [(getattr(pipe, first, None), getattr(pipe, second, None)) for first, second in names]
    pairs = [pair for pair in both if pair[1] is not None]
    kinds = [type(encoder).__name__ for _, encoder in pairs]
    if isinstance(pipe, StableDiffusionXLLoraLoaderMixin):
        known = kinds and kinds == ["CLIPTextModel", "CLIPTextModelWithProjection"][-len(kinds) :]
        return TextEncoders(pairs, is_xl=True) if known else None
    if isinstance(pipe, StableDiffusionLoraLoaderMixin) and kinds == ["CLIPTextModel"]:
        return TextEncoders(pairs, is_xl=False)
    return None


def _text(given: Any) -> str | None:
    if isinstance(given, list) and len(given) == 1:
        given = given[0]
    return given if isinstance(given, str) else None


def _checked_clip_skip(encoders: TextEncoders, clip_skip: int | None) -> int | None:
    layers = min(encoder.config.num_hidden_layers for _, encoder in encoders.pairs)
    if clip_skip is None or 0 <= clip_skip < layers:
        return clip_skip
    raise Refusal(
        "invalid_request",
        f"cannot skip {clip_skip} layers: this text encoder accepts 0 to {layers - 1}",
        "parameters.clip_skip",
    )


def _is_concerned(
    encoders: TextEncoders, texts: Mapping[str, str | None], clip_skip: int | None
) -> bool:
    if clip_skip is not None and not encoders.is_xl:
        # Since Transformers 5.6 a CLIPTextModel lacks what these pipelines use for it.
        return True
    given = [text for text in texts.values() if text is not None]
    return any(needs_compel(text) or _is_long(encoders, text) for text in given)


def _is_long(encoders: TextEncoders, text: str) -> bool:
    """Whether a prompt has more tokens than the text encoder reads (77 with both ends)."""
    return any(
        len(tokenizer(text).input_ids) > tokenizer.model_max_length
        for tokenizer, _ in encoders.pairs
    )


def _check(field: str, text: str) -> None:
    """Before any text encoder is called; the reading is kept."""
    if len(text) > MAX_CHARACTERS:
        raise Refusal(
            "invalid_request",
            f"cannot read the {field}: it has {len(text)} characters, {MAX_CHARACTERS} at most",
            f"parameters.{field}",
        )
    try:
        parsed(text)
    except Refusal as refusal:
        raise Refusal(refusal.code, refusal.detail, f"parameters.{field}") from refusal


def _embeddings(
    pipe: Any, encoders: TextEncoders, texts: Mapping[str, str | None], clip_skip: int
) -> dict[str, torch.Tensor]:
    """Embeddings of shape [1, tokens, channels] and pooled ones of shape [1, channels]."""
    prompt, negative = texts["prompt"] or "", texts["negative_prompt"] or ""
    read = Reading(encoders, [prompt, texts["prompt_2"] or prompt], clip_skip)
    against = Reading(encoders, [negative, texts["negative_prompt_2"] or negative], 0)
    chunks = max(read.chunks, against.chunks)
    named = {
        "prompt_embeds": read.embeddings(chunks),
        "negative_prompt_embeds": against.embeddings(chunks),
    }
    if read.pooled is not None and against.pooled is not None:
        named["pooled_prompt_embeds"] = read.pooled
        named["negative_pooled_prompt_embeds"] = against.pooled
        if texts["negative_prompt"] is None and pipe.config.force_zeros_for_empty_prompt:
            for name in ("negative_prompt_embeds", "negative_pooled_prompt_embeds"):
                named[name] = torch.zeros_like(named[name])
    if not all(torch.isfinite(value).all() for value in named.values()):
        detail = "cannot use the prompt's weights: they add up to nothing"
        raise Refusal("invalid_request", detail, "parameters.prompt")
    return named


class Reading:
    """What a pipeline's text encoders make of a text each.

    Set up as Compel's own CompelForSD and CompelForSDXL are, which know no clip_skip.
    """

    def __init__(self, encoders: TextEncoders, texts: Sequence[str], clip_skip: int) -> None:
        self.pooled: torch.Tensor | None = None
        self._parts: list[tuple[Any, torch.Tensor]] = []
        # The refiner, with its one text encoder, reads the first text.
        for (tokenizer, encoder), text in zip(encoders.pairs, texts, strict=False):
            is_last = encoder is encoders.pairs[-1][1]
            compel = _compel(tokenizer, Skipping(encoder, clip_skip), encoders.is_xl, is_last)
            embeddings = compel(text)
            if compel.requires_pooled:
                embeddings, self.pooled = embeddings
            self._parts.append((compel, embeddings))

    @property
    def chunks(self) -> int:
        """Length in pieces of 77 tokens."""
        return max(_chunks(*part) for part in self._parts)

    def embeddings(self, chunks: int) -> torch.Tensor:
        """Of all text encoders side by side, padded with empty texts to `chunks`."""
        return torch.cat([_padded(*part, chunks) for part in self._parts], dim=-1)


def _chunks(compel: Any, embeddings: torch.Tensor) -> int:
    return embeddings.shape[1] // int(compel.conditioning_provider.max_token_count)


def _padded(compel: Any, embeddings: torch.Tensor, chunks: int) -> torch.Tensor:
    missing = chunks - _chunks(compel, embeddings)
    empty = [compel.conditioning_provider.empty_z.to(embeddings)] * missing if missing else []
    return torch.cat([embeddings, *empty], dim=1)


def _compel(tokenizer: Any, encoder: "Skipping", is_xl: bool, is_last: bool) -> Any:
    compel = Compel(
        tokenizer=tokenizer,
        text_encoder=encoder,
        truncate_long_prompts=False,
        returned_embeddings_type=(
            ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
            if is_xl
            else ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED
        ),
        requires_pooled=is_xl and is_last,
    )
    compel.parse_prompt_string = parsed
    return compel


class Skipping:
    """A text encoder that stops `clip_skip` layers before its last, to be called as one.

    What Diffusers' `encode_prompt` does with `hidden_states[-(clip_skip + 1)]` and the
    final normalisation, wherever the installed Transformers keeps that.
    """

    def __init__(self, module: Any, clip_skip: int) -> None:
        self._module = module
        self._clip_skip = clip_skip
        self.device, self.dtype = module.device, module.dtype

    def __call__(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
        if not self._clip_skip:
            return self._module(input_ids, attention_mask=attention_mask, **options)
        options |= {"output_hidden_states": True}
        output = self._module(input_ids, attention_mask=attention_mask, **options)
        states = output.hidden_states[: -self._clip_skip]
        normalized = getattr(self._module, "text_model", self._module).final_layer_norm(states[-1])
        return SimpleNamespace(
            last_hidden_state=normalized,
            hidden_states=states,
            text_embeds=getattr(output, "text_embeds", None),
        )
