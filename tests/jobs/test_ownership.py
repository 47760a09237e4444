"""jobs/table/ownership.py, jobs/resume.py: of drivers that begin together one goes on; what a receipt accounts for."""

import hashlib
import json
import shutil
import threading
from dataclasses import replace

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from job_layouts import TINY_EN, job_config
from job_samples import audio_bytes

from jobs.config import TranscribeConfig
from jobs.inputs.plan_rows import plan_batch
from jobs.planning.generations import list_generations
from jobs.planning.shards import PlanOptions, plan_shards
from jobs.planning.store import shard_name, write_plan
from jobs.preparation import Run, prepare
from jobs.resume import account_earlier
from jobs.storage.files import Storage
from jobs.table.ownership import JOB_FILE, JobIdentity, claim_output
from jobs.table.parts import commit_part, find_committed, part_name
from jobs.table.schema import TRANSCRIPT_SCHEMA, file_metadata, part_facts
from jobs.table.shard_names import pack_shards, unpack_shards
from parakeet_core.errors import CheckpointError, ConfigError

ROUNDS, DRIVERS = 4, 3


@pytest.mark.parametrize("differing", ["plans", "models"])
def test_of_drivers_that_begin_at_once_one_goes_on(storage, differing):
    """Also on a server without conditional put, like the one of these tests, which lets all their writes through."""
    outputs = [Storage(f"{storage.url}/{number}", storage.options) for number in range(ROUNDS)]
    gates = [threading.Barrier(DRIVERS) for _ in outputs]
    ended: list[list] = [[] for _ in outputs]

    def begin(round_: int, driver: int) -> None:
        limit_s = 10.0 + driver * (differing == "plans")
        identity = JobIdentity(f"{driver * (differing == 'models')}", "float32", "m")
        ids = [f"{number}" for number in range(50)]
        with plan_shards(
            [plan_batch("file", {"id": ids, "source": ids, "audio_s": [1.0] * 50, "items": [1] * 50})],
            PlanOptions(shard_audio_s=limit_s),
        ) as plan:
            gates[round_].wait()
            output = outputs[round_]
            try:
                generation = write_plan(output, plan)
                if generation.fingerprint != plan.fingerprint:
                    raise ConfigError("told by the plan")
                claim_output(output, identity, [generation])
                ended[round_].append((plan.fingerprint, identity.fingerprint))
            except ConfigError:
                ended[round_].append(None)

    threads = [
        threading.Thread(target=begin, args=(round_, driver)) for round_ in range(ROUNDS) for driver in range(DRIVERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output, results in zip(outputs, ended, strict=True):
        going = [result for result in results if result is not None]
        assert len(results) == DRIVERS
        assert len(going) == 1, results
        assert [generation.fingerprint for generation in list_generations(output)] == [going[0][0]]
        assert json.loads(output.read_bytes(JOB_FILE))["fingerprint"] == going[0][1]


@pytest.fixture
def begun(tmp_path) -> TranscribeConfig:
    """A run that has claimed its output, with a model that may be changed."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.wav").write_bytes(audio_bytes(0.5))
    shutil.copytree(TINY_EN, tmp_path / "model")
    config = job_config(tmp_path / "in", tmp_path / "out", model=str(tmp_path / "model"), dtype="float32")
    begin_run(config)
    return config


def begin_run(config: TranscribeConfig) -> Run:
    run = prepare(config)
    claim_output(run.output, run.identity, run.generations)
    return run


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer.json"])
def test_a_changed_file_beside_the_same_weights_is_another_model(begun, name):
    first = prepare(begun)
    with open(f"{begun.model}/{name}", "a") as file:
        file.write("\n")
    with pytest.raises(ConfigError, match=f"was begun with another {name} beside the same weights .*--new-version"):
        prepare(begun)
    with pytest.raises(CheckpointError, match=f"{name} on this node is not what the job began with"):
        first.model.load("float32", "cpu")
    other = begin_run(replace(begun, new_version=True))
    assert other.output.url == f"{first.output.url}/versions/{other.fingerprint}"
    assert prepare(replace(begun, new_version=True)).output.url == other.output.url


def test_outputs_that_do_not_say_these_files_go_on(begun):
    """Begun before the files were recorded: nothing is compared, and names stay what they were."""
    root = prepare(begun).output
    for dtype, folder in (("float32", ""), ("bfloat16", "versions/{}/")):
        weights = prepare(begun).identity.weights_sha256
        fingerprint = hashlib.sha256(json.dumps([1, 1, weights, dtype]).encode()).hexdigest()[:10]
        record = {"fingerprint": fingerprint, "weights_sha256": weights, "dtype": dtype, "model": "m"}
        root.write_atomic(f"{folder.format(fingerprint)}job.json", json.dumps(record).encode())
        with open(f"{begun.model}/tokenizer.json", "a") as file:
            file.write("\n")
        run = begin_run(replace(begun, dtype=dtype, new_version=bool(folder)))
        assert run.fingerprint == fingerprint
        assert f"{run.output.url}/" == f"{root.url}/{folder.format(fingerprint)}"


@given(st.sets(st.tuples(st.integers(0, 2), st.integers(0, 30), st.sampled_from(["aa", "bb"]))))
def test_packed_shards_are_the_shards(shards):
    names = {f"{generation:04d}-{number:06d}-{plan}" for generation, number, plan in shards}
    assert unpack_shards(pack_shards(names)) == names


def test_the_millionth_shard_and_the_ten_thousandth_generation_are_found(tmp_path):
    output = Storage(str(tmp_path))
    shards = {shard_name(0, number, "1f2e3d4c") for number in range(999_998, 1_000_003)}
    shards.add(shard_name(10_000, 0, "1f2e3d4c"))
    for shard in shards:
        output.write_atomic(part_name(shard, "ab"), b"")
    assert find_committed(output, "ab", shards).shards == shards
    packed = pack_shards(shards)
    assert packed["0000-1f2e3d4c"] == "999998-1000002"
    assert unpack_shards(packed) == shards


@pytest.mark.parametrize(
    ("kind", "again"),
    [
        ("decoder_missing", True),  # fixed by pip install
        ("unexpected", True),  # the MemoryError of a full host, or a defect that a later version does not have
        ("decoder_crash", True),
        ("storage", True),
        ("not_audio", False),
        ("too_long", False),  # no option moves its limits
    ],
)
def test_errors_whose_cause_lies_outside_the_item_are_done_again_on_request(kind, again, tmp_path):
    output, shard = Storage(str(tmp_path)), "0000-000000-abcd1234"
    row = {"id": "a", "source": "/a.m4a", "status": "error", "error_kind": kind, "error_message": "found x"}
    table = pa.Table.from_pylist([row], schema=TRANSCRIPT_SCHEMA)
    commit_part(output, part_name(shard, "f" * 10), table, file_metadata({}, part_facts(table), {"shard": shard}))
    assert account_earlier(output, "f" * 10, {shard}, retry_errors=False).shards == {shard}
    assert account_earlier(output, "f" * 10, {shard}, retry_errors=True).shards == (set() if again else {shard})
