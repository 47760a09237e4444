"""A Ray cluster of several nodes on this machine, each with the processes of its own `ray start`, to be killed."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray
from job_process import REPO, WAIT_S, session_members
from s3_server import free_port

RAY = str(Path(sys.executable).with_name("ray"))
OBJECT_STORE_BYTES = 150 << 20
AGENT_PORTS = (
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
    "runtime-env-agent-port",
)
NODE_BYTES = 6 << 30  # what Ray accounts for; actors ask for about 1 GiB each


class RayNodes:
    """A head, and nodes that come and go. Use as a context manager.

    Args:
        head_cpus: CPUs of the head; by default it does no work.
        grows_by: resources of a node that Ray's autoscaler adds, at most two, and takes away when they are idle.
        quick: notice a dead node after 5 s, not after 15 s as Ray does by default and in clusters.

    Attributes:
        address: for `--ray-address`.
        environment: what a client of this cluster needs.
        dashboard_url: for `ray job`.
    """

    def __init__(
        self,
        dashboard: bool = False,
        head_cpus: int = 0,
        grows_by: dict[str, float] | None = None,
        quick: bool = False,
    ):
        self.folder = tempfile.mkdtemp(prefix="pb-ray-")  # short: it holds Unix sockets
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_DISABLE_IMPORT_WARNING": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "PYTHONPATH": f"{REPO}:{Path(__file__).parent}",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self.environment.pop("RAY_ADDRESS", None)
        if quick:
            self.environment |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "5"}
        self.nodes: list[subprocess.Popen] = []
        port, dashboard_port = free_port(), free_port()
        self.address, self.dashboard_url = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}"
        options = ["--head", f"--port={port}", f"--temp-dir={self.folder}", "--num-gpus=0"]
        options += [f"--include-dashboard={str(dashboard).lower()}", f"--dashboard-port={dashboard_port}"]
        if grows_by is not None:
            options.append(f"--autoscaling-config={self._autoscaling(port, head_cpus, grows_by)}")
        self.head = self._start(options, head_cpus)

    def _autoscaling(self, port: int, head_cpus: int, grows_by: dict[str, float]) -> str:
        """The autoscaler's configuration: nodes are processes on this machine, started by its head."""
        provider = {
            "type": "external",
            "module": "fake_nodes.NodeProvider",
            "gcs_address": f"{ray.util.get_node_ip_address()}:{port}",
        }
        flags = ("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check")
        limits = {"memory": NODE_BYTES, "object_store_memory": OBJECT_STORE_BYTES}
        types = {
            "ray.head.default": {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": grows_by | limits, "node_config": {}, "min_workers": 0, "max_workers": 2},
        }
        path = Path(self.folder, "autoscaling.json")
        config = {
            "cluster_name": "test",
            "max_workers": 2,
            "idle_timeout_minutes": 0.1,
            "upscaling_speed": 10,
            "provider": provider | dict.fromkeys(flags, True),
            "auth": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            **dict.fromkeys(("initialization_commands", "head_setup_commands", "worker_setup_commands"), []),
            **dict.fromkeys(("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"), []),
            "head_node_type": "ray.head.default",
            "available_node_types": types,
        }
        path.write_text(json.dumps(config))
        return str(path)

    def count_nodes(self) -> int:
        """Nodes of the head's session: itself, and those that the autoscaler has added."""
        return len(session_members(self.head.pid, "raylet/raylet"))

    def add_node(self, cpus: int = 1, resources: dict[str, float] | None = None) -> subprocess.Popen:
        custom = dict(resources or {})
        options = [f"--address={self.address}", f"--num-gpus={custom.pop('GPU', 0):.0f}"]
        options.append(f"--resources={json.dumps(custom)}")
        try:
            node = self._start(options, cpus)
        except RuntimeError:  # Ray gives a node 30 s to start, too little on a machine with ten other runs
            node = self._start(options, cpus)
        self.nodes.append(node)
        return node

    def _start(self, options: list[str], cpus: int) -> subprocess.Popen:
        command = [RAY, "start", "--block", f"--num-cpus={cpus}", *options]
        command += [f"--object-store-memory={OBJECT_STORE_BYTES}", f"--memory={NODE_BYTES}"]
        # Ports given here are not waited for: a raylet gives up if an agent takes over 15 s to report one of its own.
        command += [f"--{port}={free_port()}" for port in AGENT_PORTS]
        log = open(f"{self.folder}/start-{len(self.nodes)}-{time.monotonic_ns()}.log", "w")  # noqa: SIM115 - the process writes it
        node = subprocess.Popen(
            command, cwd=REPO, env=self.environment, start_new_session=True, stdout=log, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + WAIT_S
        while "Ray runtime started" not in Path(log.name).read_text():
            if node.poll() is not None or time.monotonic() > deadline:
                self.kill_node(node)
                raise RuntimeError(f"the node did not start: {Path(log.name).read_text()}")
            time.sleep(0.1)
        return node

    @staticmethod
    def kill_node(node: subprocess.Popen) -> None:
        """kill -9 of every process of a node, as when a spot node is lost."""
        for pid in session_members(node.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        node.wait()

    def run_ray(self, *arguments: str) -> subprocess.CompletedProcess:
        """Run a command of `ray job` against this cluster."""
        environment = self.environment | {"RAY_API_SERVER_ADDRESS": self.dashboard_url}
        return subprocess.run(
            [RAY, *arguments], cwd=REPO, env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False
        )

    def __enter__(self) -> "RayNodes":
        return self

    def __exit__(self, *_) -> None:
        for node in [*self.nodes, self.head]:
            self.kill_node(node)
        shutil.rmtree(self.folder, ignore_errors=True)
