"""What the decoder of a shard does when it meets an item that ends processes, in a process that may end."""

import signal
import subprocess
import sys
from pathlib import Path

import soundfile
from job_samples import tone

REPO = Path(__file__).resolve().parents[2]
PREAMBLE = """
import sys
from jobs.reading.isolation import ShardDecoder
from parakeet_core.errors import InputError
poison, good = (open(path, "rb").read() for path in sys.argv[1:])

def outcome(payload):
    try:
        return f"{decoder.load(payload).duration_s:.1f} s"
    except InputError as error:
        return str(error.kind)
"""


def run_with_poison(program: str, folder: Path, deed: str = "crash") -> subprocess.CompletedProcess:
    """Run a program that knows a poisoned and a good file of 1 s."""
    for name, title in (("poison", f"poison: {deed}"), ("good", "good")):
        with soundfile.SoundFile(folder / name, "w", 16000, 1, "PCM_16", format="WAV") as file:
            file.title = title
            file.write(tone(1.0))
    command = [sys.executable, "-c", PREAMBLE + program, folder / "poison", folder / "good"]
    return subprocess.run(
        command, env={"PYTHONPATH": f"{REPO / 'tests/poison'}:{REPO}"}, capture_output=True, text=True, timeout=120
    )


def test_a_first_try_is_made_in_this_process(tmp_path):
    done = run_with_poison("decoder = ShardDecoder()\nwith decoder.shard(): outcome(poison)", tmp_path)
    assert done.returncode == -signal.SIGSEGV, done.stderr


def test_a_careful_shard_outlives_its_poison_and_so_do_the_shards_behind_it(tmp_path):
    program = """
decoder = ShardDecoder(careful_shards=1)
for _ in range(3):
    with decoder.shard():
        print([outcome(payload) for payload in (good, poison, good)])
"""
    done = run_with_poison(program, tmp_path)
    assert done.stdout.splitlines() == ["['1.0 s', 'decoder_crash', '1.0 s']"] * 3, done.stderr
    assert done.returncode == 0


def test_only_the_shards_that_were_lost_are_careful(tmp_path):
    program = """
decoder = ShardDecoder(careful_shards=1)
for payload in (good, poison):
    with decoder.shard():
        print(outcome(payload), flush=True)
"""
    done = run_with_poison(program, tmp_path)
    assert (done.stdout, done.returncode) == ("1.0 s\n", -signal.SIGSEGV), done.stderr


def test_the_memory_limit_of_the_worker_passes_the_item_on(tmp_path):
    program = """
decoder = ShardDecoder()
with decoder.shard():
    print(outcome(poison), outcome(good), len(bytes(5 << 30)) >> 30)
"""
    done = run_with_poison(program, tmp_path, "eat")  # memory outside decoding may reach 5 GiB
    assert done.stdout == "decoder_crash 1.0 s 5\n", done.stderr


def test_limits_that_the_machine_sets_itself_are_kept(tmp_path):
    program = """
import resource
resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))
decoder = ShardDecoder()
with decoder.shard():
    print(outcome(good), outcome(poison), outcome(good), resource.getrlimit(resource.RLIMIT_DATA)[0] >> 30)
"""
    done = run_with_poison(program, tmp_path, "eat")
    assert done.stdout == "1.0 s decoder_crash 1.0 s 3\n", done.stderr


def test_memory_refused_to_another_thread_counts_as_a_lost_worker(tmp_path):
    done = run_with_poison("with ShardDecoder().shard(): raise MemoryError", tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
