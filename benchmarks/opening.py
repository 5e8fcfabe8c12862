"""Opening a pack of 1.28 M samples: time, and memory above what the imports take.

The index of one view index of ImageNet is generated (no tars, which opening does not read). Opening means:
parse pack.json, prove the index by its SHA-256, map it, plan the first epoch, and read the records of the
first batch.

    goals: under 2 s, under 300 MB

Run: python benchmarks/opening.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from proteus_cache.cache.receipt import FileRecord
from proteus_cache.documents import MAX_DOCUMENT_BYTES
from proteus_cache.pack.document import PackDocument, PackTar, PackView
from proteus_cache.pack.index import RECORD, seal_records
from proteus_cache.pack.reader import open_pack
from proteus_cache.pack.writer import index_buffers
from proteus_cache.storage import read_bytes, remove, write_new

N_SAMPLES = 1_281_167
SHARD_SIZE = 1024
BATCH = 1024
TIME_GOAL_S = 2.0
MEMORY_GOAL_MB = 300.0


def main() -> int:
    """Generate the pack and open it in a fresh process; 1 when a goal is missed."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "pack")
        _made_up_pack(root)
        print(
            f"pack.json {(root / 'pack.json').stat().st_size:,} bytes, "
            f"index {(root / 'v000.idx').stat().st_size:,} bytes"
        )
        sys.stdout.flush()
        return subprocess.run([sys.executable, __file__, str(root)], check=False).returncode


def open_and_report(root: Path) -> int:
    """Open the pack at `root` and print what it cost."""
    before = _peak_mb()
    started = time.perf_counter()
    pack = open_pack(root)
    pack.check_index("v000")
    order = pack.training_order(seed=0, batch_size=BATCH)
    records = pack.sample_reader().index("v000").read(order.batch(0).records)
    seconds, megabytes = time.perf_counter() - started, _peak_mb() - before
    assert len(pack) == N_SAMPLES
    assert records.size == BATCH
    met = seconds < TIME_GOAL_S and megabytes < MEMORY_GOAL_MB
    print(
        f"open: {seconds:.2f} s, goal {TIME_GOAL_S:.0f} s; "
        f"{megabytes:.0f} MB above the imports, goal {MEMORY_GOAL_MB:.0f} MB"
    )
    print("met" if met else "MISSED")
    return 0 if met else 1


def _peak_mb() -> float:
    """Largest resident size of this program so far (that of `getrusage` also counts what ran before exec)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))


def _made_up_pack(root: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.pack.synthetic import write_pack

    write_pack(root, n_images=2, shard_size=2, views=("v000",), patch_bytes=197_376)
    small = PackDocument.parse(read_bytes(root / "pack.json", MAX_DOCUMENT_BYTES), "pack.json")
    rows = np.arange(N_SAMPLES)
    records = np.zeros(N_SAMPLES, dtype=RECORD)
    stride = 512 * (1 + 386 + 1 + 69 + 1 + 2)  # blocks of codes, view and document, each after its header
    records["tar"], records["row"] = rows // SHARD_SIZE, rows
    for name, start, size in (("codes", 1, 197_376), ("view", 388, 35_000), ("json", 458, 900)):
        records[f"{name}_offset"] = 512 * start + (rows % SHARD_SIZE) * stride
        records[f"{name}_size"] = size
    counts = np.bincount(rows // SHARD_SIZE).tolist()
    sealed = seal_records(records)
    remove(root / "v000.idx")
    written = write_new(
        root / "v000.idx",
        index_buffers(
            0,
            N_SAMPLES,
            len(counts),
            small.code_bytes,
            [sealed[sealed["tar"] == t] for t in range(len(counts))],
        ),
    )
    tars = [
        PackTar(size=stride * n + 1024, sha256=f"{t:064x}", receipt="f" * 64, n_samples=n) for t, n in enumerate(counts)
    ]
    index = FileRecord(size=written.size, sha256=written.sha256)
    packed = {"v000": PackView(index=index, n_samples=N_SAMPLES, tars=tars)}
    document = small.model_copy(update={"n_images": N_SAMPLES, "shard_size": SHARD_SIZE, "packed": packed})
    remove(root / "pack.json")
    write_new(root / "pack.json", document.sealed())


if __name__ == "__main__":
    sys.exit(open_and_report(Path(sys.argv[1])) if len(sys.argv) == 2 else main())
