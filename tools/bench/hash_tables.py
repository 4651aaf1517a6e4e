"""Time and traffic of two ways to spread the hash n-gram tables over ranks (gloo processes on this machine).

    python -m tools.bench.hash_tables --ranks 2 --rows 60000 --tokens 4096

``gather`` treats the tables as any other weight: FSDP2 gathers all rows for every forward pass and sums gradients of
all rows. ``exchange`` is what training does: the distinct rows that a rank's tokens need are fetched from their owners
(`blt_train.parallel.tables`). Both give the same sums. What the bytes would cost between H100s is computed beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from tests.blt_train.ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from blt_model import HashEmbeddingConfig
from blt_model.hash_embedding import HashEmbedding, hash_rows
from blt_train.config import DataConfig, ModelConfig, TrainConfig
from blt_train.parallel.rows import local_rows
from blt_train.parallel.tables import ShardedHashEmbedding
from blt_train.runtime import Runtime, open_runtime

#: Bytes per second that one GPU sends: NVLink of an H100 machine, and its 400 Gbit/s network card.
LINKS = {"NVLink 450 GB/s": 450e9, "network 50 GB/s": 50e9}


def words(tokens: int, rank: int) -> Tensor:
    """int64 [tokens]: text-like ids, words of random letters drawn by Zipf's law."""
    generator = np.random.default_rng(rank)
    vocabulary = [np.random.default_rng(index).integers(101, 127, size=2 + index % 9) for index in range(5000)]
    chosen = np.minimum(generator.zipf(1.3, size=tokens), 5000) - 1
    return torch.from_numpy(np.concatenate([np.append(vocabulary[index], 36) for index in chosen])[:tokens])


def seconds(step: Callable[[], None], runtime: Runtime, repeats: int) -> float:
    """Median time of a step, of which all ranks take part."""
    step()
    times = []
    for _ in range(repeats):
        runtime.barrier()
        started = time.perf_counter()
        step()
        runtime.barrier()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def step_of(module: nn.Module, tokens: Tensor) -> Callable[[], None]:
    """A forward and backward pass."""
    positions = torch.arange(len(tokens))

    def step() -> None:
        module(tokens, positions).sum().backward()
        module.zero_grad(set_to_none=True)

    return step


def measure(options: argparse.Namespace) -> None:
    """Measure as one of the ranks; the first prints."""
    torch.set_num_threads(1)
    config = TrainConfig(run="run", model=ModelConfig(preset="blt-debug"), data=DataConfig(train="data"))
    with open_runtime(config) as runtime:
        if runtime.mesh is None:
            raise SystemExit("--ranks must be at least 2")
        sizes = HashEmbeddingConfig(table_size=options.rows // 6)
        tokens = words(options.tokens, runtime.rank)
        gathered = HashEmbedding(sizes, options.dim)
        nn.init.normal_(gathered.weight)
        exchanged = ShardedHashEmbedding(gathered, runtime.mesh)
        nn.init.normal_(local_rows(exchanged.weight.detach()))
        fully_shard(gathered, mesh=runtime.mesh)
        times = {
            "gather": seconds(step_of(gathered, tokens), runtime, options.repeats),
            "exchange": seconds(step_of(exchanged, tokens), runtime, options.repeats),
        }
        needed = len(torch.unique(hash_rows(tokens, torch.arange(len(tokens)), sizes)))
        if runtime.is_main:
            report(options, times, needed / len(tokens), runtime.world_size)


def report(options: argparse.Namespace, times: dict[str, float], rows_per_token: float, ranks: int) -> None:
    """Print what was measured, and what the bytes of a 1B model's step would cost."""
    print(f"{ranks} ranks, {options.rows} rows of {options.dim}, {options.tokens} tokens a rank:")
    for name, value in times.items():
        print(f"  {name:9} {1e3 * value:8.1f} ms forward and backward")
    print(f"  {rows_per_token:.2f} distinct rows a token")
    share, dim, tokens, rows = 7 / 8, 1024, 32_768, 6 * 500_002
    # Gathered and fetched in bfloat16, gradients in float32; FSDP2 gathers once, as the backward pass needs no rows.
    traffic = {
        "gather": rows * dim * (2 + 4) * share,
        "exchange": rows_per_token * tokens * dim * (2 + 4) * share,
    }
    print(f"  for the 1B model, 8 ranks, {tokens} tokens a rank, each rank sends:")
    for name, amount in traffic.items():
        costs = ", ".join(f"{1e3 * amount / rate:.1f} ms by {link}" for link, rate in LINKS.items())
        print(f"    {name:9} {amount / 1e9:6.2f} GB: {costs}")


def main() -> None:
    """Parse the options and start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    raise SystemExit(max(run_ranks(options.ranks, lambda: measure(options))))


if __name__ == "__main__":
    main()
