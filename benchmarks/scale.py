"""Tables of docs/scale.md from the cost model: python benchmarks/scale.py

The hardware figures are makers' peaks; MFU and network efficiency are assumptions, named below.
"""

from __future__ import annotations

import math
from dataclasses import replace

from cost import EncoderShape, Workload

from mim_refiner.types import height_width

ENCODERS = {
    "ViT-B/16": EncoderShape(768, 12, 12, 16),
    "ViT-L/16": EncoderShape(1024, 24, 16, 16),
    "ViT-H/14": EncoderShape(1280, 32, 16, 14),
    "ViT-2B/14": EncoderShape(2560, 24, 32, 14),
}
STATE_BYTES = 4 + 4 + 8  # a trained parameter: weight, gradient, two moments of AdamW, all float32
TFLOPS = {"24 GB card": 165e12, "A100 80 GB": 312e12, "H100 80 GB": 989e12}  # bf16 dense
MFU = 0.4
# Bytes a second that a ring of collectives moves: NVLink inside a node, eight adapters of 50 GB/s between nodes.
NODE_BYTES, NETWORK_BYTES, EFFICIENCY = 450e9, 8 * 50e9, 0.7
LATENCY = 15e-6  # seconds a collective call and doubling of the processes
CALLS_A_HEAD = 5 * 4 + 4  # BatchNorms, forward and backward; predictions and queue
IMAGE_BYTES = 110e3  # a JPEG of ImageNet
LOADER_SECONDS = 4.9e-3  # CPU of decoding a 500x375 JPEG and cutting its twelve views (docs/benchmarks.md)


def jobs() -> dict[str, Workload]:
    large = [(224, 2), (96, 10)]
    huge = [(224, 2), (98, 10)]
    return {
        "ViT-B/16": Workload(ENCODERS["ViT-B/16"], 1024, range(8, 12), large),
        "ViT-L/16": Workload(ENCODERS["ViT-L/16"], 1024, range(16, 24), large),
        "ViT-H/14": Workload(ENCODERS["ViT-H/14"], 512, range(20, 32), huge),
        "ViT-2B/14": Workload(ENCODERS["ViT-2B/14"], 512, range(16, 24), huge, frozen_blocks=6),
    }


def block_bytes(encoder: EncoderShape, tokens: int, *, bf16: bool, fused_attention: bool = True) -> float:
    """Activations that a timm block keeps for its backward pass, of one view.

    In float32, in widths of the encoder: input of both norms 2, their outputs 2, queries, keys and values 3 (plain
    products make a copy of the scaled queries and keys more), attention output 1, MLP hidden 2 x ratio. Under bf16
    autocast the two norms keep float32 and the rest is half as wide.
    """
    size = 2 if bf16 else 4
    wide = 2 * encoder.dim * 4
    narrow = (2 + 3 + 1 + 2 * encoder.mlp_ratio) * encoder.dim * size
    scores = 0 if fused_attention else encoder.heads * tokens * size
    return tokens * (wide + narrow + scores)


def memory(job: Workload) -> dict[str, float]:
    """Bytes a process holds at the peak, by part; of checkpointing all of it or none, and without graphs that stay."""
    e, trained = job.encoder, job.trained_parameters
    idle = e.parameters + job.heads_parameters - trained
    blocks = e.depth * e.block_parameters
    elsewhere = 1 - 1 / job.shards  # of the blocks
    away = blocks * 4 + job.trained_blocks * e.block_parameters * (STATE_BYTES - 4)
    micro = min(job.micro_batch or job.local_batch, job.local_batch)
    groups = []
    for pixels, count in job.view_sizes:
        tokens = e.tokens(pixels)
        kept = block_bytes(e, tokens, bf16=job.bf16)
        held = job.trained_blocks * tokens * e.dim * 4 + kept if job.checkpointing else job.trained_blocks * kept
        groups.append(micro * count * held)
    rows, size = job.local_batch * job.views, 2 if job.bf16 else 4
    head = rows * (2 * job.projector_hidden + job.predictor_hidden + 2 * job.out_dim) * (2 * size + 4)
    heads = len(job.head_blocks) * head
    cached = micro < job.local_batch
    shapes = [(math.prod(height_width(pixels)), e.tokens(pixels), count) for pixels, count in job.view_sizes]
    return {
        # of sharded blocks, the one that runs, the next one, and one's gradients are there whole
        "parameters and optimizer": trained * STATE_BYTES
        + idle * 4
        - away * elsewhere
        + 3 * 4 * e.block_parameters * (job.shards > 1),
        "average of the encoder": e.parameters * 4 - blocks * 4 * elsewhere,
        "queues": len(job.head_blocks) * job.queue_size * (job.out_dim * 4 + 16),
        "images": sum(job.local_batch * count * e.channels * pixels * 4 for pixels, _, count in shapes),
        "features": 2 * len(job.head_blocks) * rows * e.dim * 4,
        # a cached step holds one size of views at a time, and the heads' graph before the encoder's
        "activations": max(*groups, heads) if cached else sum(groups) + heads,
        "frozen prefix": sum(job.local_batch * count * tokens * e.dim * 4 for _, tokens, count in shapes)
        if cached and job.frozen_blocks
        else 0,
    }


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f"\n### {title}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" + "---:|" * (len(header) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def gb(value: float) -> str:
    return f"{value / 1e9:.1f}"


def largest(job: Workload, budget: float) -> str:
    """The largest micro-batch that fits, or what is needed at 1."""
    for micro in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1):
        if micro <= job.local_batch and sum(memory(replace(job, micro_batch=micro)).values()) <= budget:
            return str(micro)
    need = sum(memory(replace(job, micro_batch=1, checkpointing=True)).values())
    return f"- ({gb(need)} GB)"


def network_seconds(job: Workload) -> tuple[float, float]:
    """(gradients, all the rest) of a step."""
    speed = (NODE_BYTES if job.processes <= 8 else NETWORK_BYTES) * EFFICIENCY
    sent = job.traffic()
    gradients = sent.pop("gradients") / speed
    calls = len(job.head_blocks) * CALLS_A_HEAD * LATENCY * max(1, job.processes - 1).bit_length()
    return gradients, sum(sent.values()) / speed + calls


def main() -> None:
    rows = []
    for name, job in jobs().items():
        operations = job.model_operations() / job.batch
        cached = sum(replace(job, micro_batch=1).operations().values()) / job.batch
        rows.append(
            [
                name,
                f"{job.encoder.parameters / 1e6:.0f}",
                f"{job.heads_parameters / 1e6:.0f}",
                f"{job.views} / {len(job.head_blocks)}",
                f"{operations / 1e12:.2f}",
                f"{cached / operations:.2f}",
                *(f"{rate * MFU / operations:.0f}" for rate in TFLOPS.values()),
            ]
        )
    header = ["encoder", "encoder M", "heads M", "views / heads", "T operations an image", "cached / plain"]
    table("Computation", header + [f"images/s, {device}" for device in TFLOPS], rows)

    rows = []
    for name, job in jobs().items():
        for micro in (None, 32):
            parts = memory(replace(job, micro_batch=micro))
            rows.append(
                [
                    f"{name}, {'plain' if micro is None else 'cached, 32 at a time'}",
                    *map(gb, parts.values()),
                    gb(sum(parts.values())),
                ]
            )
    table("Memory of one process at the recipe's batch (GB)", ["step", *parts, "sum"], rows)

    rows = [[name, *(largest(job, size * 0.92e9) for size in (24, 40, 80, 141))] for name, job in jobs().items()]
    table(
        "Largest micro-batch by memory, whole batch on one GPU", ["encoder", "24 GB", "40 GB", "80 GB", "141 GB"], rows
    )

    rows = []
    for nodes in (0, 1, 2, 4, 8, 16, 32, 64):
        row = ["1 GPU" if nodes == 0 else f"{nodes} x 8"]
        for name in ("ViT-L/16", "ViT-H/14"):
            job = replace(jobs()[name], processes=max(1, 8 * nodes))
            compute = job.model_operations() / (TFLOPS["H100 80 GB"] * MFU * job.processes)
            gradients, rest = network_seconds(job)
            whole = compute + gradients + rest
            if job.local_batch >= 1:
                row += [
                    f"{job.local_batch}",
                    f"{1e3 * compute:.0f}",
                    f"{1e3 * gradients:.0f}",
                    f"{1e3 * rest:.0f}",
                    f"{100 * compute / whole:.0f} %",
                ]
            else:
                row += ["-"] * 5
        rows.append(row)
    parts_header = ["images", "compute", "gradients", "rest", "efficiency"]
    table(
        "A step on H100s at the recipe's batch (ms)",
        ["processes", *(f"L: {part}" for part in parts_header), *(f"H: {part}" for part in parts_header)],
        rows,
    )

    rows = []
    for nodes in (1, 4):
        for shards in (1, 8):
            job = replace(jobs()["ViT-2B/14"], processes=8 * nodes, shards=shards, micro_batch=16)
            parts, sent = memory(job), job.traffic()
            weights = ("parameters and optimizer", "average of the encoder")
            rows.append(
                [
                    f"{nodes} x 8, {'whole' if shards == 1 else 'sharded'}",
                    gb(sum(parts[name] for name in weights)),
                    gb(sum(parts.values())),
                    gb(sum(sent.values())),
                    f"{1e3 * job.model_operations() / (TFLOPS['H100 80 GB'] * MFU * job.processes):.0f}",
                ]
            )
    header = ["processes, weights", "weights and optimizer GB", "sum GB", "sent GB a step", "compute ms"]
    table("Sharded weights: ViT-2B/14, batch 512, 16 at a time", header, rows)

    rows = []
    for images in (1e4, 1e5, 1.28e6, 1e7, 1e8, 1e9):
        row = [f"{images:.0e}" if images != 1.28e6 else "1.28e+06"]
        for name, gpus in (("ViT-B/16", 1), ("ViT-L/16", 1), ("ViT-L/16", 8), ("ViT-L/16", 64), ("ViT-H/14", 64)):
            job = replace(jobs()[name], processes=gpus)
            device = "24 GB card" if (name, gpus) == ("ViT-B/16", 1) else "H100 80 GB"
            seconds = job.model_operations() / (TFLOPS[device] * MFU * gpus) + sum(network_seconds(job))
            row.append(f"{images / job.batch * seconds / 3600:.3g}")
        rows.append(row)
    header = ["images", "B, one 24 GB card", "L, one H100", "L, 8 H100", "L, 64 H100", "H, 64 H100"]
    table("Hours an epoch of refinement", header, rows)

    rows = []
    for name, job in jobs().items():
        for gpus in (1, 8, 64):
            spread = replace(job, processes=gpus)
            rate = job.batch / (
                job.model_operations() / (TFLOPS["H100 80 GB"] * MFU * gpus) + sum(network_seconds(spread))
            )
            rows.append(
                [
                    f"{name}, {gpus} H100",
                    f"{rate:.0f}",
                    f"{rate * IMAGE_BYTES / 1e6:.0f}",
                    f"{rate * LOADER_SECONDS / gpus:.1f}",
                ]
            )
    table("What the data path must deliver", ["step", "images/s", "MB/s read", "CPU cores a GPU"], rows)


if __name__ == "__main__":
    main()
