"""When a worker is worn: memory that nothing accounts for any more. Pure."""

from ipc.messages import Worn

GB = 2**30
LOST_PART = 0.05
"""Of the device: libraries keep workspaces, which are no model's."""
LEAST_LOST_BYTES = GB // 2


def worn(allocated: int, accounted: int, total: int) -> Worn | None:
    """What to say of so many allocated bytes when nothing runs; None when all is well."""
    lost = allocated - accounted
    if lost <= max(LEAST_LOST_BYTES, LOST_PART * total):
        return None
    return Worn(reason="memory", detail=f"cannot get {lost / GB:.2f} GB of its memory back")
