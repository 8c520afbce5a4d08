"""Downloads from a hub on this machine: which files, how often, and what faults lead to."""

import errno
import json
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from supervisor.errors import Problem
from supervisor.headers import InvalidModel
from supervisor.hub import CONFIG_REPOS, Hub
from supervisor.models import Models
from supervisor.settings import Settings
from tests.tools import local_hub, weights
from tests.tools.local_hub import LocalHub
from tests.tools.weights import files, safetensors

UNET = "unet/diffusion_pytorch_model"


@pytest.fixture
def hub_server(tmp_path: Path) -> Iterator[LocalHub]:
    with local_hub.running() as server:
        folder = files(tmp_path / "repo", weights.checkpoint_files("sd15"))
        extra = {"README.md": None, "feature.py": None, ".gitattributes": None, "unet/run.py": None}
        files(folder, extra)
        (folder / "v1-5-pruned.ckpt").write_bytes(pickle.dumps([1]))
        (folder / f"{UNET}.bin").write_bytes(pickle.dumps([1]))
        safetensors(folder / f"{UNET}.fp16.safetensors", {"weight": (2, 1)})
        safetensors(folder / "v1-5-pruned.safetensors", {"weight": (2, 2)})
        server.repos["org/model"] = folder
        yield server


def settings_for(tmp_path: Path, **changes: object) -> Settings:
    return Settings(model_dir=tmp_path / "models", data_dir=tmp_path / "data", **changes)  # type: ignore[arg-type]


@pytest.fixture
def hub(tmp_path: Path, hub_server: LocalHub) -> Hub:
    return Hub(settings_for(tmp_path), endpoint=hub_server.endpoint)


def downloaded(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_the_files_that_the_pipeline_needs_are_downloaded(hub: Hub) -> None:
    folder = hub.fetch("checkpoint", "org/model")
    assert downloaded(folder) == set(weights.checkpoint_files("sd15"))


def test_half_precision_is_preferred_where_it_is_wanted(
    tmp_path: Path, hub_server: LocalHub
) -> None:
    hub = Hub(settings_for(tmp_path), half=True, endpoint=hub_server.endpoint)
    found = downloaded(hub.fetch("checkpoint", "org/model"))
    assert f"{UNET}.fp16.safetensors" in found
    assert f"{UNET}.safetensors" not in found


def test_a_downloaded_model_resolves_and_is_checked_like_any_other(
    tmp_path: Path, hub: Hub
) -> None:
    found = Models(settings_for(tmp_path), hub).resolve("checkpoint", "org/model")
    assert found.model.family == "sd15"
    assert found.model.name == "org/model"
    assert Path(found.model.path).is_relative_to(tmp_path / "data" / "cache" / "hub")


def test_what_is_there_is_used_without_asking_again(
    tmp_path: Path, hub: Hub, hub_server: LocalHub
) -> None:
    first = hub.fetch("checkpoint", "org/model@v1")
    hub_server.asked.clear()
    restarted = Hub(settings_for(tmp_path), endpoint="http://127.0.0.1:9")
    assert restarted.fetch("checkpoint", "org/model@v1") == first
    assert not hub_server.asked


def test_what_a_killed_server_left_half_downloaded_is_swept_away(
    tmp_path: Path, hub: Hub, hub_server: LocalHub
) -> None:
    folder = hub.fetch("checkpoint", "org/model")
    left = folder.parent.parent / "blobs" / "abc.123.incomplete"
    left.touch()
    Hub(settings_for(tmp_path), endpoint=hub_server.endpoint)
    assert not left.exists()


def test_a_file_that_was_evicted_is_downloaded_again(hub: Hub, hub_server: LocalHub) -> None:
    folder = hub.fetch("checkpoint", "org/model")
    gone = folder / f"{UNET}.safetensors"
    gone.resolve().unlink()
    gone.unlink()
    hub_server.asked.clear()
    hub.fetch("checkpoint", "org/model")
    assert gone.is_file()
    assert hub_server.asked[f"GET {UNET}.safetensors"] == 1


def test_concurrent_requests_share_one_download(hub: Hub, hub_server: LocalHub) -> None:
    hub_server.gate.clear()
    begun = threading.Barrier(9)

    def fetch() -> Path:
        begun.wait(10)
        return hub.fetch("checkpoint", "org/model")

    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(fetch) for _ in range(8)]
        begun.wait(10)
        hub_server.gate.set()
        assert len({future.result(30) for future in waiting}) == 1
    assert hub_server.asked["API"] == 1
    assert hub_server.asked[f"GET {UNET}.safetensors"] == 1


def test_a_drop_in_mid_file_is_taken_up_where_it_stopped(hub: Hub, hub_server: LocalHub) -> None:
    name = "vae/diffusion_pytorch_model.safetensors"
    source = safetensors(hub_server.repos["org/model"] / name, {"weight": (6000, 1000)})
    hub_server.drop_once[name] = 11_000_000
    folder = hub.fetch("checkpoint", "org/model")
    assert (folder / name).read_bytes() == source.read_bytes()
    assert hub_server.ranges == [f"{name} {10 * 2**20}"]  # the library keeps pieces of 10 MB


@pytest.mark.parametrize(
    "name",
    ["org/missing", "org/gated", "org/model@nowhere", "org/model@../x", "../org", "org/../model",
     "org", "org/model/unet", "http://127.0.0.1/x", "org/model?x", "-/x", ""],
)  # fmt: skip
def test_what_the_hub_does_not_give_is_unknown(hub: Hub, hub_server: LocalHub, name: str) -> None:
    hub_server.gated.add("org/gated")
    with pytest.raises(Problem) as caught:
        hub.fetch("checkpoint", name)
    assert caught.value.code == "unknown_model"


def test_a_repository_that_is_not_allowed_is_never_asked_for(
    tmp_path: Path, hub_server: LocalHub
) -> None:
    settings = settings_for(tmp_path, hub_allow=("other/*", "org/mod"))
    with pytest.raises(Problem) as caught:
        Hub(settings, endpoint=hub_server.endpoint).fetch("checkpoint", "org/model")
    assert caught.value.code == "unknown_model"
    assert not hub_server.asked


def test_a_hub_that_cannot_be_reached_is_said_and_then_left_alone(tmp_path: Path) -> None:
    hub = Hub(settings_for(tmp_path), endpoint="http://127.0.0.1:9")
    problems = []
    for _ in range(2):
        with pytest.raises(Problem) as caught:
            hub.fetch("checkpoint", "org/model")
        problems.append(caught.value)
    assert problems[0].code == "unavailable"
    assert problems[0].retry_after
    assert problems[1] is problems[0]


def test_a_full_disk_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*told: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(hub, "_download_files", full)
    with pytest.raises(Problem) as caught:
        hub.fetch("checkpoint", "org/model")
    assert caught.value.code == "storage_full"


def test_downloads_leave_threads_for_the_rest_of_the_server(
    hub: Hub, hub_server: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_waiting", threading.Semaphore(0))
    with pytest.raises(Problem) as caught:
        hub.fetch("checkpoint", "org/model")
    assert (caught.value.code, caught.value.retry_after) == ("unavailable", 10)


def test_missing_configurations_are_named_when_the_hub_does_not_give_them(
    tmp_path: Path, hub: Hub
) -> None:
    shapes = weights.single_file_shapes("sd21")
    safetensors(tmp_path / "models" / "checkpoints" / "one.safetensors", shapes)
    with pytest.raises(Problem) as caught:
        Models(settings_for(tmp_path), hub).resolve("checkpoint", "one.safetensors")
    assert caught.value.code == "invalid_model"
    assert "configs/sd21/unet/config.json" in caught.value.detail


def test_a_pipeline_with_code_of_its_own_is_refused_before_its_weights(
    hub: Hub, hub_server: LocalHub
) -> None:
    index = weights.model_index("sd15") | {"unet": ["my_unet", "MyUNet"]}
    path = hub_server.repos["org/model"] / "model_index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(InvalidModel, match="outside Diffusers"):
        hub.fetch("checkpoint", "org/model")
    assert not any(name.endswith(".safetensors") for name in hub_server.asked)


def test_a_pipeline_in_pickles_is_refused_before_its_weights(
    hub: Hub, hub_server: LocalHub
) -> None:
    (hub_server.repos["org/model"] / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InvalidModel, match="no safetensors weights for vae"):
        hub.fetch("checkpoint", "org/model")
    assert not any(name.endswith(".safetensors") for name in hub_server.asked)


def test_shards_come_with_their_index(hub: Hub, hub_server: LocalHub) -> None:
    folder = hub_server.repos["org/model"]
    (folder / f"{UNET}.safetensors").rename(folder / f"{UNET}-00001-of-00001.safetensors")
    shards = {"weight_map": {"weight": "diffusion_pytorch_model-00001-of-00001.safetensors"}}
    files(folder, {f"{UNET}.safetensors.index.json": shards})
    found = downloaded(hub.fetch("checkpoint", "org/model"))
    assert {f"{UNET}-00001-of-00001.safetensors", f"{UNET}.safetensors.index.json"} <= found


def test_lone_modules_and_loras_come_from_the_hub_too(
    tmp_path: Path, hub: Hub, hub_server: LocalHub
) -> None:
    vae = {"_class_name": "AutoencoderKL", "latent_channels": 4, "scaling_factor": 0.18215}
    contents = {"config.json": vae, "diffusion_pytorch_model.safetensors": {"weight": (2,)}}
    hub_server.repos["org/vae"] = files(tmp_path / "vae", contents)
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"
    lora = files(tmp_path / "lora", {"pytorch_lora_weights.safetensors": {key: (4, 768)}})
    hub_server.repos["org/lora"] = lora
    models = Models(settings_for(tmp_path), hub)
    assert models.resolve("vae", "org/vae").traits.latent_channels == 4
    assert models.resolve("lora", "org/lora").model.family == "sd15"


def test_a_single_files_configurations_are_fetched_without_weights(
    tmp_path: Path, hub: Hub, hub_server: LocalHub
) -> None:
    hub_server.repos[CONFIG_REPOS["sd15"][0]] = hub_server.repos["org/model"]
    shapes = weights.single_file_shapes("sd15")
    safetensors(tmp_path / "models" / "checkpoints" / "one.safetensors", shapes)
    found = Models(settings_for(tmp_path), hub).resolve("checkpoint", "one.safetensors")
    assert found.model.config
    assert downloaded(Path(found.model.config)) == set(weights.config_files("sd15"))
    assert found.scheduler == "DDIMScheduler"


def test_a_local_folder_keeps_its_name_from_the_hub(
    tmp_path: Path, hub: Hub, hub_server: LocalHub
) -> None:
    files(tmp_path / "models" / "checkpoints" / "org" / "mine", weights.checkpoint_files("sd15"))
    with pytest.raises(Problem) as caught:
        Models(settings_for(tmp_path), hub).resolve("checkpoint", "org/model")
    assert caught.value.code == "unknown_model"
    assert not hub_server.asked
