"""A source whose matrices are published as fp8 blocks, sharded or not.

A block that a shard's border cuts needs the largest value of all its parts.  Before a push the
ranks tell rank 0 the amax of their parts of such blocks, and get those of the whole blocks back;
nothing else travels.  From then on each rank makes its own bytes, and they are those that the
whole tensor would have given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from weightsync.errors import InputError
from weightsync.geometry import Box
from weightsync.manifest import TensorSpec
from weightsync.quantize import (
    block_amax,
    quantize,
    quantize_with_scales,
    scales_from_amax,
    touched_blocks,
)
from weightsync_client.borders import Border, Findings, cut_blocks, grid_of
from weightsync_client.quantization import QuantizationSpec
from weightsync_client.quantized_form import BoxForm, Key, QuantizedForm
from weightsync_client.source import WeightSource

#: bytes of fp8 that one launch makes on a GPU, and that are kept for each form of box
BATCH_NBYTES = 64 << 20


class QuantizedSource:
    """Another source's tensors, those that a spec selects as fp8 values and scales.

    ``local`` quantises when it is asked, on a GPU what looks alike in one launch.  Memory beside
    the slots: the last such batch of every form of box (64 MiB each; one box on a CPU), and the
    scales, 4 bytes for 16384 values.

    Args:
        source: Its values must not change until the push is over.
        what: Of it is quantised; a form is one of a source that declares what this one does.

    Attributes:
        given: The other source; another one of the same values may take its place.
        form: What is quantised.
        chosen: The other source's tensors that are quantised, by name.

    Raises:
        ManifestError: The source has a tensor of the name that a scale would get.
    """

    def __init__(self, source: WeightSource, what: QuantizationSpec | QuantizedForm) -> None:
        self.given = source
        if isinstance(what, QuantizationSpec):
            what = QuantizedForm(source.manifest(), source.holdings(), what)
        self.form = what
        self.chosen = what.chosen
        self._merged: Mapping[str, bytes] = {}
        self._amax: dict[Key, npt.NDArray[np.float32]] = {}
        self._scales: dict[Key, torch.Tensor] = {}
        self._batches: dict[BoxForm, dict[Key, torch.Tensor]] = {}

    def manifest(self) -> Sequence[TensorSpec]:
        """The other source's tensors; behind each that is quantised, its scales."""
        return self.form.declaration.tensors

    def holdings(self) -> Mapping[str, tuple[Box, ...]]:
        """Boxes of values as the other source has them, and of scales."""
        return self.form.holdings

    def local(self, name: str, box_index: int) -> torch.Tensor:
        """The values of one box.  What was not asked for lately is quantised anew.

        Raises:
            InputError: The other source's values have not the shape that it declared.
        """
        if name in self.chosen:
            return self._fp8((name, box_index))
        if name not in self.form.parts:
            return self.given.local(name, box_index)
        key, part = self.form.parts[name][box_index]
        self._know_cut_scales()
        if key not in self._scales:
            self._fp8(key)
        return self._scales[key][part]

    # ------------------------------------------------------------ what the ranks exchange

    @torch.no_grad()
    def findings(self) -> Findings:
        """What this rank tells the others; forgets what an earlier try has made."""
        self._amax, self._scales, self._batches = {}, {}, {}
        queued = [
            (batch, block_amax(values, form.lead))
            for form, keys in self.form.keys.items()
            if form.cut
            for batch, values in self._alike(keys)
        ]
        borders = []
        for batch, amax in queued:  # all were launched before the first is waited for
            for key, found in zip(batch, amax.cpu().numpy(), strict=True):
                shape, box = self.chosen[key[0]].shape, self.form.boxes[key]
                self._amax[key] = found
                cut = found[cut_blocks(shape, box)]
                borders.append(Border(key[0], (shape[0], shape[1]), box, cut.tobytes()))
        return Findings(borders, self.form.unmatched)

    def learn(self, merged: Mapping[str, bytes]) -> None:
        """Take in what :func:`merge` has made of all ranks' findings."""
        self._merged = merged

    def _know_cut_scales(self) -> None:
        """Make the scales of all boxes with cut blocks, once a push."""
        if not self._amax:
            return
        by_device: dict[torch.device, list[Key]] = {}
        for key, amax in self._amax.items():
            shape, box = self.chosen[key[0]].shape, self.form.boxes[key]
            cut = cut_blocks(shape, box)
            whole = grid_of(self._merged[key[0]], shape)
            amax[cut] = whole[touched_blocks(box.shape, box.lo)][cut]
            by_device.setdefault(self.given.local(*key).device, []).append(key)
        for device, keys in by_device.items():
            flat = np.concatenate([self._amax[key].ravel() for key in keys])
            scales = scales_from_amax(torch.from_numpy(flat).to(device))
            sizes = [self._amax[key].size for key in keys]
            for key, made in zip(keys, scales.split(sizes), strict=True):
                self._scales[key] = made.view(self._amax[key].shape)
        self._amax = {}

    # ------------------------------------------------------------ quantising

    def makes(self, name: str) -> Literal["values", "scales"] | None:
        """What a tensor is; None: the other source's own."""
        if name in self.chosen:
            return "values"
        return "scales" if name in self.form.parts else None

    def cuts(self, key: Key) -> bool:
        """Whether some block of a box is cut by its border."""
        return self.form.places[key][0].cut

    def values(self, key: Key) -> torch.Tensor:
        """What a box is quantised from.

        Raises:
            InputError: It has not the shape that the other source declared.
        """
        values, shape = self.given.local(*key), self.form.boxes[key].shape
        if values.shape != shape:
            raise InputError(
                f"{key[0]!r} has shape {tuple(values.shape)}, declared was {shape}",
                hint="weights must not change shape in a push",
                tensor=key[0],
            )
        return values

    def was_quantized(self, scales: Mapping[Key, torch.Tensor]) -> None:
        """Take in the scales of boxes that were quantised elsewhere."""
        self._scales.update(scales)

    @torch.no_grad()
    def _fp8(self, key: Key) -> torch.Tensor:
        form, place = self.form.places[key]
        batch = self._batches.get(form, {})
        if key in batch:
            return batch[key]
        self._know_cut_scales()
        self._batches.pop(form, None)  # its memory is free for the next
        keys, values = next(self._alike(self.form.keys[form], place))
        if form.cut:
            scales = torch.stack([self._scales[k] for k in keys])
            weight = quantize_with_scales(values, form.lead, scales)
        else:
            weight, made = quantize(values)
            self._scales.update(zip(keys, made, strict=True))
        self._batches[form] = dict(zip(keys, weight, strict=True))
        return self._batches[form][key]

    def _alike(
        self, keys: Sequence[Key], start: int = 0
    ) -> Iterator[tuple[list[Key], list[torch.Tensor]]]:
        """Boxes from ``start`` on, in batches that one launch can take."""
        batch: list[Key] = []
        values: list[torch.Tensor] = []
        nbytes = 0
        for key in islice(keys, start, None):
            t = self.values(key).detach()
            if batch and (
                nbytes + t.numel() > BATCH_NBYTES
                or (t.device, t.dtype, t.stride())
                != (values[0].device, values[0].dtype, values[0].stride())
            ):
                yield batch, values
                batch, values, nbytes = [], [], 0
            batch.append(key)
            values.append(t)
            nbytes += t.numel()
            if t.device.type == "cpu":  # nothing is launched there: what is not wanted costs time
                yield batch, values
                batch, values, nbytes = [], [], 0
        if batch:
            yield batch, values
