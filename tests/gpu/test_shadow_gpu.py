"""Shadow mode on a real GPU: the exchange's rate, captured graphs, and whole demos."""

from __future__ import annotations

import statistics
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.support.models import Kind, config_of
from weightsync.errors import HeadroomError
from weightsync_client.demo import DemoOptions, run_demo
from weightsync_server.receiver import shadow
from weightsync_server.receiver.exchange import Exchange
from weightsync_server.receiver.shadow import Shadow, check_headroom

pytestmark = pytest.mark.gpu

_GB = 1 << 30


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def milliseconds(work) -> float:
    """The median of some runs, by the GPU's own clock."""
    times = []
    for _ in range(7):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[2:])


def test_an_exchange_takes_little_more_than_two_copies_of_the_same_bytes(gpu: torch.device) -> None:
    shapes = [(4096, 14336), (4096, 4096), (4096,), (151936, 4096), (1023,)] * 3
    live = {str(k): torch.randn(s, device=gpu, dtype=torch.bfloat16) for k, s in enumerate(shapes)}
    made = Shadow(live, gpu)
    targets = {name: torch.empty_like(t) for name, t in live.items()}

    def copy() -> None:
        torch._foreach_copy_(list(targets.values()), list(live.values()))

    exchanged, copied = milliseconds(made.exchange.run), milliseconds(copy)
    nbytes = made.exchange.nbytes
    print(
        f"{nbytes / 1e9:.2f} GB: exchanged in {exchanged:.2f} ms "
        f"({nbytes / exchanged / 1e6:.0f} GB/s of each side), one copy takes {copied:.2f} ms; "
        f"16.4 GB would take {exchanged * 16.4e9 / nbytes:.1f} ms"
    )
    # an exchange reads and writes both sides: twice the traffic of a copy
    assert exchanged < 2.4 * copied
    made.close()


@pytest.mark.parametrize("where", ["same", "cpu"])
def test_an_exchange_is_one_to_the_byte_and_its_undo_is_none(where: str, gpu: torch.device) -> None:
    sizes = [1, 15, 16, 17, 4096, (1 << 20) + 3, 200_000_001]
    live = {str(n): torch.randint(0, 256, (n,), dtype=torch.uint8, device=gpu) for n in sizes}
    # one that starts at no multiple of 16
    live["odd"] = torch.randint(0, 256, (1 << 16,), dtype=torch.uint8, device=gpu)[3:-2]
    made = Shadow(live, gpu if where == "same" else torch.device("cpu"))
    assert where == "same" or made.slab.data.is_pinned()
    for t in made.memory.values():
        t.copy_(torch.randint(0, 256, t.shape, dtype=torch.uint8))
    before = {name: (live[name].clone(), made.memory[name].clone()) for name in live}
    made.exchange.run()
    torch.cuda.synchronize()
    assert all(
        torch.equal(live[n], b.to(gpu)) and torch.equal(made.memory[n].to(gpu), a)
        for n, (a, b) in before.items()
    )
    made.exchange.undo()
    torch.cuda.synchronize()
    assert all(
        torch.equal(live[n], a) and torch.equal(made.memory[n], b) for n, (a, b) in before.items()
    )
    made.close()


def test_without_triton_it_goes_through_the_buffer(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightsync_server.receiver.exchange.find_spec", lambda _: None)
    a, b = (torch.randint(0, 256, (_GB // 4 + 5,), dtype=torch.uint8, device=gpu) for _ in "ab")
    x, y = a.clone(), b.clone()
    Exchange([(a, b)]).run()
    assert torch.equal(a, y)
    assert torch.equal(b, x)


def test_a_captured_graph_computes_with_what_was_exchanged(gpu: torch.device) -> None:
    weight = torch.randn(256, 256, device=gpu)
    made = Shadow({"w": weight}, gpu)
    new = torch.randn(256, 256, device=gpu)
    made.memory["w"].copy_(new)
    x, out = torch.randn(8, 256, device=gpu), torch.empty(8, 256, device=gpu)
    torch.mm(x, weight, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.mm(x, weight, out=out)
    old = torch.mm(x, weight)
    made.exchange.run()
    graph.replay()
    assert torch.equal(out, torch.mm(x, new))
    made.exchange.undo()
    graph.replay()
    assert torch.equal(out, old)
    made.close()


def test_headroom_is_what_the_gpu_has(gpu: torch.device) -> None:
    free = shadow.free_nbytes(gpu)
    assert free is not None
    check_headroom(gpu, free // 2, "half of it")
    with pytest.raises(HeadroomError, match="are free"):
        check_headroom(gpu, free + (1 << 30), "more than there is")


@pytest.mark.nixl
@pytest.mark.timeout(400)
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_a_push_in_shadow_mode_into_cuda_graphs_equals_a_fresh_load(
    kind: Kind, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    config_of(kind).to_json_file(path)
    result = run_demo(
        DemoOptions(
            config_file=path, device="cuda", mode="shadow", workdir=tmp_path / "demo", timeout_s=390
        )
    )
    assert result.ok, result.error
    assert (result.bytes_equal_fresh_load, result.logprobs_equal_fresh_load) == (True, True)
    for push in result.to_dict()["pushes"]:
        print(f"v{push['version']}: paused {push['paused_s'] * 1e3:.1f} ms")
