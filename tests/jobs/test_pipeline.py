"""What a worker keeps of its memory, and that a block carries a shard unchanged."""

import platform
import subprocess
import sys

import pyarrow as pa
import pytest

from jobs.blocks import StageClock, pack_shard, unpack_shard

MEMORY_AFTER_A_BATCH = """
import sys
from pathlib import Path
import torch
from jobs.stages import keep_freed_memory

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

torch.set_num_threads(1)
if sys.argv[1] == "kept":
    keep_freed_memory()
before = resident_mib()
states = [torch.ones(1 << 21) for _ in range(16)]  # 8 MiB each
del states
print(resident_mib() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_memory_of_a_batch_is_kept_for_the_next_one():
    command = [sys.executable, "-c", MEMORY_AFTER_A_BATCH]
    kept, given_back = (int(subprocess.check_output([*command, how])) for how in ("kept", "given back"))
    assert given_back < 16 < 120 < kept  # of 128


def test_a_packed_shard_comes_back_as_it_was():
    table = pa.table({"id": ["a", "b"], "features": pa.array([b"", b"\x00\x01"], pa.large_binary())})
    clock = StageClock(storage_s=1.5, model_s=2.5)
    shard, found, found_clock = unpack_shard(pack_shard("0000-000001", table, clock))
    assert shard == "0000-000001"
    assert found.equals(table)
    assert found_clock == clock


def test_two_shards_in_one_block_are_a_defect():
    block = pack_shard("0000-000001", pa.table({"id": ["a"]}), StageClock())
    with pytest.raises(RuntimeError, match="2 shards"):
        unpack_shard(pa.concat_tables([block, block]))
