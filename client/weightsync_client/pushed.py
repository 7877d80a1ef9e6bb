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
        structures: Of earlier pushes with the same conversion; None: nothing is kept.
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
        # scales are told in a push: what was learned of them must not be looked at again
        self._structures = structures if quantization is None else None

    @cached_property
    def given(self) -> WeightSource:
        """Where the checkpoint's values are.  Errors are :func:`as_source`'s."""
        if self._structures is not None:
            prepared = self._structures.prepared(self._model)
            if prepared is not None:
                return prepared
        return as_source(self._model, self._conversion)

    def look_again(self) -> None:
        """For a rendezvous: the weights themselves are looked at, whatever is known of them."""
        if self._structures is not None and isinstance(self.given, PreparedSource):
            self._structures.forget()
            for made in ("given", "quantized", "declaration"):
                self.__dict__.pop(made, None)

    @cached_property
    def quantized(self) -> QuantizedSource | None:
        """Where the published values come from, if some are quantised."""
        if self._quantization is None:
            return None
        return QuantizedSource(self.given, self._quantization)

    @property
    def source(self) -> WeightSource:
        """Where the published values come from."""
        return self.given if self.quantized is None else self.quantized

    @cached_property
    def declaration(self) -> Declaration:
        """What this rank has."""
        source = self.source
        if isinstance(source, PreparedSource):
            return source.declaration
        declaration = Declaration.of(source)
        if self._structures is not None:
            self._structures.learn(self._model, source, declaration)
        return declaration

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
