"""What a server looks at before it starts: settings that this host cannot honour.

Pure. A setting without effect stops the start rather than being passed over.
"""

from collections.abc import Sequence

from supervisor.settings import Settings, SettingsError

LOOPBACK = ("127.", "::1", "localhost")


def check_compilation(settings: Settings, devices: Sequence[str], stable_fast: str | None) -> None:
    """Raises SettingsError. `stable_fast` is the installed version; `devices` are torch's."""
    no_gpu = all(device == "cpu" for device in devices)
    if settings.cuda_graph and no_gpu:
        raise SettingsError("cannot use CUDA_GRAPH=true: there is no GPU among the devices")
    if settings.compile_backend != "stable-fast":
        return
    if no_gpu:
        raise SettingsError(
            "cannot use COMPILE_BACKEND=stable-fast: there is no GPU among the devices; "
            "it accepts none or inductor here"
        )
    if stable_fast is None:
        raise SettingsError(
            "cannot use COMPILE_BACKEND=stable-fast: the package is not installed; "
            "scripts/build_stable_fast builds it"
        )


def is_open_to_all(settings: Settings) -> bool:
    """Whether others than this host's own programs may use the server without a key."""
    return not settings.api_keys and not settings.host.lower().startswith(LOOPBACK)
