"""The forecast: the simulation against arithmetic, and against a real run on a real S3 server."""

import json
import math
import re
from collections import Counter
from datetime import datetime
from urllib.parse import parse_qs

import numpy as np
import pytest
from fault_proxy import FaultProxy, Request
from job_layouts import job_config
from job_samples import audio_bytes

from jobs.fleet import Fleet, simulate_run
from jobs.forecast import ForecastConfig, count_requests, forecast_plan, main
from jobs.storage.files import Storage
from jobs.transcribe import run
from parakeet_core.errors import ConfigError

ITEMS, ITEM_S, SHARD_S = 60, 4.0, 21.0  # five items fit in a shard
WALL_FACTOR = 1.5  # the simulation has no scheduling, and real actors do not begin at the same moment
OTHER_REQUESTS = 60  # of any run, whatever its size: job file, plan, receipt


def test_one_actor_works_through_the_sum():
    run_ = simulate_run([100, 50, 50], Fleet(models=1, model_rtfx=10, start_s=5, shard_s=1))
    assert run_.wall_s == pytest.approx(5 + 20 + 3)
    assert (run_.idle_share, run_.losses, run_.shards) == (pytest.approx(0), 0, (3,))
    assert run_.model_hours == pytest.approx(28 / 3600)


def test_longest_first_ends_evenly():
    run_ = simulate_run([40, 30, 20, 10], Fleet(models=2, model_rtfx=1))
    assert run_.wall_s == pytest.approx(50)
    assert run_.idle_share == pytest.approx(0)


def test_too_few_feature_actors_leave_the_models_idle():
    fleet = Fleet(models=2, model_rtfx=100, features=3, feature_rtfx=20)
    run_ = simulate_run(np.full(600, 10.0), fleet)
    assert run_.wall_s == pytest.approx(6000 / 60, rel=0.01)
    assert run_.idle_share == pytest.approx(1 - 60 / 200, abs=0.01)


def test_losses_cost_what_was_in_hand_and_a_start_each():
    shards, fleet = np.full(5000, 600.0), Fleet(models=10, model_rtfx=20, start_s=60, losses_per_hour=0.5, seed=7)
    run_, quiet = simulate_run(shards, fleet), simulate_run(shards, Fleet(models=10, model_rtfx=20, start_s=60))
    work_s = shards.sum() / 20
    assert sum(run_.shards) == 5000
    assert run_.busy_hours * 3600 == pytest.approx(work_s + run_.lost_s)
    hours = work_s / 3600
    assert abs(run_.losses - 0.5 * hours) < 4 * math.sqrt(0.5 * hours)
    assert 5 < run_.lost_s / run_.losses < 25  # about half of the 30 s that a shard takes
    assert quiet.wall_s < run_.wall_s < quiet.wall_s + 1.2 * run_.losses * (60 + 30) / 10 + 60
    assert simulate_run(shards, fleet) == run_


def test_shards_that_cannot_be_finished_are_refused():
    with pytest.raises(ConfigError, match="shorter shards"):
        simulate_run([36_000.0], Fleet(models=1, model_rtfx=1, losses_per_hour=10))


@pytest.mark.usefixtures("ray_cluster")
def test_a_real_run_on_s3_is_as_forecast(s3_server, monkeypatch):
    bucket = s3_server.bucket()
    (s3_server.folder / bucket / "in").mkdir()
    for number in range(ITEMS):
        (s3_server.folder / bucket / f"in/{number:03d}.wav").write_bytes(audio_bytes(ITEM_S))
    with FaultProxy(s3_server.endpoint_url) as proxy:
        for name, value in s3_server.variables(proxy.endpoint_url).items():
            monkeypatch.setenv(name, value)
        job = job_config(f"s3://{bucket}/in", f"s3://{bucket}/out", shard_audio_s=SHARD_S, model_actors=(2, 2))
        receipt = run(job)
    config = ForecastConfig(
        hours=ITEMS * ITEM_S / 3600, item_s=ITEM_S, rtfx=1, bytes_per_s=32_000, shard_audio_s=SHARD_S
    )
    plan = forecast_plan(config)
    assert (plan.items, plan.shards) == (receipt.items_in, receipt.shards)

    counted = Counter(purpose(request, bucket) for request in proxy.seen)
    forecast = count_requests(plan, config, receipt.wall_s)
    forecast["get audio"] += forecast.pop("get headers")  # the same objects
    for name in forecast.keys() - {"put events", "list parts"}:
        assert counted[name] == forecast[name], name
    assert sum(counted.values()) - sum(forecast.values()) < OTHER_REQUESTS

    started, commits = events_of(Storage(job.output, job.storage()))
    worked_s = sum(receipt.stage_seconds.values())
    start_s = commits[0] - started - worked_s / plan.shards
    fleet = Fleet(models=2, model_rtfx=receipt.hours_done * 3600 / worked_s, start_s=max(start_s, 0.0))
    wall_s = commits[-1] - started
    assert wall_s / WALL_FACTOR < simulate_run(plan.shard_audio_s, fleet).wall_s < wall_s * WALL_FACTOR


def purpose(request: Request, bucket: str) -> str:
    """The name that the forecast uses for a request."""
    method, path = request.method, request.path.removeprefix(f"/{bucket}")
    if request.is_listing:
        method, path = "LIST", f"/{parse_qs(request.query).get('prefix', [''])[0]}"
    kinds = [
        ("LIST /in/", "list input"),
        (r"(GET|HEAD) /in/", "get audio"),
        (r"(GET|HEAD) /out/plan/.*-\d{5}\.parquet", "get plan rows"),
        (r"(GET|HEAD) /out/transcripts/", "get report"),
        ("PUT /out/transcripts/", "put parts"),
        ("PUT /out/plan/", "put plan"),
    ]
    return next((name for pattern, name in kinds if re.match(pattern, f"{method} {path}")), "other")


def events_of(output: Storage) -> tuple[float, list[float]]:
    """(start of the run, each commit), seconds since the epoch."""
    lines = "".join(output.read_bytes(f"events/{name}").decode() for name in output.list_names("events")).splitlines()
    events = [(record["event"], datetime.fromisoformat(record["at"]).timestamp()) for record in map(json.loads, lines)]
    (started,) = [at for event, at in events if event == "start"]
    return started, [at for event, at in events if event == "shard"]


def test_the_command_says_what_a_large_run_takes(capsys):
    assert main(["--hours", "20000", "--rtfx", "2000", "--gpu-hour-price", "1", "--losses-per-hour", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "40,000 of 1,800 s" in printed
    assert "pack them into tars" in printed
    assert main(["--hours", "20000", "--rtfx", "2000", "--tar-mb", "500"]) == 0
    assert "pack them" not in capsys.readouterr().out
    assert main(["--hours", "0", "--rtfx", "1"]) == 2


@pytest.mark.parametrize(
    "option",
    ["hours=inf", "hours=nan", "hours=1e-4", "rtfx=inf", "rtfx=0", "item-s=inf", "feature-actors=-1", "seed=-1"]
    + ["feature-actors=0", "losses-per-hour=-1", "losses-per-hour=nan", "start-s=-5", "start-s=inf"]
    + ["gpu-hour-price=-1"],
)
def test_what_no_run_can_be_is_refused_in_a_line(option, capsys):
    name, _, value = option.partition("=")
    options = {"hours": "1", "rtfx": "1000", name: value}
    assert main([f"--{name}={value}" for name, value in options.items()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: --{name} ")
    assert printed.err.count("\n") == 1
