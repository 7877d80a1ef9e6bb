"""Hand-written models, loaders and an engine around them: what a receiver has to cope with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from weightsync import digest
from weightsync.layout import WorkerPlace
from weightsync.manifest import Manifest, TensorSpec
from weightsync.plan import build_plan
from weightsync.transport.base import LocalMemory, WriteOp
from weightsync.transport.inmemory import Fabric, InMemoryTransport
from weightsync.worker_messages import (
    AttachBody,
    BeginBody,
    CommitBody,
    CommitReply,
    ConnectBody,
    LayoutBody,
    LayoutReply,
    PrepareBody,
    PrepareReply,
    RankDigestsBody,
    RankWrites,
)
from weightsync_server.engines.base import EngineAdapter
from weightsync_server.receiver.kernel import replay
from weightsync_server.receiver.receiver import Receiver
from weightsync_server.receiver.tracer import Trace, trace

Weights = dict[str, torch.Tensor]
Pairs = Iterable[tuple[str, torch.Tensor]]
Load = Callable[[nn.Module, Pairs], None]


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Bag(nn.Module):
    """A module whose parameters are named by the test."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, t in tensors.items():
            self.register_parameter(name, nn.Parameter(t, requires_grad=False))


def manifest_of(weights: Mapping[str, torch.Tensor]) -> Manifest:
    return Manifest.of(
        TensorSpec(k, str(v.dtype).removeprefix("torch."), tuple(v.shape))
        for k, v in weights.items()
    )


def random_like(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def bag(dtype: torch.dtype = F32, **shapes: tuple[int, ...]) -> Callable[[], nn.Module]:
    return lambda: Bag(**{k: torch.empty(v, dtype=dtype) for k, v in shapes.items()})


def weights_of(dtype: torch.dtype = F32, **shapes: tuple[int, ...]) -> Weights:
    return {k: random_like(dtype, *v, seed=i) for i, (k, v) in enumerate(shapes.items())}


def each(one: Callable[[nn.Module, str, torch.Tensor], None]) -> Load:
    def load(module: nn.Module, tensors: Pairs) -> None:
        for name, t in tensors:
            one(module, name, t)

    return load


def into_p(view: Callable[[torch.Tensor], torch.Tensor]) -> Load:
    return each(lambda m, _, t: m.p.data.copy_(view(t)))


def traced(model: Callable[[], nn.Module], load: Load, weights: Weights) -> Trace:
    with torch.device("meta"):
        twin = model()
    return trace(twin, load, manifest_of(weights))


def bytes_of(t: torch.Tensor) -> bytes:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def agree(model: Callable[[], nn.Module], load: Load, weights: Weights) -> Trace:
    """Trace, replay with real tensors, and compare with really running the loader."""
    found = traced(model, load, weights)
    expected, replayed = model(), model()
    with torch.no_grad():
        for module in (expected, replayed):
            for t in [*module.parameters(), *module.buffers()]:
                t.zero_()
        load(expected, [(k, v.clone()) for k, v in weights.items()])
        own = dict([*replayed.named_parameters(), *replayed.named_buffers()])
        for c in found.copies:
            replay([c], lambda name: weights[name].reshape(-1), own[c.param].data)
    for name, t in [*expected.named_parameters(), *expected.named_buffers()]:
        assert bytes_of(t) == bytes_of(own[name]), name
    return found


class ToyAdapter(EngineAdapter):
    """An engine in a few lines.

    Args:
        model: Builds the model, in load format.
        load: Its loader; default: by name, with ``copy_``.
        finish: Post-processing of one module.
        folder: Where its checkpoint is; None: it starts with what ``start`` holds.
    """

    name = "toy"
    version = "1"
    place = WorkerPlace()
    device = torch.device("cpu")

    def __init__(
        self,
        model: Callable[[], nn.Module],
        *,
        start: Weights,
        load: Load | None = None,
        finish: Callable[[nn.Module], None] | None = None,
        folder: Path | None = None,
        replaceable: bool = True,
        read_back: Callable[[nn.Module, str, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.model = model
        self._load = by_name if load is None else load
        self._finish = finish
        self._replaceable = replaceable
        self._read_back = read_back
        self._folder = folder
        self.refreshed = 0
        if folder is not None:
            save_file({k: v.contiguous() for k, v in start.items()}, folder / "model.safetensors")
        self._live = self.fresh(start)

    def fresh(self, weights: Weights) -> nn.Module:
        """What the engine makes of these weights when it starts with them."""
        made = self.model()
        with torch.no_grad():
            for t in [*made.parameters(), *made.buffers()]:
                t.zero_()
            self._load(made, [(k, v.clone()) for k, v in weights.items()])
            for module in list(made.modules()):
                self.finish(module)
        return made.eval()

    @property
    def live(self) -> nn.Module:
        return self._live

    @property
    def replaceable(self) -> bool:
        return self._replaceable

    def new_twin(self) -> nn.Module:
        with torch.device("meta"):
            return self.model().eval()

    def load(self, twin: nn.Module, tensors: Pairs) -> None:
        with torch.no_grad():
            self._load(twin, tensors)

    def finish(self, module: nn.Module) -> None:
        if self._finish is not None:
            self._finish(module)

    def refresh(self) -> None:
        self.refreshed += 1

    def read_back(
        self, module: nn.Module, param: str, columns: torch.Tensor, width: int
    ) -> torch.Tensor | None:
        return None if self._read_back is None else self._read_back(module, param, columns)

    def checkpoint(self) -> Path | None:
        return self._folder


def by_name(module: nn.Module, tensors: Pairs) -> None:
    own = dict(module.named_parameters(remove_duplicate=False))
    own |= dict(module.named_buffers(remove_duplicate=False))
    for name, t in tensors:
        target = own[name]
        assert target.shape == t.shape, f"shape of {name}"
        target.data.copy_(t)


class Trainer:
    """One rank that pushes to one receiver, step by step."""

    def __init__(self, receiver: Receiver, fabric: Fabric, *, rank: int = 0) -> None:
        self.receiver = receiver
        self.fabric = fabric
        self.rank = rank
        self.epoch = 0
        self.mode = "direct"
        self.max_shadow_nbytes: int | None = None

    def rendezvous(self, weights: Weights) -> LayoutReply:
        self.epoch += 1
        manifest = manifest_of(weights)
        reply = self.receiver.layout(LayoutBody(
                self.epoch, "session", manifest.tensors,
                mode=self.mode, max_shadow_nbytes=self.max_shadow_nbytes,
            )
        )  # fmt: skip
        self.plan = build_plan(manifest, [reply.layout], allow_skipped=["*"])
        self.slab = torch.zeros(max(1, self.plan.slot_nbytes), dtype=torch.uint8)
        self.transport = InMemoryTransport(self.fabric)
        self.transport.register([LocalMemory(self.slab.data_ptr(), self.slab.numel())])
        self.peer = self.transport.add_peer(reply.metadata)
        writes = [(w.region, w.offset, w.nbytes) for w in self.plan.writes[0]]
        self.connect_body = ConnectBody(
            self.epoch, [RankWrites(self.rank, self.transport.metadata(), writes)]
        )
        self.receiver.connect(self.connect_body)
        regions = reply.layout.regions
        self.write = self.transport.prepare(
            self.peer,
            [
                WriteOp(
                    self.slab.data_ptr() + w.slot_offset,
                    regions[w.region].addr + w.offset,
                    w.nbytes,
                )
                for w in self.plan.writes[0]
            ],
        )
        return reply

    def fill(self, weights: Weights) -> list[bytes]:
        for f in self.plan.fills:
            dtype = getattr(torch, f.dtype)
            slot = self.slab[: self.slab.numel() // 8 * 8].view(dtype)
            source = weights[f.tensor].contiguous().reshape(-1)
            slot.as_strided(f.shape, f.slot_strides, f.slot_offset // dtype.itemsize).copy_(
                source.as_strided(f.shape, f.src_strides, f.src_offset)
            )
        return digest.digests(
            [self.slab[w.slot_offset : w.slot_offset + w.nbytes] for w in self.plan.writes[0]]
        )

    def send(self, version: int) -> None:
        self.transport.post(self.write, f"ws:{self.epoch}:{version}:{self.rank}".encode())
        self.transport.wait([self.write], timeout_s=5)

    def begin(self, version: int, push_id: str = "", *, live: bool = True) -> None:
        push_id = push_id or f"push-{version}"
        self.receiver.begin(BeginBody(self.epoch, version, push_id, live))

    def prepare(
        self, version: int, digests: list[bytes], *, timeout_s: float = 5.0
    ) -> PrepareReply:
        ranks = [RankDigestsBody(self.rank, digests)]
        return self.receiver.prepare(
            PrepareBody(self.epoch, version, f"push-{version}", ranks, timeout_s)
        )

    def commit(
        self, version: int, digests: list[bytes], *, push_id: str = "", timeout_s: float = 5.0
    ) -> CommitReply:
        ranks = [RankDigestsBody(self.rank, digests)]
        return self.receiver.commit(
            CommitBody(self.epoch, version, push_id or f"push-{version}", ranks, timeout_s)
        )

    def push(self, weights: Weights, version: int) -> CommitReply:
        digests = self.fill(weights)
        self.begin(version)
        self.send(version)
        return self.commit(version, digests)


def new_pair(adapter: ToyAdapter, *, proof: str = "windows") -> tuple[Receiver, Trainer]:
    fabric = Fabric()
    receiver = Receiver(adapter, lambda: InMemoryTransport(fabric, "worker"))
    receiver.attach(AttachBody(proof))
    return receiver, Trainer(receiver, fabric)


def state_of(model: nn.Module) -> dict[str, bytes]:
    """Bytes of all tensors of a model, those outside of parameters and buffers too."""
    found = {k: bytes_of(v) for k, v in model.named_parameters(remove_duplicate=False)}
    found |= {k: bytes_of(v) for k, v in model.named_buffers(remove_duplicate=False)}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                found[f"{path}!{key}"] = bytes_of(value)
            elif isinstance(value, (int, float)):
                found[f"{path}!{key}"] = repr(value).encode()
    return found
