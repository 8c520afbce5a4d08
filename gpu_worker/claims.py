"""What tasks claim of the models, so that those that cannot share them do not run together."""

from collections.abc import Hashable, Mapping

from gpu_worker.engine import Task
from gpu_worker.turns import PATIENCE
from ipc.messages import Generate


def claims_of(work: Generate) -> dict[Hashable, Hashable]:
    """Checkpoints by path, and the LoRAs that have to be in them while the job runs."""
    loras = tuple(sorted((lora.model.path, lora.scale) for lora in work.loras))
    claimed: dict[Hashable, Hashable] = {}
    if work.refiner is not None:
        claimed[work.refiner.checkpoint.path] = ()
    claimed[work.checkpoint.path] = loras
    return claimed


def wait_for_room(
    task: Task,
    claims: Mapping[Hashable, Hashable],
    told: list[tuple[str, ...]],
    in_the_way: tuple[str, ...],
) -> None:
    """Keeps others from beginning with the checkpoints that are in the way, so that their last
    job ends. From beginning at all where there are none, or they were others again and again:
    somebody took the room. Called on the loader's thread, `told` is what it was told before."""
    if told[-1:] != [in_the_way]:
        told.append(in_the_way)
    task.claims = {**claims, **{path: object() for path in in_the_way}}
    task.alone = task.alone or not in_the_way or len(told) > PATIENCE
