"""--verify: nothing differs in a float32 table of the same model; a table of another model is detected."""

import json
from dataclasses import asdict

import pyarrow as pa
import pytest
import torch
from job_layouts import TINY_EN, job_config, part_bytes, read_table
from safetensors.torch import load_file, save_file

from jobs.models import resolve_model
from jobs.planning.generations import list_generations
from jobs.planning.store import SHARD_SCHEMA, read_plan
from jobs.storage.connections import DEFAULT_OPTIONS
from jobs.storage.files import Storage
from jobs.table.parts import find_committed
from jobs.transcribe import run
from jobs.verify import choose_samples, summarise, verify_table

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.mark.parametrize("layout", ["manifest", "webdataset", "parquet"])
def test_a_float32_table_differs_in_nothing_and_stays_as_it_is(layout, layouts, tmp_path, capsys):
    config = job_config(layouts[layout], tmp_path / "out", shard_audio_s=15, verify=8)
    receipt = run(config)
    assert "verify  0 of 8 items differ" in capsys.readouterr().out
    assert (receipt.verification["items"], receipt.verification["mismatches"]) == (8, 0)
    assert (receipt.verification["wer"], receipt.verification["failed"]) == (0.0, 0)
    on_storage = json.loads((tmp_path / "out/receipt.json").read_text())
    assert on_storage["verification"] == json.loads(json.dumps(receipt.verification))
    before = part_bytes(tmp_path / "out")
    again = run(config)
    assert (again.shards_this_run, again.verification) == (0, receipt.verification)
    assert part_bytes(tmp_path / "out") == before
    assert json.loads((tmp_path / "out/receipt.json").read_text())["stage_seconds"] == on_storage["stage_seconds"]


def test_a_table_of_another_model_is_found_out(layouts, tmp_path):
    perturbed = tmp_path / "model"
    perturbed.mkdir()
    for path in TINY_EN.iterdir():
        (perturbed / path.name).write_bytes(path.read_bytes())
    weights = load_file(TINY_EN / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: tensor + 0.3 * tensor.std() * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        if tensor.is_floating_point() and tensor.dim() > 1
        else tensor
        for name, tensor in weights.items()
    }
    save_file(noisy, perturbed / "model.safetensors")
    receipt = run(job_config(layouts["files"], tmp_path / "out", model=str(perturbed), verify=6))
    assert receipt.verification["mismatches"] == 0  # with the model that made it
    output = Storage(str(tmp_path / "out"))
    shards = read_plan(output, list_generations(output))
    files = find_committed(output, receipt.fingerprint, set(shards["shard"].to_pylist())).files
    model = resolve_model(str(TINY_EN), DEFAULT_OPTIONS)
    found = verify_table(output, shards, files, DEFAULT_OPTIONS, model, "cpu", 12)
    texts = {row["id"]: row["text"] for row in read_table(tmp_path / "out")}
    right = {row["id"]: row["text"] for row in rows_by(TINY_EN, layouts, tmp_path)}
    differing = {id_ for id_ in texts if texts[id_] != right[id_]}
    assert len(differing) > 3
    assert (found.items, set(found.differing), found.mismatches) == (12, differing, len(differing))
    assert found.wer > 0.05
    assert asdict(found)["failed"] == 0


def rows_by(model, layouts, tmp_path) -> list[dict]:
    run(job_config(layouts["files"], tmp_path / "right", model=str(model)))
    return read_table(tmp_path / "right")


def test_samples_are_spread_over_the_audio():
    rows = [
        {"shard": f"0000-{n:06d}-a", "plan_file": "p", "row_group": n, "rows": 9, "items": 9, "audio_s": 100.0 + n}
        for n in range(100)
    ]
    shards = pa.Table.from_pylist(rows, schema=SHARD_SCHEMA)
    files = {f"{row['shard']}.parquet": frozenset([row["shard"]]) for row in rows[:80]}
    samples = choose_samples(shards, files, 40)
    assert sum(sample.items for sample in samples) == 40
    numbers = [sample.row_group for sample in samples]
    assert max(numbers) < 80
    assert all(sum(first <= n < first + 10 for n in numbers) >= 3 for first in range(0, 80, 10))
    assert samples == choose_samples(shards, files, 40)
    assert choose_samples(shards, {}, 40) == []
    assert [sample.items for sample in choose_samples(shards, files, 10_000)] == [9] * 80
    assert [sample.items for sample in choose_samples(shards, files, 10**12)] == [9] * 80


def test_words_that_float32_does_not_hear_are_errors():
    pairs = [("a", "one two", "one two"), ("b", "thank you", ""), ("c", "", ""), ("d", "x", None)]
    found = summarise(pairs, 4)
    assert (found.items, found.mismatches, found.differing, found.failed) == (3, 1, ("b",), 1)
    assert found.wer == 1.0  # two words too many, of two
    assert summarise(pairs[1:], 3).wer is None
    assert summarise([], 0).describe() == "no item could be compared"
