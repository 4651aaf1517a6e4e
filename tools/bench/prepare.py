"""Text prepared per second and core, against datatrove's reader and plain pyarrow; and memory on a larger corpus.

    uv run python -m tools.bench.prepare [--megabytes 1000] [--repeats 3] [--memory-limit 500MB] [--no-memory]

Same Parquet files in FineWeb-Edu's columns on all sides, one process on one core, one thread of Arrow's, by turns:

- datatrove: its ParquetReader, the documents counted and thrown away: what every datatrove pipeline
  pays before it does anything;
- pyarrow: the columns id and text read, and written to an uncompressed Arrow file: no order, no checksums, no fsync;
- ours: `prepare` with its shuffle, from the files to finished shards, two checksums of every byte and all fsyncs.

Before the clock starts, each side's process writes and removes a file of four times the corpus: a virtual machine may
have to fetch memory from its host when a page is used for the first time in a while (here that costs ten times as much
as writing the page), and which side pays for that would be chance.

Then `prepare` runs with two workers on a corpus ten times as large as its memory limit, and the memory of all its
processes (their proportional set sizes together) is looked at twenty times a second. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blt_data.ingest import PrepareConfig, prepare
from blt_data.units import ByteSize

SAMPLE = Path(__file__).parents[2].parent / "shared" / "data" / "fineweb-edu-sample"

#: Documents per row group, as in the files of FineWeb-Edu.
ROWS = 1000


def local_documents() -> tuple[str, pa.Table]:
    """Return some documents of this machine in FineWeb-Edu's columns: a sample of it, or the standard library."""
    files = sorted(SAMPLE.rglob("*.parquet")) if SAMPLE.exists() else []
    if files:
        return "fineweb-edu-sample", pa.concat_tables([pq.read_table(path) for path in files])
    root = Path(os.__file__).parent
    paths = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
    texts = [path.read_text(errors="replace") for path in paths]
    columns = {
        "text": texts,
        "id": [f"<urn:uuid:{number:032x}>" for number in range(len(texts))],
        "dump": ["CC-MAIN-2024-10"] * len(texts),
        "url": [f"https://example.org/{path.name}" for path in paths],
        "file_path": [f"s3://example/{number:08d}.warc.gz" for number in range(len(texts))],
        "language": ["en"] * len(texts),
        "language_score": [0.9] * len(texts),
        "token_count": [len(text) // 4 for text in texts],
        "score": [3.5] * len(texts),
        "int_score": [4] * len(texts),
    }
    return "python-stdlib", pa.table(columns)


def write_corpus(folder: Path, documents: pa.Table, num_bytes: int, files: int) -> int:
    """Repeat documents in Parquet files; return the bytes of text."""
    folder.mkdir(parents=True)
    size = pc.sum(pc.binary_length(documents["text"])).as_py()
    rounds = max(1, round(num_bytes / size))
    for index in range(files):
        share = rounds * (index + 1) // files - rounds * index // files
        if share:
            table = pa.concat_tables([documents] * share)
            path = folder / f"{index:03d}_00000.parquet"
            pq.write_table(table, path, compression="zstd", row_group_size=ROWS)
    return int(rounds * size)


def run_datatrove(source: Path, output: Path) -> None:
    """Read all documents with datatrove and throw them away."""
    from datatrove.pipeline.readers import ParquetReader

    reader = ParquetReader(str(source), doc_progress=False, file_progress=False)
    for _ in reader.run(rank=0, world_size=1):
        pass


def run_pyarrow(source: Path, output: Path) -> None:
    """Copy two columns to an Arrow file."""
    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    with pa.OSFile(str(output), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for path in sorted(source.glob("*.parquet")):
            with pq.ParquetFile(path) as parquet:
                for batch in parquet.iter_batches(ROWS, columns=["id", "text"], use_threads=False):
                    writer.write_batch(batch.select(["id", "text"]))


def run_ours(source: Path, output: Path) -> None:
    """Prepare, shuffled."""
    prepare(PrepareConfig(source=str(source), output=output, workers=1))


SIDES: dict[str, Callable[[Path, Path], None]] = {"datatrove": run_datatrove, "pyarrow": run_pyarrow, "ours": run_ours}


def time_side(name: str, source: Path, output: Path, num_bytes: int) -> tuple[float, float]:
    """Return the seconds and the CPU seconds of one side, in a process of its own on one core."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_timed, args=(name, source, output, num_bytes, sender))
    process.start()
    seconds: tuple[float, float] = receiver.recv()
    process.join()
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)
    return seconds


def touch_memory(path: Path, num_bytes: int) -> None:
    """Make the system use as much memory for its page cache, and give it back."""
    block = bytes(16 << 20)
    with path.open("wb") as file:
        for _ in range(num_bytes // len(block)):
            file.write(block)
    path.unlink()


def _timed(name: str, source: Path, output: Path, num_bytes: int, sender: Connection) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    import datatrove.pipeline.readers  # noqa: F401  # imports are paid for before the clock starts

    import blt_data.planning
    import blt_data.stages  # noqa: F401

    touch_memory(output.with_suffix(".touch"), 4 * num_bytes)
    started, cpu = time.perf_counter(), time.process_time()
    SIDES[name](source, output)
    sender.send((time.perf_counter() - started, time.process_time() - cpu))


def measure_speed(source: Path, folder: Path, num_bytes: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return MB/s of every side, by the clock and by CPU time."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
    for _ in range(repeats):
        for name, taken in times.items():
            taken.append(time_side(name, source, folder / f"out-{name}", num_bytes))
    return {
        name: {
            "clock": num_bytes / 1e6 / statistics.median(seconds for seconds, _ in taken),
            "cpu": num_bytes / 1e6 / statistics.median(seconds for _, seconds in taken),
        }
        for name, taken in times.items()
    }


def processes(root: psutil.Process) -> Iterator[psutil.Process]:
    """Yield a process and all that it started."""
    yield root
    yield from root.children(recursive=True)


def measure_memory(source: Path, output: Path, limit: int) -> tuple[float, float]:
    """Return the peak of the memory of a `prepare` in bytes, and its seconds."""
    command = [sys.executable, "-m", "blt_data.cli", "prepare", "--source", str(source), "--output", str(output)]
    command += ["--memory-limit", str(limit), "--workers", "2"]
    started = time.perf_counter()
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    root, peak = psutil.Process(running.pid), 0
    while running.poll() is None:
        now = 0
        try:
            for process in processes(root):
                now += process.memory_full_info().pss
        except psutil.Error:
            # A process has just ended; the next look counts those that are left.
            continue
        peak = max(peak, now)
        time.sleep(0.05)
    if running.returncode:
        raise SystemExit("prepare failed")
    return float(peak), time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1000, help="of text, for the speed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-limit", default="500MB", help="a tenth of the corpus for the memory")
    parser.add_argument("--no-memory", action="store_true", help="measure the speed alone")
    options = parser.parse_args()
    limit = ByteSize().convert(options.memory_limit, None, None)
    text, documents = local_documents()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_bytes = write_corpus(folder / "small", documents, round(options.megabytes * 1e6), 4)
        speeds = measure_speed(folder / "small", folder, num_bytes, options.repeats)
        for side, speed in speeds.items():
            print(f"{side:>10}: {speed['clock']:>7.1f} MB/s by the clock, {speed['cpu']:>7.1f} MB/s of CPU time")
        memory: dict[str, float] = {}
        if not options.no_memory:
            shutil.rmtree(folder / "small")
            large = write_corpus(folder / "large", documents, 10 * limit, 20)
            peak, seconds = measure_memory(folder / "large", folder / "prepared", limit)
            memory = {"corpus_mb": large / 1e6, "limit_mb": limit / 1e6, "peak_mb": peak / 1e6, "seconds": seconds}
            print(f"{large / 1e6:,.0f} MB prepared within {limit / 1e6:,.0f} MB: {peak / 1e6:,.0f} MB at most")
    ours, reference = speeds["ours"]["clock"], speeds["datatrove"]["clock"]
    summary = {"ours": round(ours, 1), "reference": round(reference, 1), "ratio": round(ours / reference, 2)}
    every = {side: {clock: round(value, 1) for clock, value in speed.items()} for side, speed in speeds.items()}
    figures = {name: round(value, 1) for name, value in memory.items()}
    print(
        json.dumps(
            {"bench": "prepare", **summary, "unit": "MB/s per core", "text": text, "all": every, "memory": figures}
        )
    )


if __name__ == "__main__":
    main()
