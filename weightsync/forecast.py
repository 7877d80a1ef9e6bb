"""What a job's plan comes to: slots, writes, bytes, balance, memory and predicted seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from weightsync.geometry import Int64s
from weightsync.layout import WorkerLayout
from weightsync.plan import Job
from weightsync.slots import SLOT_ALIGN_NBYTES, round_nbytes

#: seconds that one write costs beside its bytes (measured over NVLink)
WRITE_S = 5.5e-6
#: bytes a second of a copy within one GPU (measured on an H200)
FILL_NBYTES_PER_S = 1.99e12


@dataclass(frozen=True, slots=True)
class Spread:
    """How a figure is spread: the largest, the mean, the smallest, and largest over mean."""

    max: float
    mean: float
    min: float
    balance: float

    @classmethod
    def of(cls, values: Int64s) -> Spread:
        """The spread of one value a rank or worker."""
        mean = float(values.mean())
        largest = float(values.max())
        return cls(largest, mean, float(values.min()), largest / mean if mean else 1.0)


@dataclass(frozen=True, slots=True)
class Forecast:
    """One push, in figures.

    Attributes:
        slots: Contiguous pieces of slot memory, of all ranks.
        writes: Writes of all ranks to all workers.
        nbytes: Bytes over the wire.
        gathered_nbytes: Bytes of small tensors that ranks give each other before that.
        rank_nbytes: Bytes that a rank sends.
        rank_writes: Writes that a rank makes.
        slot_nbytes: Slot memory of a rank.
        rounds: In which its bytes go through it, on the rank with the most.
        handles: Workers that a rank writes to: it keeps one transfer handle for each.
        worker_nbytes: Bytes that a worker receives.
        fill_s: Seconds to fill the slots, on the rank with the most.
        wire_s: Seconds to write, on the busiest NIC of all ranks and workers; where a rank fills
            slots again meanwhile, not less than that takes.
    """

    slots: int
    writes: int
    nbytes: int
    gathered_nbytes: int
    rank_nbytes: Spread
    rank_writes: Spread
    slot_nbytes: Spread
    rounds: int
    handles: Spread
    worker_nbytes: Spread
    fill_s: float
    wire_s: float

    def to_dict(self) -> dict[str, object]:
        """JSON-able."""
        return asdict(self)


def forecast(
    job: Job,
    layouts: Sequence[WorkerLayout],
    ranks: int,
    *,
    nic_gbps: float = 400.0,
    fill_nbytes_per_s: float = FILL_NBYTES_PER_S,
    write_s: float = WRITE_S,
    max_slot_nbytes: int | None = None,
) -> Forecast:
    """The figures of a proven job.

    Args:
        job: All ranks' work; :meth:`Job.prove` has passed.
        layouts: The workers that it was made for.
        ranks: Ranks of the trainer.
        nic_gbps: Gigabits a second of the one NIC that each rank and each worker has.
        fill_nbytes_per_s: Bytes of slot memory that a rank fills in a second.
        write_s: Seconds that one write costs beside its bytes.
        max_slot_nbytes: Bound of a rank's slot memory.

    Raises:
        PlanError: The bound is too small.
    """
    starts, stops, owners = _merged(job)
    nbytes = stops - starts
    target = np.searchsorted(job.space.bases, starts, side="right") - 1
    copies = np.array([len(t.workers) for t in job.targets], dtype=np.int64)[target]

    def a_rank(weights: Int64s) -> Int64s:
        total: Int64s = np.zeros(ranks, dtype=np.int64)
        np.add.at(total, owners, weights)
        return total

    aligned = -(-nbytes // SLOT_ALIGN_NBYTES) * SLOT_ALIGN_NBYTES
    packed = a_rank(aligned)
    # Bytes of a round on each rank; a slot that lies in several rounds has a write in each.
    each = np.array([round_nbytes(n, max_slot_nbytes) for n in packed.tolist()], dtype=np.int64)
    offsets = np.cumsum(aligned) - aligned - (np.cumsum(packed) - packed)[owners]
    pieces = (offsets + nbytes - 1) // each[owners] - offsets // each[owners] + 1
    rounds = -(-packed // np.maximum(each, 1))
    sent, writes = a_rank(nbytes * copies), a_rank(pieces * copies)
    slot_nbytes = np.where(rounds > 1, 2 * each, packed)
    refill_s = np.maximum(packed - 2 * each, 0) / fill_nbytes_per_s
    received = np.array([_received(layout) for layout in layouts], dtype=np.int64)
    rate = nic_gbps * 1e9 / 8
    post_s = np.maximum(sent / rate + writes * write_s, refill_s)
    wire_s = max(float(post_s.max(initial=0.0)), float(received.max()) / rate)
    return Forecast(
        slots=int(pieces.sum()),
        writes=int(writes.sum()),
        nbytes=int(sent.sum()),
        gathered_nbytes=sum(gathered.moved_nbytes for gathered in job.gathered),
        rank_nbytes=Spread.of(sent),
        rank_writes=Spread.of(writes),
        slot_nbytes=Spread.of(slot_nbytes),
        rounds=int(rounds.max(initial=1)),
        handles=Spread.of(_handles(job, owners, target, ranks)),
        worker_nbytes=Spread.of(received),
        fill_s=float(packed.max()) / fill_nbytes_per_s,
        wire_s=wire_s,
    )


def _merged(job: Job) -> tuple[Int64s, Int64s, Int64s]:
    """Starts, stops and ranks of all runs, where one rank's runs that touch are one."""
    runs = job.runs
    order = np.lexsort((runs.starts, runs.ranks))
    starts, stops, ranks = runs.starts[order], runs.stops[order], runs.ranks[order]
    fresh = (starts[1:] != stops[:-1]) | (ranks[1:] != ranks[:-1])
    first = np.concatenate(([True], fresh))
    last = np.concatenate((fresh, [True]))
    return starts[first], stops[last], ranks[first]


def _received(layout: WorkerLayout) -> int:
    return sum(
        region.nbytes - sum(stop - start for start, stop in region.untouched)
        for region in layout.regions
    )


def _handles(job: Job, owners: Int64s, target: Int64s, ranks: int) -> Int64s:
    """For each rank the workers that it writes to."""
    kinds: dict[tuple[int, ...], int] = {}
    kind_of = np.array(
        [kinds.setdefault(tuple(t.workers), len(kinds)) for t in job.targets], dtype=np.int64
    )
    peers: list[set[int]] = [set() for _ in range(ranks)]
    members = list(kinds)
    for pair in np.unique(owners * len(kinds) + kind_of[target]).tolist():
        rank, kind = divmod(pair, len(kinds))
        peers[rank].update(members[kind])
    return np.array([len(workers) for workers in peers], dtype=np.int64)
