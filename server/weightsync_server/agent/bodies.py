"""What a request brings for the workers, unpacked and checked; too big for the event loop."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence

from weightsync.codec import unpack
from weightsync.errors import InputError
from weightsync.manifest import Manifest, TensorSpec
from weightsync.protocol import (
    CommitRequest,
    ConnectRequest,
    InitTransferRequest,
    Message,
    PrepareRequest,
    RankDigests,
)
from weightsync.worker_messages import (
    CommitBody,
    ConnectBody,
    PrepareBody,
    RankDigestsBody,
    RankWrites,
)

#: of a request: for how long, why, and what is a call of its own
_NOT_ASKED = {"timeout_s", "reason", "released", "pause", "pause_timeout_s", "resume"}


class Bodies:
    """Makes the workers' bodies of requests; each raises InputError for what fits no worker.

    Args:
        max_unpacked_nbytes: Bytes that a packed record may have once inflated.
    """

    def __init__(self, max_unpacked_nbytes: int) -> None:
        self._limit = max_unpacked_nbytes

    def manifest(self, request: InitTransferRequest) -> Manifest:
        """What the trainer can make."""
        if not isinstance(request.manifest, str):
            return request.manifest.to_manifest()
        return Manifest(unpack(request.manifest, tuple[TensorSpec, ...], max_nbytes=self._limit))

    def connect(self, request: ConnectRequest, workers: int) -> list[ConnectBody]:
        """Who writes what, for each worker."""
        _check_ranks("connect", [(r.rank, len(r.writes)) for r in request.ranks], workers)
        limit = self._limit
        metadata = {r.rank: _base64(r.rank, r.metadata) for r in request.ranks}
        return [
            ConnectBody(
                request.epoch,
                [
                    RankWrites(
                        r.rank,
                        metadata[r.rank],
                        unpack(r.writes[w], list[tuple[int, int, int]], max_nbytes=limit),
                    )
                    for r in request.ranks
                    if r.writes[w]
                ],
            )
            for w in range(workers)
        ]

    def prepare(self, request: PrepareRequest, workers: int) -> list[PrepareBody]:
        """Digests to check before the pause, for each worker."""
        return [
            PrepareBody(request.epoch, request.version, request.push_id, ranks, _workers_s(request))
            for ranks in self.digests(request.ranks, workers)
        ]

    def commit(self, request: CommitRequest, workers: int) -> list[CommitBody]:
        """Digests to check, for each worker."""
        return [
            CommitBody(request.epoch, request.version, request.push_id, ranks, _workers_s(request))
            for ranks in self.digests(request.ranks, workers)
        ]

    def digests(self, ranks: Sequence[RankDigests], workers: int) -> list[list[RankDigestsBody]]:
        """Each rank's digests, for each worker."""
        _check_ranks("digests", [(r.rank, len(r.digests)) for r in ranks], workers)
        limit = self._limit
        return [
            [
                RankDigestsBody(r.rank, unpack(r.digests[w], list[bytes], max_nbytes=limit))
                for r in ranks
                if r.digests[w]
            ]
            for w in range(workers)
        ]


def packed_nbytes(request: Message) -> int:
    """Of digests, which alone can be many."""
    if not isinstance(request, (PrepareRequest, CommitRequest)):
        return 0
    return sum(len(packed) for rank in request.ranks for packed in rank.digests)


def fingerprint(request: Message) -> str:
    """Equal for repeats: everything that was asked, but for how long to wait and why.

    What is done before or after is asked by itself, and not a second time either.
    """
    text = request.model_dump_json(exclude=_NOT_ASKED)
    return hashlib.sha256(text.encode()).hexdigest()


def _workers_s(request: PrepareRequest | CommitRequest) -> float:
    # less than the agent's own deadline, so that the worker can name who is missing
    return max(0.7 * request.timeout_s, request.timeout_s - 4.0)


def _check_ranks(call: str, ranks: Sequence[tuple[int, int]], workers: int) -> None:
    if len({rank for rank, _ in ranks}) != len(ranks):
        raise InputError(
            f"{call}: a rank appears twice in {sorted(r for r, _ in ranks)}",
            hint="every rank once",
        )
    for rank, given in ranks:
        if given != workers:
            raise InputError(
                f"{call}: rank {rank} brings entries for {given} workers, the engine has {workers}",
                hint="one entry for each worker of the init_transfer answer, in its order",
                rank=rank,
                expected=workers,
                got=given,
            )


def _base64(rank: int, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(
            f"the metadata of rank {rank} is not base64: {error}", hint="encode it with base64"
        ) from error
