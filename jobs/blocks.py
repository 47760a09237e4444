"""A shard between two stages of the job, and the clock that goes with it. Needs no torch.

It is one row of one block: its id and a payload, an Arrow IPC stream with a row per item. One row cannot be split,
whatever the block size limits are, so a stage always holds a whole shard, and a part all of its rows.
"""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

STAGES = ("storage", "decode", "features", "model", "write")


@dataclass
class StageClock:
    """Seconds that one shard spent in each step, and where. The fields are columns of every block between stages."""

    storage_s: float = 0.0
    decode_s: float = 0.0
    features_s: float = 0.0
    model_s: float = 0.0
    write_s: float = 0.0
    feature_worker: str = ""  # which process did it, to count the workers
    model_worker: str = ""
    feature_worker_again: bool = False  # whether Ray started it again after its process or node was lost
    model_worker_again: bool = False
    not_compiled: str = ""  # why the model ran uncompiled although it was to be compiled

    def timed(self, step: str, call: Callable, *arguments):
        """Call, and add its wall time to `step`."""
        start = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            self.add(step, time.perf_counter() - start)

    def add(self, step: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        setattr(self, f"{step}_s", getattr(self, f"{step}_s") + seconds)


def worker_name() -> str:
    """The name of this process within the cluster."""
    return f"{platform.node()}:{os.getpid()}"


def pack_shard(shard: str, table: pa.Table, clock: StageClock) -> pa.Table:
    """A block of one row that carries a shard from one stage to the next."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    payload = pa.Array.from_buffers(pa.large_binary(), 1, [None, _offsets(sink.tell()), sink.getvalue()])
    columns = {"shard": pa.array([shard]), "payload": payload}
    return pa.table(columns | {name: pa.array([value]) for name, value in asdict(clock).items()})


def _offsets(size: int) -> pa.Buffer:
    return pa.py_buffer(np.array([0, size], dtype=np.int64))


def unpack_shard(block: pa.Table) -> tuple[str, pa.Table, StageClock]:
    """The shard of a block, without copying it."""
    if block.num_rows != 1:
        raise RuntimeError(f"a block holds {block.num_rows} shards; the pipeline must keep one shard in one block")
    row = block.slice(0, 1)
    clock = StageClock(**{name: row[name][0].as_py() for name in StageClock.__dataclass_fields__})
    return row["shard"][0].as_py(), pa.ipc.open_stream(row["payload"][0].as_buffer()).read_all(), clock
