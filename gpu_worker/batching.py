"""Several calls of one module as one: group key, merge, split. Pure tensor code.

A call is its arguments by name. A module's layout says how they relate to rows,
the entries along dimension 0; calls with equal keys merge into one call whose
rows stand in the calls' order. Knows nothing of jobs, threads or devices.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from gpu_worker.transfer import sent

Arguments = dict[str, Any]

CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


class NotBatchFirst(Exception):
    """A tensor whose first dimension does not count the call's rows."""


@dataclass(frozen=True)
class Layout:
    """How a method's arguments relate to rows; any tensor not named here has one entry a row.

    `rows` names the tensor whose dimension 0 counts them. `scalars` may be given as one
    number for all rows, and the module reads them as float32. `shared` tensors belong to
    no row: calls merge only where they are equal. `unread` arguments have no effect.
    `leads` says that a denoiser's call follows.
    """

    rows: str
    scalars: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    max_rows: int | None = None
    leads: bool = False

    @property
    def rowless(self) -> frozenset[str]:
        return self.shared | self.unread

    def read(self, arguments: Arguments) -> Arguments:
        """Those that have an effect."""
        return {name: value for name, value in arguments.items() if name not in self.unread}


def count_rows(arguments: Arguments, layout: Layout) -> int:
    """Raises NotBatchFirst where the tensor that counts the rows is missing."""
    tensor = arguments.get(layout.rows)
    if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0:
        raise NotBatchFirst(f"cannot count rows: {layout.rows} is not a tensor of rows")
    return tensor.shape[0]


def group_key(arguments: Arguments, layout: Layout, rows: int) -> Hashable:
    """Equal for two calls of one method exactly if `merge` may put them together.

    Raises NotBatchFirst for a call that must run by itself.
    """
    return tuple((name, _argument_key(name, arguments[name], layout, rows))
                 for name in sorted(arguments))  # fmt: skip


def _argument_key(name: str, value: Any, layout: Layout, rows: int) -> Hashable:
    if name in layout.unread:
        return None
    if name in layout.scalars and value is not None:
        return "scalar"
    if name in layout.shared and isinstance(value, torch.Tensor):
        return _content_key(value)
    return _key(value, rows)


def _key(value: Any, rows: int) -> Hashable:
    if isinstance(value, torch.Tensor):
        if value.dim() == 0 or value.shape[0] != rows:
            raise NotBatchFirst(f"cannot merge a tensor of shape {tuple(value.shape)}")
        return (value.shape[1:], value.dtype, value.device)
    if isinstance(value, Mapping):
        return (type(value), tuple((key, _key(value[key], rows)) for key in value))
    if isinstance(value, list | tuple):
        return (type(value), tuple(_key(item, rows) for item in value))
    # The type stands beside the value because True == 1 == 1.0.
    return (type(value), value if isinstance(value, CONSTANTS) else id(value))


def _content_key(tensor: torch.Tensor) -> Hashable:
    """The tensor's bytes, read from the device once: pipelines pass one tensor at each step."""
    version = None if tensor.is_inference() else tensor._version
    known = getattr(tensor, "_content_key", None)
    if version is not None and known is not None and known[0] == version:
        return known[1]  # type: ignore[no-any-return]
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    key = (tensor.shape, tensor.dtype, tensor.device, content)
    tensor._content_key = (version, key)  # type: ignore[attr-defined]
    return key


def merge(
    calls: Sequence[Arguments], layout: Layout, rows: Sequence[int], padding: int = 0
) -> Arguments:
    """The calls' arguments with their rows one after another, the last row repeated as padding.

    The calls have equal keys. Scalars become vectors with one float32 entry a row.
    """
    merged = {}
    for name, value in calls[0].items():
        values = [call[name] for call in calls]
        if name in layout.scalars and value is not None:
            merged[name] = _vector(values, rows, padding, calls[0][layout.rows].device)
        else:
            merged[name] = value if name in layout.rowless else concatenate(values, padding)
    return merged


def with_scalars_sent(arguments: Arguments, layout: Layout) -> Arguments:
    """The same arguments, tensors among the scalars on the device of the rows: a UNet would wait
    for all of a GPU's work before it took its timestep from the host."""
    device = arguments[layout.rows].device
    return {
        name: sent(value, device)
        if name in layout.scalars and isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
    }


def _vector(
    scalars: Sequence[Any], rows: Sequence[int], padding: int, device: torch.device
) -> torch.Tensor:
    """An entry a row; what lies on the host is sent in one piece."""
    parts = [torch.as_tensor(scalar, dtype=torch.float32).reshape(-1) for scalar in scalars]
    if len({part.device for part in parts}) > 1:
        parts = [sent(part, device) for part in parts]
    pairs = zip(parts, rows, strict=True)
    spread = [part.expand(count) if part.shape[0] == 1 else part for part, count in pairs]
    return sent(concatenate(spread, padding), device)


def concatenate(values: Sequence[Any], padding: int = 0) -> Any:
    """Like-built values as one, tensors joined along dimension 0; constants from the first."""
    first = values[0]
    if isinstance(first, torch.Tensor):
        parts = list(values)
        if padding:
            parts.append(values[-1][-1:].expand(padding, *first.shape[1:]))
        return torch.cat(parts) if len(parts) > 1 else first
    if isinstance(first, DiagonalGaussianDistribution):
        parameters = concatenate([value.parameters for value in values], padding)
        return DiagonalGaussianDistribution(parameters, deterministic=first.deterministic)
    if isinstance(first, Mapping):
        items = ((key, [value[key] for value in values]) for key in first)
        return _mapping(first, {key: concatenate(column, padding) for key, column in items})
    if isinstance(first, list | tuple):
        columns = zip(*values, strict=True)
        return _sequence(first, (concatenate(column, padding) for column in columns))
    return first


def split(value: Any, rows: Sequence[int]) -> list[Any]:
    """The inverse of `concatenate`: one value for each entry of `rows`.

    Raises NotBatchFirst for a tensor without one entry a row, or an object unknown here.
    """
    if isinstance(value, torch.Tensor):
        if value.dim() == 0 or value.shape[0] != sum(rows):
            raise NotBatchFirst(f"cannot split {tuple(value.shape)} into {sum(rows)} rows")
        return list(torch.split(value, list(rows)))
    if isinstance(value, DiagonalGaussianDistribution):
        parts = split(value.parameters, rows)
        return [DiagonalGaussianDistribution(part, value.deterministic) for part in parts]
    if isinstance(value, Mapping):
        columns = {key: split(item, rows) for key, item in value.items()}
        indices = range(len(rows))
        return [_mapping(value, {key: columns[key][i] for key in columns}) for i in indices]
    if isinstance(value, list | tuple):
        items = [split(item, rows) for item in value]
        return [_sequence(value, (item[i] for item in items)) for i in range(len(rows))]
    if isinstance(value, CONSTANTS):
        return [value] * len(rows)
    raise NotBatchFirst(f"cannot split a {type(value).__name__}")


def _mapping(like: Any, items: dict[Any, Any]) -> Any:
    """Diffusers' and Transformers' outputs are dictionaries built from keywords."""
    return items if type(like) is dict else type(like)(**items)


def _sequence(like: Any, items: Iterable[Any]) -> Any:
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)


def halves(arguments: Arguments, layout: Layout, rows: int) -> list[tuple[Arguments, int]]:
    """One call's arguments as two calls with half of its rows each, and their rows."""
    sizes = [rows // 2, rows - rows // 2]
    whole = merge([arguments], layout, [rows])
    parts = {name: split(value, sizes) for name, value in whole.items()
             if name not in layout.rowless}  # fmt: skip
    rowless = {name: value for name, value in whole.items() if name in layout.rowless}
    return [({name: part[i] for name, part in parts.items()} | rowless, sizes[i]) for i in (0, 1)]


def padded_size(rows: int, buckets: Sequence[int] | None) -> int:
    """The smallest bucket that holds `rows`; `rows` itself without buckets or past the last."""
    return min((size for size in buckets or () if size >= rows), default=rows)
