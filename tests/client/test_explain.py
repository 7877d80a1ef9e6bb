"""Where each byte of a tensor comes from and goes to, by layouts alone."""

from __future__ import annotations

import pytest

from weightsync.errors import InputError
from weightsync.layout import CopyRecord, KernelRegion, WorkerLayout, WorkerPlace
from weightsync.manifest import Manifest, TensorSpec
from weightsync_client.explain import explain

MANIFEST = Manifest.of(
    [
        TensorSpec("q.weight", "bfloat16", (4, 6)),
        TensorSpec("k.weight", "float32", (2, 6)),
        TensorSpec("rope", "float32", (3,)),
    ]
)
FUSED = KernelRegion("attn.qkv.weight", "bfloat16", (4, 6), 48, "staged", 0, untouched=((36, 48),))
#: a worker that takes q's rows 2 and 3, k's columns 1 to 3 transposed, and drops the rest
LAYOUT = WorkerLayout(
    WorkerPlace(tp=1),
    (FUSED,),
    (
        CopyRecord("q.weight", (2, 6), 12, (6, 1), 0, 0, (6, 1)),
        CopyRecord("k.weight", (3, 2), 1, (1, 6), 0, 12, (2, 1)),
    ),
    skipped=("rope",),
)


def test_a_checkpoint_tensor_is_followed_into_the_fused_kernel_tensor() -> None:
    (part,) = explain("q.weight", MANIFEST, [("http://a", LAYOUT)]).parts
    assert (part.agent, part.place) == ("http://a", "engine0/dp0/pp0/tp1/ep0")
    assert part.box == ((2, 4), (0, 6))
    assert (part.kernel_tensor, part.module, part.mode) == ("attn.qkv.weight", "attn.qkv", "staged")
    assert (part.start, part.stop, part.nbytes, part.runs) == (0, 24, 24, 1)


def test_a_kernel_tensor_lists_all_that_lands_in_it_and_its_padding() -> None:
    found = explain("attn.qkv.weight", MANIFEST, [("http://a", LAYOUT), ("http://b", LAYOUT)])
    assert [p.checkpoint_tensor for p in found.parts] == ["q.weight", "k.weight"] * 2
    k = found.parts[1]
    assert k.box == ((0, 2), (1, 4))
    assert (k.checkpoint_dtype, k.kernel_dtype, k.start, k.stop) == ("float32", "bfloat16", 24, 36)
    assert [(g.start, g.stop) for g in found.untouched] == [(36, 48)] * 2


def test_a_copy_that_reads_no_box_gives_strides_instead() -> None:
    odd = CopyRecord("q.weight", (3,), 0, (5,), 0, 0, (1,))
    layout = WorkerLayout(WorkerPlace(), (FUSED,), (odd,))
    (part,) = explain("q.weight", MANIFEST, [("http://a", layout)]).parts
    assert (part.box, part.src_offset, part.src_strides) == (None, 0, (5,))


def test_a_dropped_tensor_is_told_and_an_unknown_one_gets_the_nearest_names() -> None:
    found = explain("rope", MANIFEST, [("http://a", LAYOUT)])
    assert (found.parts, found.dropped_by) == ((), (("http://a", "engine0/dp0/pp0/tp1/ep0"),))
    with pytest.raises(InputError, match=r"did you mean q\.weight"):
        explain("q.weigth", MANIFEST, [("http://a", LAYOUT)])
