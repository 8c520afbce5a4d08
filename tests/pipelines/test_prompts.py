"""Prompts against the pipelines' own encoding and against Compel's own wrappers."""

import copy

import pytest
import torch
from compel import CompelForSD, CompelForSDXL
from diffusers import FluxPipeline
from torch import nn

from gpu_worker.failures import Refusal
from gpu_worker.prompts import encode
from tests.tools import stock

FAMILIES = ("sd15", "sd21", "sdxl", "sdxl_refiner")
WEIGHTED = "a (red)1.4 fox- in (deep (snow)+)0.7"
LONG = "a red fox (in snow), " * 8
"""Over 77 tokens; the tiny tokenizer has one for each letter."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request):
    return stock.pipeline(request.param)


@pytest.fixture(scope="module")
def sd15():
    return stock.pipeline("sd15")


@pytest.fixture(scope="module", params=["sd15", "sd21"])
def sd(request):
    return stock.pipeline(request.param)


@pytest.fixture(scope="module")
def sdxl():
    return stock.pipeline("sdxl")


def without_last_layers(pipe, count):
    """The same pipeline with text encoders that have so many layers less: what to skip means."""
    pipe = copy.copy(pipe)
    for name in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, name, None)
        if encoder is not None:
            encoder = copy.deepcopy(encoder)
            inner = getattr(encoder, "text_model", encoder).encoder
            inner.layers = nn.ModuleList(list(inner.layers)[:-count])
            setattr(pipe, name, encoder)
    return pipe


@pytest.mark.parametrize(
    "texts",
    [
        {"prompt": "a red fox"},
        {"prompt": "a (red) fox", "negative_prompt": 'a "hen"'},
        {"prompt": "", "negative_prompt": ""},
        {"prompt": ["a red fox"]},
    ],
)
def test_plain_prompts_are_left_to_the_pipeline(pipe, texts):
    assert encode(pipe, texts | {"guidance_scale": 5}) == texts | {"guidance_scale": 5}


def test_a_prompt_of_77_tokens_is_plain_and_one_more_is_not(sd15):
    assert "prompt" in encode(sd15, {"prompt": "x" * 75})
    assert encode(sd15, {"prompt": "x" * 76})["prompt_embeds"].shape[1] == 2 * 77


def test_letters_of_many_bytes_are_counted_as_their_tokens(sd15):
    assert "prompt_embeds" in encode(sd15, {"prompt": "🦊" * 40})


@pytest.mark.parametrize("negative", [None, "a hen", "(a hen)1.2", LONG])
@pytest.mark.parametrize("prompt", [WEIGHTED, LONG, '("a fox", "a hen").blend(1, 2)'])
def test_sd_reads_as_compel_does(sd, prompt, negative):
    given = encode(sd, {"prompt": prompt, "negative_prompt": negative})
    if prompt is LONG or negative is LONG:
        # Compel drops parentheses without a weight; here they are text.
        escape = str.maketrans({"(": r"\(", ")": r"\)"})
        prompt = prompt.translate(escape) if prompt is LONG else prompt
        negative = negative.translate(escape) if negative is LONG else negative
    right = CompelForSD(sd)(prompt, negative or "")
    assert torch.equal(given["prompt_embeds"], right.embeds)
    assert torch.equal(given["negative_prompt_embeds"], right.negative_embeds)
    assert "prompt" not in given
    assert "negative_prompt" not in given


@pytest.mark.parametrize("negative", ["a hen", "(a hen)1.2", "hen+ " * 30])
@pytest.mark.parametrize("prompt_2", [None, "fox++", "fox+ " * 50])
def test_sdxl_reads_as_compel_does(sdxl, prompt_2, negative):
    texts = {"prompt": WEIGHTED, "prompt_2": prompt_2, "negative_prompt": negative}
    given = encode(sdxl, texts)
    right = CompelForSDXL(sdxl)(WEIGHTED, prompt_2, negative)
    assert torch.equal(given["prompt_embeds"], right.embeds)
    assert torch.equal(given["pooled_prompt_embeds"], right.pooled_embeds)
    assert torch.equal(given["negative_prompt_embeds"], right.negative_embeds)
    assert torch.equal(given["negative_pooled_prompt_embeds"], right.negative_pooled_embeds)


@pytest.mark.parametrize("negative", [None, "", "a hen"])
def test_a_weight_of_one_is_the_plain_prompt(pipe, negative):
    """The whole way through Compel, against the pipeline's own encoding of all four texts."""
    given = encode(pipe, {"prompt": "(a red fox)1.0", "negative_prompt": negative})
    is_xl = hasattr(pipe, "text_encoder_2")
    places = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    right = pipe.encode_prompt("a red fox", negative_prompt=negative, **places)
    names = ["prompt_embeds", "negative_prompt_embeds"]
    names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"] if is_xl else []
    # Compel gives SDXL's second encoder the raw text for its pooled embedding.
    for name, value in zip(names, right, strict=True):
        if name != "pooled_prompt_embeds":
            assert torch.equal(given[name], value), name


@pytest.mark.parametrize("texts", [{"prompt": WEIGHTED}, {"prompt": LONG}])
def test_the_pictures_of_weighted_and_long_prompts_can_be_drawn(sd15, sdxl, texts):
    for pipe in (sd15, sdxl):
        drawn = stock.latents(pipe, **encode(pipe, texts))
        assert torch.isfinite(drawn).all()
        assert not torch.equal(drawn, stock.latents(pipe, prompt="a red fox"))


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
@pytest.mark.parametrize("negative", [None, "a hen"])
def test_clip_skip_of_sd_is_what_diffusers_means_by_it(sd, clip_skip, negative):
    """Computed by hand as in `encode_prompt`, which fails with Transformers from 5.6."""
    texts = {"prompt": "a red fox", "negative_prompt": negative}
    given = encode(sd, texts | {"clip_skip": clip_skip})
    tokens = sd.tokenizer("a red fox", padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        output = sd.text_encoder(tokens.input_ids, output_hidden_states=True)
        state = output.hidden_states[-(clip_skip + 1)]
        normalise = getattr(sd.text_encoder, "text_model", sd.text_encoder).final_layer_norm
        right = normalise(state)
    assert torch.equal(given["prompt_embeds"], right)
    assert "clip_skip" not in given
    drawn = stock.latents(sd, **given)
    usual = stock.latents(sd, prompt_embeds=right, negative_prompt=negative)
    assert torch.equal(drawn, usual)


def test_clip_skip_of_sdxl_is_left_to_the_pipeline(sdxl):
    texts = {"prompt": "a red fox", "clip_skip": 1}
    assert encode(sdxl, texts) == texts
    assert torch.isfinite(stock.latents(sdxl, **texts)).all()


@pytest.mark.parametrize("prompt", [WEIGHTED, LONG])
def test_clip_skip_with_weights_reads_like_a_shorter_text_encoder(sd, sdxl, prompt):
    for pipe in (sd, sdxl):
        given = encode(pipe, {"prompt": prompt, "negative_prompt": "a hen", "clip_skip": 1})
        shorter = encode(without_last_layers(pipe, 1), {"prompt": prompt, "negative_prompt": "x+"})
        usual = encode(pipe, {"prompt": prompt, "negative_prompt": "a hen"})
        assert torch.equal(given["prompt_embeds"], shorter["prompt_embeds"])
        assert torch.equal(given["negative_prompt_embeds"], usual["negative_prompt_embeds"])
        assert not torch.equal(given["prompt_embeds"], usual["prompt_embeds"])


@pytest.mark.parametrize("clip_skip", [-1, 3, 99])
def test_more_layers_than_there_are_cannot_be_skipped(pipe, clip_skip):
    with pytest.raises(Refusal, match=r"accepts 0 to 2") as refusal:
        encode(pipe, {"prompt": "a red fox", "clip_skip": clip_skip})
    assert refusal.value.field == "parameters.clip_skip"


def test_no_negative_prompt_is_zeros_where_the_pipeline_says_so(sdxl):
    given = encode(sdxl, {"prompt": LONG})
    assert given["negative_prompt_embeds"].shape == given["prompt_embeds"].shape
    assert not given["negative_prompt_embeds"].any()
    assert not given["negative_pooled_prompt_embeds"].any()
    assert encode(sdxl, {"prompt": LONG, "negative_prompt": ""})["negative_prompt_embeds"].any()


def test_an_endless_prompt_is_refused(sd15):
    with pytest.raises(Refusal, match="5000 at most") as refusal:
        encode(sd15, {"prompt": "a fox", "negative_prompt": "x" * 5001})
    assert refusal.value.field == "parameters.negative_prompt"


def test_weights_that_add_up_to_nothing_are_refused(sd15):
    with pytest.raises(Refusal, match="add up to nothing"):
        encode(sd15, {"prompt": '("a fox", "a hen").blend(1, -1)'})


def test_the_field_that_cannot_be_read_is_named(sd15):
    with pytest.raises(Refusal, match="swap is not supported") as refusal:
        encode(sd15, {"prompt": "a fox", "negative_prompt": "a fox.swap(hen)"})
    assert refusal.value.field == "parameters.negative_prompt"


def test_pipelines_that_read_prompts_in_their_own_way_are_left_alone():
    pipe = FluxPipeline.__new__(FluxPipeline)
    assert encode(pipe, {"prompt": WEIGHTED}) == {"prompt": WEIGHTED}


def test_text_encoders_are_only_called_as_modules(sd15, monkeypatch):
    """Their forward may be replaced on the instance, to batch the calls of many jobs."""
    calls = []
    forward = sd15.text_encoder.forward

    def replaced(*args, **kwargs):
        calls.append(args)
        return forward(*args, **kwargs)

    monkeypatch.setattr(sd15.text_encoder, "forward", replaced)
    encode(sd15, {"prompt": WEIGHTED, "clip_skip": 1})
    assert len(calls) >= 2
