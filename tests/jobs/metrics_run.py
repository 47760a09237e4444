"""Run the job in a Ray of its own, scrape its node all the while as Prometheus does, and print what was seen as JSON.

    python tests/jobs/metrics_run.py INPUT OUTPUT

Run as its own process: counters live as long as a driver, and those of other jobs would be added to these.
"""

import json
import sys
import threading
import time
import urllib.request
from dataclasses import asdict

import ray
from job_layouts import job_config
from prometheus_client.parser import text_string_to_metric_families

from jobs.transcribe import run

WAIT_S = 60  # for the last export; Ray makes one every second here


def scrape() -> list[dict]:
    """The job's series on this node: name, kind, labels, value."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return [
        {"name": sample.name, "kind": family.type, "labels": sample.labels, "value": sample.value}
        for family in families
        if family.name.startswith("ray_parakeet_")
        for sample in family.samples
    ]


def shards_seen(series: list[dict]) -> float:
    return sum(one["value"] for one in series if one["name"] == "ray_parakeet_shards_total")


def main(source: str, output: str) -> None:
    config = {"metrics_report_interval_ms": 1000}  # Ray's default of 10 s is longer than this run
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _system_config=config)
    done, during = threading.Event(), []

    def watch() -> None:
        while not done.wait(0.2):
            during.append(shards_seen(scrape()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        receipt = run(job_config(source, output, shard_audio_s=20, max_error_rate=0.5, model_actors=(1, 2)))
    finally:
        done.set()
        watcher.join()
    deadline = time.monotonic() + WAIT_S
    while shards_seen(series := scrape()) < receipt.shards and time.monotonic() < deadline:
        time.sleep(0.2)
    print("\n" + json.dumps({"during": during, "after": series, "receipt": asdict(receipt)}))
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
