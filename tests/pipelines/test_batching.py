from collections import namedtuple
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gpu_worker import batching
from gpu_worker.batching import Layout, NotBatchFirst, group_key, merge, padded_size, split

UNET = Layout("sample", scalars=frozenset({"timestep"}))
FLUX = Layout("sample", shared=frozenset({"ids"}), unread=frozenset({"generator"}))
Pair = namedtuple("Pair", "left right")

Shape = tuple[torch.dtype, tuple[int, ...]]
leaves = st.one_of(
    st.tuples(
        st.sampled_from([torch.float32, torch.float16, torch.int64]),
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
    ),
    st.none(),
    st.booleans(),
    st.floats(0.5, 1.0),
)
structures = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(lambda items: ("tuple", *items)),
        st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
        st.tuples(inner, inner).map(lambda pair: Pair(*pair)),
    ),
    max_leaves=6,
)


def built(structure: Any, rows: int) -> Any:
    """The structure with every (dtype, shape) made a tensor of that many rows."""
    if isinstance(structure, tuple) and structure and isinstance(structure[0], torch.dtype):
        dtype, shape = structure
        return torch.randint(0, 100, (rows, *shape)).to(dtype)
    if isinstance(structure, dict):
        return {key: built(item, rows) for key, item in structure.items()}
    if isinstance(structure, Pair):
        return Pair(*(built(item, rows) for item in structure))
    if isinstance(structure, list | tuple):
        return type(structure)(built(item, rows) for item in structure)
    return structure


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, DiagonalGaussianDistribution):
        return same(one.parameters, other.parameters) and one.deterministic == other.deterministic
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(
            same(*pair) for pair in zip(one, other, strict=True)
        )
    return bool(one == other)


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@settings(deadline=None)
@given(structures, sizes, st.integers(0, 3))
def test_what_is_merged_splits_into_what_it_was(
    structure: Any, rows: list[int], padding: int
) -> None:
    calls = [{"sample": torch.rand(count, 2), "rest": built(structure, count)} for count in rows]
    assert len({group_key(call, UNET, n) for call, n in zip(calls, rows, strict=True)}) == 1
    merged = merge(calls, UNET, rows, padding)
    assert merged["sample"].shape[0] == sum(rows) + padding
    parts = split(merged, [*rows, padding])
    assert all(same(*pair) for pair in zip(parts[:-1], calls, strict=True))


@settings(deadline=None)
@given(structures, structures, st.integers(1, 3))
def test_calls_of_one_key_are_built_alike(one: Any, other: Any, rows: int) -> None:
    keys = [
        group_key({"sample": torch.rand(rows, 2), "rest": built(structure, rows)}, UNET, rows)
        for structure in (one, other)
    ]
    assert (keys[0] == keys[1]) == (repr(one) == repr(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2, 4), torch.zeros(2, 5)),
        (torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.float16)),
        (torch.zeros(2, 4), None),
        (1, True),
        (0.5, 0.25),
        ([torch.zeros(2, 4)], (torch.zeros(2, 4),)),
        ({"a": 1}, {"b": 1}),
        (object(), object()),
    ],
)
def test_calls_that_differ_in_more_than_rows_have_different_keys(one: Any, other: Any) -> None:
    sample = torch.zeros(2, 3)
    keys = [group_key({"sample": sample, "rest": rest}, UNET, 2) for rest in (one, other)]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("tensor", [torch.tensor(1.0), torch.zeros(3, 2)])
def test_a_tensor_without_an_entry_a_row_keeps_a_call_by_itself(tensor: torch.Tensor) -> None:
    with pytest.raises(NotBatchFirst):
        group_key({"sample": torch.zeros(2, 3), "rest": [tensor]}, UNET, 2)


def test_a_call_without_rows_is_not_counted() -> None:
    with pytest.raises(NotBatchFirst, match="sample is not a tensor of rows"):
        batching.count_rows({"timestep": 3}, UNET)


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7.0])])
def test_a_timestep_for_all_rows_becomes_one_a_row(timestep: Any) -> None:
    calls = [
        {"sample": torch.zeros(2, 3), "timestep": timestep},
        {"sample": torch.zeros(1, 3), "timestep": torch.tensor([3])},
    ]
    keys = {group_key(call, UNET, rows) for call, rows in zip(calls, (2, 1), strict=True)}
    assert len(keys) == 1
    merged = merge(calls, UNET, [2, 1], padding=1)
    assert same(merged["timestep"], torch.tensor([7.0, 7.0, 3.0, 3.0]))


def test_shared_tensors_merge_only_where_they_are_equal() -> None:
    def call(ids: torch.Tensor) -> dict[str, Any]:
        return {"sample": torch.zeros(2, 3), "ids": ids, "generator": object()}

    calls = [call(torch.arange(5)), call(torch.arange(5)), call(torch.arange(5) + 1)]
    keys = [group_key(each, FLUX, 2) for each in calls]
    assert keys[0] == keys[1] != keys[2]
    assert same(merge(calls[:2], FLUX, [2, 2])["ids"], torch.arange(5))


def test_a_shared_tensor_that_is_changed_in_place_changes_the_key() -> None:
    call = {"sample": torch.zeros(2, 3), "ids": torch.arange(5)}
    before = group_key(call, FLUX, 2)
    assert group_key(call, FLUX, 2) == before
    call["ids"] += 1
    assert group_key(call, FLUX, 2) != before


def test_outputs_of_both_libraries_are_split_into_their_own_kind() -> None:
    posterior = AutoencoderKLOutput(DiagonalGaussianDistribution(torch.rand(3, 4, 2, 2)))
    first, second = split(posterior, [1, 2])
    assert isinstance(first, AutoencoderKLOutput)
    assert same(second.latent_dist.parameters, posterior.latent_dist.parameters[1:])
    assert second.latent_dist.mean.shape == (2, 2, 2, 2)
    encoded = BaseModelOutputWithPooling(torch.rand(3, 5, 2), torch.rand(3, 2), (torch.rand(3, 1),))
    first, second = split(encoded, [1, 2])
    assert isinstance(first, BaseModelOutputWithPooling)
    assert torch.equal(second.pooler_output, encoded.pooler_output[1:])
    assert torch.equal(first.hidden_states[0], encoded.hidden_states[0][:1])


@pytest.mark.parametrize("output", [torch.zeros(3), torch.tensor(1.0), object()])
def test_an_output_that_has_no_rows_is_not_split(output: Any) -> None:
    with pytest.raises(NotBatchFirst):
        split((output,), [1, 1])


def test_halves_of_a_call_have_its_rows_between_them() -> None:
    arguments = {"sample": torch.rand(3, 2), "timestep": 5, "flag": True}
    (first, some), (second, rest) = batching.halves(arguments, UNET, 3)
    assert (some, rest) == (1, 2)
    assert torch.equal(torch.cat([first["sample"], second["sample"]]), arguments["sample"])
    assert torch.equal(second["timestep"], torch.tensor([5.0, 5.0]))
    assert first["flag"] is second["flag"] is True


def test_halves_share_what_belongs_to_no_row() -> None:
    arguments = {"sample": torch.rand(2, 2), "ids": torch.arange(5), "generator": None}
    (first, _), (second, _) = batching.halves(arguments, FLUX, 2)
    assert first["ids"] is second["ids"] is arguments["ids"]


@given(st.integers(1, 40), st.sampled_from([None, (1, 2, 4, 8, 16, 32)]))
def test_padding_goes_to_the_next_bucket_and_no_further(rows: int, buckets: Any) -> None:
    size = padded_size(rows, buckets)
    assert size >= rows
    assert size == rows or (size in buckets and size < 2 * rows)
