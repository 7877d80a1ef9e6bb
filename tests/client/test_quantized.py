"""Every rank makes its own fp8 bytes, and they are those of the whole tensor."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.quantize_cases import KINDS, mismatch, random_weights
from weightsync.geometry import Box
from weightsync.manifest import Manifest
from weightsync.quantize import Quantized, quantize
from weightsync_client import LocalShard, QuantizationSpec, StateDictSource
from weightsync_client.borders import merge
from weightsync_client.quantized import QuantizedSource

Parts = Mapping[str, torch.Tensor | LocalShard]


def on_ranks(ranks: Sequence[Parts], spec: QuantizationSpec | None = None) -> list[QuantizedSource]:
    """The sources of all ranks, once they have met; what they tell went over a wire."""
    spec = QuantizationSpec() if spec is None else spec
    sources = [QuantizedSource(StateDictSource(parts), spec) for parts in ranks]
    merged = merge([source.findings() for source in sources])
    for source in sources:
        source.learn(merged)
    return sources


def assembled(sources: Sequence[QuantizedSource], name: str) -> torch.Tensor:
    """A tensor from the boxes of all ranks; replicas must agree, and nothing may be missing."""
    (spec,) = {t for s in sources for t in s.manifest() if t.name == name}
    dtype = getattr(torch, spec.dtype)
    whole = torch.zeros(spec.shape, dtype=dtype)
    seen = torch.zeros(spec.shape, dtype=torch.int32)
    for source in sources:
        for index, box in enumerate(source.holdings().get(name, ())):
            values = source.local(name, index)
            assert (tuple(values.shape), values.dtype) == (box.shape, dtype)
            at = tuple(slice(a, b) for a, b in zip(box.lo, box.hi, strict=True))
            old = whole[at].view(torch.uint8)
            new = values.contiguous().view(torch.uint8)
            bytes_seen = seen[at].repeat_interleave(dtype.itemsize, 1) > 0
            assert (old[bytes_seen] == new[bytes_seen]).all(), "replicas differ"
            whole[at] = values
            seen[at] += 1
    assert (seen > 0).all(), "parts are missing"
    return whole


def got(sources: Sequence[QuantizedSource], name: str = "a.weight") -> Quantized:
    return Quantized(assembled(sources, name), assembled(sources, f"{name}_scale_inv"))


def shard(whole: torch.Tensor, box: Box) -> LocalShard:
    at = tuple(slice(a, b) for a, b in zip(box.lo, box.hi, strict=True))
    return LocalShard(whole[at], tuple(whole.shape), box.lo)


def grid_of(rows: Sequence[int], cols: Sequence[int]) -> list[Box]:
    return [
        Box((top, left), (bottom, right))
        for top, bottom in itertools.pairwise(rows)
        for left, right in itertools.pairwise(cols)
    ]


@st.composite
def cuts(draw: st.DrawFn, size: int) -> list[int]:
    """Borders of shards: anywhere, some of them empty."""
    return [0, *sorted(draw(st.lists(st.integers(0, size), max_size=3))), size]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_shards_cut_anywhere_make_the_bytes_of_the_whole_tensor(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 400), st.integers(1, 300)))
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float16]))
    whole = random_weights(kind, shape, torch.float32).to(dtype)
    boxes = grid_of(data.draw(cuts(shape[0])), data.draw(cuts(shape[1])))
    ranks = [{"a.weight": shard(whole, box)} for box in boxes]
    if data.draw(st.booleans()):
        ranks += ranks  # replicas, as HSDP has them
    sources = on_ranks(data.draw(st.permutations(ranks)))
    assert not mismatch(got(sources), quantize(whole))
    Manifest(tuple(sources[0].manifest()))
