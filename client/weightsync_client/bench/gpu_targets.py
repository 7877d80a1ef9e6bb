"""What pushes between GPUs are held to."""

from __future__ import annotations

import statistics

from weightsync_client.bench.figures import Figures, Target
from weightsync_client.bench.prediction import targets


def judge(figures: Figures) -> None:
    """Compute the ratios and hold them to the targets."""
    copy = figures.set_ratio("write_vs_device_copy", "write", "device_copy")
    figures.set_ratio("write_vs_raw_nixl", "write", "raw_nixl_write")
    figures.set_ratio("write_vs_nccl_broadcast", "write", "nccl_broadcast")
    packed = figures.set_ratio("write_vs_vllm_nccl_packed", "write", "vllm_nccl_packed")
    figures.set_ratio("write_vs_vllm_nccl_unpacked", "write", "vllm_nccl_unpacked")
    figures.set_ratio("push_vs_vllm_nccl_packed", "push", "vllm_nccl_packed")
    expandable = figures.set_ratio("expandable_write_vs_write", "expandable_write", "write")
    figures.set_ratio("write_vs_slots_write", "write", "slots_write")
    figures.set_ratio("fill_vs_slots_fill", "fill", "slots_fill")
    experts = figures.set_ratio("moe_write_vs_device_copy", "moe_write", "moe_device_copy")
    fp8 = figures.set_ratio("fp8_fill_vs_local_copy", "fp8_fill", "fp8_local_copy")
    split = figures.set_ratio("split_write_vs_write", "split_write", "write")
    cpu = figures.series.get("cpu_trainer_cpu_thread")
    if cpu is not None and len(cpu.values) > 1:
        half = len(cpu.values) // 2
        early, late = statistics.median(cpu.values[:half]), statistics.median(cpu.values[half:])
        figures.notes.append(
            f"Trainer's CPU time a push: {early * 1e3:.2f} ms in the first half of the pushes, "
            f"{late * 1e3:.2f} ms in the second."
        )
    figures.targets = [
        Target("write, of the copy between the GPUs", 0.95, copy),
        Target(
            "write, of vLLM's packed NCCL transfer (at most 0.47 of its time)", 1 / 0.47, packed
        ),
        Target("paused, beyond the write", 0.020, figures.median("paused_beyond_write"), "s"),
        Target("paused, in shadow mode", 0.030, figures.median("shadow_paused"), "s"),
        Target("write with expandable segments, of the write without", 0.95, expandable),
        Target("write of many small experts, of the copy", 0.85, experts),
        Target("fill with fp8 blocks, of a copy in the same memory", 0.70, fp8),
        Target("write of 2 ranks into 2 workers, of 1 into 1", 1.8, split),
        Target("CPU of the pushing thread", 0.005, figures.median("cpu_trainer_cpu_thread"), "s"),
        *targets(figures),
    ]
