"""LoRAs merged in place, against stock Diffusers, and taken out again to the last bit."""

import copy
import functools
import gc
import json
import re

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.adapters import AdapterState, IncompatibleLora, adapter_key
from gpu_worker.failures import Refusal
from gpu_worker.lora_files import Factors, Lora, LoraFiles, load
from ipc.messages import Model
from tests.tools import stock, tiny_lora

FAMILIES = ("sd15", "sd21", "sdxl")
MODULES = ("unet", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipes():
    """A pipeline of each family whose weights every test leaves as they were."""
    return {family: stock.pipeline(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return {
        (family, layout, seed): tiny_lora.build_lora(
            folder / f"{family}-{layout}-{seed}.safetensors", family, layout, seed
        )
        for family in FAMILIES
        for layout in tiny_lora.LAYOUTS
        for seed in (1, 2)
    }


def model(path):
    return Model(name=path.name, path=str(path), single_file=True)


def modules(pipe):
    found = {name: getattr(pipe, name, None) for name in MODULES}
    return {name: module for name, module in found.items() if module is not None}


def state(pipe, **more):
    return AdapterState("tiny checkpoint", modules(pipe), **more)


def weights(pipe):
    return {
        f"{name}.{key}": value
        for name, module in modules(pipe).items()
        for key, value in module.state_dict().items()
    }


def copied(values):
    return {name: value.clone() for name, value in values.items()}


def equal(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[n], others[n]) for n in some)


def fused(pipe, paths_and_scales):
    """What stock Diffusers makes of LoRAs: a copy of the pipeline, fused."""
    pipe = copy.deepcopy(pipe)
    for index, (path, _) in enumerate(paths_and_scales):
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=f"a{index}")
    names = [f"a{index}" for index in range(len(paths_and_scales))]
    pipe.set_adapters(names, [scale for _, scale in paths_and_scales])
    pipe.fuse_lora(adapter_names=names)
    pipe.unload_lora_weights()
    return pipe


@pytest.mark.parametrize("layout", tiny_lora.LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_lora_gives_the_pictures_of_stock_diffusers(pipes, files, family, layout):
    pipe, path = pipes[family], files[family, layout, 1]
    plain = stock.latents(pipe)
    right = stock.latents(fused(pipe, [(path, 0.7)]))
    merged = state(pipe)
    merged.ensure([(load(model(path), pipe.unet), 0.7)])
    drawn = stock.latents(pipe)
    merged.restore()
    torch.testing.assert_close(drawn, right, rtol=1e-4, atol=1e-4)
    assert (drawn - plain).abs().max() > 0.01
    assert torch.equal(stock.latents(pipe), plain)


@pytest.mark.parametrize("layout", tiny_lora.LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_loras_give_the_weights_of_stock_diffusers(pipes, files, family, layout):
    pipe = pipes[family]
    scaled = [(files[family, layout, 1], 0.7), (files[family, "diffusers", 2], -0.4)]
    right = weights(fused(pipe, scaled))
    merged = state(pipe)
    merged.ensure([(load(model(path), pipe.unet), scale) for path, scale in scaled])
    mine = copied(weights(pipe))
    merged.restore()
    assert mine.keys() == right.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, right[name], rtol=1e-5, atol=1e-5, msg=name)
    plain = weights(pipe)
    changed = [name for name, value in mine.items() if not torch.equal(value, plain[name])]
    assert {name.split(".")[0] for name in changed} == set(modules(pipe))


def test_a_scale_is_that_of_cross_attention_kwargs(pipes, files):
    pipe, path = pipes["sdxl"], files["sdxl", "kohya", 1]
    unfused = copy.deepcopy(pipe)
    unfused.load_lora_weights(str(path.parent), weight_name=path.name)
    right = stock.latents(unfused, cross_attention_kwargs={"scale": 0.3})
    merged = state(pipe)
    merged.ensure([(load(model(path), pipe.unet), 0.3)])
    drawn = stock.latents(pipe)
    merged.restore()
    torch.testing.assert_close(drawn, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_layouts_of_a_lora_are_the_same_change(pipes, files, family):
    pipe, merged = pipes[family], state(pipes[family])
    seen = []
    for layout in tiny_lora.LAYOUTS:
        merged.ensure([(load(model(files[family, layout, 1]), pipe.unet), 1.0)])
        seen.append(copied(weights(pipe)))
    merged.restore()
    assert equal(*seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nothing_of_a_lora_is_left_and_no_storage_moves(files, dtype):
    pipe = stock.pipeline("sd15").to(dtype=dtype)
    before = copied(weights(pipe))
    places = {name: value.data_ptr() for name, value in weights(pipe).items()}
    merged = state(pipe)
    loras = [load(model(files["sd15", "kohya", seed]), pipe.unet) for seed in (1, 2)]
    for wanted in ([(loras[0], 1.0)], [(loras[1], 0.5)], [(loras[0], -1.0), (loras[1], 3.0)]):
        assert merged.ensure(wanted)
        assert not equal(weights(pipe), before)
    assert merged.restore()
    assert equal(weights(pipe), before)
    assert {name: value.data_ptr() for name, value in weights(pipe).items()} == places
    assert not merged._originals


def test_weights_with_channels_last_stay_so(pipes, files, tmp_path):
    pipe = stock.pipeline("sd15")
    pipe.unet.to(memory_format=torch.channels_last)
    before = copied(weights(pipe))
    path = tmp_path / "locon.safetensors"
    convolutions(path, {"down_blocks.0.resnets.0.conv1": 1.0, "conv_in": 3.0})
    merged, usual = state(pipe), state(pipes["sd15"])
    lora = load(model(path), pipe.unet)
    assert merged.ensure([(lora, 0.5)]) == usual.ensure([(lora, 0.5)])
    same = equal(weights(pipe), weights(pipes["sd15"]))
    usual.restore()
    assert same
    merged.restore()
    assert equal(weights(pipe), before)
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_half_precision_weights_are_the_rounded_sum_in_full_precision(files):
    pipe = stock.pipeline("sd15").to(dtype=torch.float16)
    full = copy.deepcopy(pipe).to(dtype=torch.float32)
    wanted = [(load(model(files["sd15", "diffusers", seed]), pipe.unet), 0.3) for seed in (1, 2)]
    state(pipe).ensure(wanted)
    state(full).ensure(wanted)
    rounded = {name: value.to(torch.float16) for name, value in weights(full).items()}
    mine = weights(pipe)
    assert all(torch.equal(mine[name], rounded[name]) for name in mine if "weight" in name)


def test_a_set_that_is_merged_already_is_not_merged_again(pipes, files):
    pipe = pipes["sd15"]
    one, two = (load(model(files["sd15", "kohya", seed]), pipe.unet) for seed in (1, 2))
    merged = state(pipe)
    assert not merged.ensure([])
    assert not merged.ensure([(one, 0.0)])
    assert merged.ensure([(one, 1.0), (two, 0.5)])
    assert not merged.ensure([(two, 0.5), (one, 1.0)])
    again = load(model(files["sd15", "kohya", 1]), pipe.unet)
    assert not merged.ensure([(two, 0.5), (again, 1.0)])
    assert merged.ensure([(one, 1.0), (two, 0.6)])
    assert merged.restore()
    assert not merged.restore()


def test_the_key_of_a_set_knows_no_order(pipes, files):
    unet = pipes["sd15"].unet
    one, two = (load(model(files["sd15", "kohya", seed]), unet) for seed in (1, 2))
    assert adapter_key([(one, 1.0), (two, 0.5)]) == adapter_key([(two, 0.5), (one, 1.0)])
    assert adapter_key([(one, 1.0)]) != adapter_key([(one, 0.9)])
    assert adapter_key([(one, 1.0)]) != adapter_key([(two, 1.0)])
    assert adapter_key([(one, 0.0)]) == ()


@pytest.mark.parametrize(("lora", "checkpoint"), [("sdxl", "sd15"), ("sd15", "sd21")])
@pytest.mark.parametrize("layout", tiny_lora.LAYOUTS)
def test_a_lora_of_another_family_is_refused_and_nothing_is_merged(
    pipes, files, lora, checkpoint, layout
):
    pipe, path = pipes[checkpoint], files[lora, layout, 1]
    before = copied(weights(pipe))
    merged = state(pipe)
    fitting = load(model(files[checkpoint, layout, 1]), pipe.unet)
    with pytest.raises(IncompatibleLora) as refusal:
        merged.ensure([(fitting, 1.0), (load(model(path), pipe.unet), 1.0)])
    assert refusal.value.code == "incompatible_model"
    assert refusal.value.field == "loras"
    assert refusal.value.detail.startswith(f"cannot use the LoRA {path.name} with tiny checkpoint")
    assert equal(weights(pipe), before)
    assert merged.merged == ()


@pytest.mark.parametrize("share_layers", [True, False])
def test_a_failure_in_the_middle_leaves_nothing_merged(pipes, files, share_layers):
    pipe = pipes["sd15"]
    before = copied(weights(pipe))
    merged = state(pipe)
    good, bad = (load(model(files["sd15", "kohya", seed]), pipe.unet) for seed in (1, 2))
    if not share_layers:
        del good.parts["text_encoder"], bad.parts["unet"]
    merged.ensure([(good, 1.0)])
    last = list(bad.parts["text_encoder"].values())[-1]
    object.__setattr__(last, "scale", None)
    with pytest.raises(TypeError):
        merged.ensure([(bad, 1.0)])
    assert equal(weights(pipe), before)
    assert merged.merged == ()


def test_untouched_weights_can_come_from_elsewhere(pipes, files):
    pipe = pipes["sdxl"]
    tier = copied(weights(pipe))
    asked = []

    def source(module, parameter):
        asked.append(f"{module}.{parameter}")
        return tier[f"{module}.{parameter}"]

    merged = state(pipe, source=source)
    merged.ensure([(load(model(files["sdxl", "kohya", 1]), pipe.unet), 1.0)])
    assert all(
        each.data_ptr() in {t.data_ptr() for t in tier.values()}
        for each in merged._originals.values()
    )
    merged.restore()
    assert equal(weights(pipe), tier)
    assert len(asked) == len(set(asked)) > 0


def test_forgotten_loras_are_not_taken_out_of_other_weights(files):
    pipe, other = stock.pipeline("sd15"), stock.pipeline("sd15", seed=1)
    merged = state(pipe)
    merged.ensure([(load(model(files["sd15", "kohya", 1]), pipe.unet), 1.0)])
    for name, module in modules(pipe).items():
        module.load_state_dict(getattr(other, name).state_dict())
    merged.forget()
    assert not merged.restore()
    assert equal(weights(pipe), weights(other))


def convolutions(path, alphas):
    """Kohya's layout with ranks and alphas of each layer's own, and kernels of 3 by 3 and 1."""
    unet = stock.pipeline("sd15").unet
    tensors = {}
    for index, (layer, alpha) in enumerate(alphas.items()):
        shape = unet.get_submodule(layer).weight.shape
        rank, name = index + 2, f"lora_unet_{layer.replace('.', '_')}"
        generator = torch.Generator().manual_seed(index)
        down = torch.randn(rank, *shape[1:], generator=generator)
        up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)


def test_convolutions_and_alphas_of_their_own_are_read(pipes, tmp_path):
    pipe = pipes["sd15"]
    alphas = {
        "down_blocks.0.resnets.0.conv1": 1.0,
        "down_blocks.0.downsamplers.0.conv": 3.0,
        "mid_block.resnets.0.time_emb_proj": 2.5,
        "down_blocks.0.attentions.0.proj_in": 2.0,
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 7.0,
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2": 5.0,
    }
    path = tmp_path / "locon.safetensors"
    convolutions(path, alphas)
    tensors = load_file(path)
    merged = state(pipe)
    merged.ensure([(load(model(path), pipe.unet), 0.5)])
    after = {layer: pipe.unet.get_submodule(layer).weight.clone() for layer in alphas}
    merged.restore()
    for layer, alpha in alphas.items():
        before = pipe.unet.get_submodule(layer).weight
        name = f"lora_unet_{layer.replace('.', '_')}"
        down, up = (tensors[f"{name}.lora_{each}.weight"] for each in ("down", "up"))
        change = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).reshape(before.shape)
        right = before + change * (0.5 * alpha / down.shape[0])
        torch.testing.assert_close(after[layer], right, rtol=1e-5, atol=1e-5)


def test_a_convolution_is_what_stock_diffusers_makes_of_it(pipes, tmp_path):
    pipe = pipes["sd15"]
    path = tmp_path / "locon.safetensors"
    convolutions(path, {"down_blocks.0.resnets.0.conv1": 1.0, "conv_in": 3.0})
    merged = state(pipe)
    right = weights(fused(pipe, [(path, 0.5)]))
    merged.ensure([(load(model(path), pipe.unet), 0.5)])
    mine = copied(weights(pipe))
    merged.restore()
    for name, value in mine.items():
        torch.testing.assert_close(value, right[name], rtol=1e-5, atol=1e-5, msg=name)


def test_alphas_in_the_header_are_read(pipes, files, tmp_path):
    """As `save_lora_weights` writes them with a LoRA that was trained with peft."""
    pipe = pipes["sd15"]
    path = tmp_path / "peft.safetensors"
    config = {
        "r": tiny_lora.RANK,
        "lora_alpha": 2 * tiny_lora.RANK,
        "alpha_pattern": {"attn1.to_q": tiny_lora.RANK},
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"],
    }
    named = {f"unet.{name}": value for name, value in config.items()}
    tensors = load_file(files["sd15", "diffusers", 1])
    trained = re.compile(r"unet\..*(to_[qkv]|to_out\.0|proj_in|proj_out)\.lora_[AB]\.weight")
    tensors = {name: tensor for name, tensor in tensors.items() if trained.fullmatch(name)}
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(named)})
    merged = state(pipe)
    right = weights(fused(pipe, [(path, 0.5)]))
    merged.ensure([(load(model(path), pipe.unet), 0.5)])
    mine = copied(weights(pipe))
    merged.restore()
    for name, value in mine.items():
        torch.testing.assert_close(value, right[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, "it holds nothing"),
        ({"a": torch.zeros(1)}, "of no module"),
        ({"transformer.x.lora_A.weight": torch.zeros(2, 2)}, "of no module"),
        ({"unet.x.lora_A.weight": torch.zeros(2, 2)}, "not a known one"),
        ({"unet.x.weight": torch.zeros(2, 2)}, "not part of a LoRA"),
        ({"lora_unet_x.hada_w1_a": torch.zeros(2, 2)}, "not a known one"),
        ({"lora_unet_x.dora_scale": torch.zeros(2)}, "DoRA is not supported"),
        (
            {
                "unet.x.lora_A.weight": torch.zeros(2, 4),
                "unet.x.lora_B.weight": torch.zeros(4, 3),
            },
            "ranks of x differ",
        ),
    ],
)
def test_a_file_of_another_kind_is_refused(pipes, tmp_path, tensors, reason):
    path = tmp_path / "strange.safetensors"
    save_file(tensors, path)
    with pytest.raises(Refusal, match=f"strange.safetensors: .*{reason}") as refusal:
        load(model(path), pipes["sd15"].unet)
    assert refusal.value.code == "invalid_model"


def test_a_pickle_is_refused_unopened(pipes, tmp_path):
    path = tmp_path / "evil.safetensors"
    torch.save({"unet.x.lora_A.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(Refusal, match="cannot read the LoRA"):
        load(model(path), pipes["sd15"].unet)


def test_a_denoiser_that_is_no_unet_takes_no_loras(files):
    with pytest.raises(Refusal, match="Stable Diffusion 1, 2 and XL take them") as refusal:
        LoraFiles().get(model(files["sd15", "kohya", 1]), torch.nn.Linear(2, 2))
    assert refusal.value.code == "not_supported"


def test_files_are_read_once_until_they_change(pipes, files, tmp_path):
    unet = pipes["sd15"].unet
    path = tmp_path / "style.safetensors"
    path.write_bytes(files["sd15", "kohya", 1].read_bytes())
    held = LoraFiles()
    first = held.get(model(path), unet)
    assert held.get(model(path), unet) is first
    path.unlink()
    path.write_bytes(files["sd15", "kohya", 2].read_bytes())
    second = held.get(model(path), unet)
    assert second is not first
    assert second.identity != first.identity


def test_factors_moved_into_one_piece_are_the_same():
    generator = torch.Generator().manual_seed(0)
    drawn = functools.partial(torch.randn, generator=generator)
    odd = Factors(drawn(3, 5).half(), drawn(7, 3).half(), 0.5)
    even = Factors(drawn(1, 3, 3, 3), drawn(2, 1, 1, 1), 2.0)
    parts = {"unet": {"odd": odd, "even": even}, "text_encoder": {"odd": odd}}
    moved = Lora("name", "identity", parts).in_one_piece(pinned=False)
    assert (moved.name, moved.identity) == ("name", "identity")
    assert {name: list(layers) for name, layers in moved.parts.items()} == {
        "unet": ["odd", "even"],
        "text_encoder": ["odd"],
    }
    storages = set()
    for module, layers in parts.items():
        for layer, factors in layers.items():
            other = moved.parts[module][layer]
            assert torch.equal(other.down, factors.down)
            assert torch.equal(other.up, factors.up)
            assert other.scale == factors.scale
            assert other.down.data_ptr() % other.down.element_size() == 0
            storages |= {each.untyped_storage().data_ptr() for each in (other.down, other.up)}
    assert len(storages) == 1


def test_a_file_tried_on_another_family_first_is_read_anew(pipes, files):
    held = LoraFiles()
    path = files["sdxl", "kohya", 1]
    with pytest.raises(IncompatibleLora):
        state(pipes["sd15"]).check([(held.get(model(path), pipes["sd15"].unet), 1.0)])
    state(pipes["sdxl"]).check([(held.get(model(path), pipes["sdxl"].unet), 1.0)])


def test_the_least_recently_used_files_are_dropped(pipes, files):
    unet = pipes["sd15"].unet
    one, two = (model(files["sd15", "kohya", seed]) for seed in (1, 2))
    three = model(files["sd15", "diffusers", 1])
    bytes_each = load(one, unet).bytes
    held = LoraFiles(max_bytes=2 * bytes_each)
    first, second = held.get(one, unet), held.get(two, unet)
    assert held.get(one, unet) is first
    held.get(three, unet)
    assert held.bytes == 2 * bytes_each
    assert held.get(one, unet) is first
    assert held.get(two, unet) is not second


def test_many_changes_leave_memory_flat(pipes, files):
    pipe, held = pipes["sd15"], LoraFiles(max_bytes=1)
    merged, process = state(pipe), psutil.Process()
    names = [files["sd15", layout, seed] for layout in tiny_lora.LAYOUTS for seed in (1, 2)]

    def change(count):
        for index in range(count):
            path = names[index % len(names)]
            merged.ensure([(held.get(model(path), pipe.unet), 0.5)])
        merged.restore()
        gc.collect()
        return process.memory_info().rss

    before = change(20)
    assert change(80) <= before * 1.01
