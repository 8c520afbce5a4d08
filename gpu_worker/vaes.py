"""VAEs that pipelines would move between types: settled once, when they are loaded."""

from typing import Any

import diffusers
import torch


def pipeline_upcasts(class_name: str) -> bool:
    """Whether a pipeline class moves a float16 VAE to float32 to decode, as SDXL's do."""
    return hasattr(getattr(diffusers, class_name, None), "upcast_vae")


def settled(vae: Any) -> Any:
    """A VAE whose type stays as it is: float32 where its configuration says force_upcast.

    SDXL's pipelines move such a VAE to float32 and back within every call, under the hands
    of other jobs. This one is in float32 already, takes latents and pictures of any type,
    and stays when it is told to change.
    """
    if not getattr(vae.config, "force_upcast", False):
        return vae
    vae = vae.to(torch.float32)
    encode, decode = vae.encode, vae.decode
    vae.encode = lambda x, *args, **kwargs: encode(x.float(), *args, **kwargs)
    vae.decode = lambda z, *args, **kwargs: decode(z.float(), *args, **kwargs)
    vae.to = lambda *args, **kwargs: vae
    return vae
