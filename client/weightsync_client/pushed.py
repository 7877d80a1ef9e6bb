"""What ``push`` was handed, on one rank."""

from __future__ import annotations

from collections import Counter
from functools import cached_property

import torch

from weightsync_client.declaration import Declaration
from weightsync_client.quantization import QuantizationSpec
from weightsync_client.quantized import QuantizedSource
from weightsync_client.source import Conversion, Weights, WeightSource, as_source
from weightsync_client.structure import PreparedSource, Structures


class Pushed:
    """What ``push`` was handed, on one rank: looked at once a push.

    Args:
        model: See :meth:`weightsync_client.publisher.Publisher.push`.
        conversion: What makes checkpoint tensors of it.
        quantization: What of those is published as fp8.
        structures: Of earlier pushes with the same conversion; None: there was none.
    """

    def __init__(
        self,
        model: Weights,
        conversion: Conversion = "auto",
        quantization: QuantizationSpec | None = None,
        structures: Structures | None = None,
    ) -> None:
        self._model = model
        self._conversion = conversion
        self._quantization = quantization
        self._structures = Structures() if structures is None else structures

    @cached_property
    def given(self) -> WeightSource:
        """Where the checkpoint's values are.  Errors are :func:`as_source`'s."""
        prepared = self._structures.prepared(self._model)
        return as_source(self._model, self._conversion) if prepared is None else prepared

    def look_again(self) -> None:
        """For a rendezvous: the weights themselves are looked at, whatever is known of them."""
        if not isinstance(self.given, PreparedSource):
            return
        self._structures.forget()
        for made in ("given", "declaration"):
            self.__dict__.pop(made, None)
        if self.quantized is not None:  # it stays: the ranks may have told each other scales
            self.quantized.given = self.given

    @cached_property
    def quantized(self) -> QuantizedSource | None:
        """Where the published values come from, if some are quantised."""
        if self._quantization is None:
            return None
        form = self._structures.quantized(self.given, self._quantization)
        return QuantizedSource(self.given, form)

    @property
    def source(self) -> WeightSource:
        """Where the published values come from."""
        return self.given if self.quantized is None else self.quantized

    @cached_property
    def declaration(self) -> Declaration:
        """What this rank has."""
        given = self.given
        if isinstance(given, PreparedSource):
            declaration = given.declaration
        else:
            declaration = Declaration.of(given)
            self._structures.learn(self._model, given, declaration)
        return declaration if self.quantized is None else self.quantized.form.declaration

    @property
    def device(self) -> torch.device:
        """Where most of this rank's bytes are: its slots are filled there."""
        source = self.given
        nbytes: Counter[torch.device] = Counter()
        for name, boxes in source.holdings().items():
            for index in range(len(boxes)):
                local = source.local(name, index)
                nbytes[local.device] += local.nbytes
        return nbytes.most_common(1)[0][0] if nbytes else torch.device("cpu")
