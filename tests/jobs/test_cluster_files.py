"""cluster/ without a cluster: launcher file, Kubernetes manifests, image, README, as a user would render them.

The judges are not ours: Ray's launcher schema, botocore's EC2 model, the Kubernetes schemas, hadolint, bash, and the
job's own command line. KubeRay's fields are a hand-made extract (tests/data/kuberay-schema): no package has its CRD.
"""

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import botocore.session
import jsonschema
import kubernetes_validate
import pytest
import tyro
import yaml
from botocore.validate import ParamValidator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.autoscaler._private.util import fillout_defaults, prepare_config, validate_config

from jobs.config import TranscribeConfig

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
README = (CLUSTER / "README.md").read_text()
BASH_BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
KUBERAY_SCHEMA = json.loads((ROOT / "tests/data/kuberay-schema/kuberay-1.7.schema.json").read_text())
KUBERNETES_VERSIONS = ("1.30", "1.37")  # oldest and newest that the manifests are meant for
PLACEHOLDER = re.compile(r"@[A-Z_]+@")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    """The folder that README's render command makes from cluster/."""
    folder = tmp_path_factory.mktemp("rendered")
    shutil.copytree(CLUSTER, folder / "cluster")
    (block,) = [block for block in BASH_BLOCKS if "settings.sed" in block]
    subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=folder, check=True)
    return folder / "build/cluster"


@pytest.fixture
def aws(rendered) -> dict:
    return yaml.safe_load((rendered / "aws.yaml").read_text())


@pytest.fixture
def job(rendered) -> dict:
    return yaml.safe_load((rendered / "rayjob.yaml").read_text())


@pytest.fixture
def cluster(rendered) -> dict:
    return yaml.safe_load((rendered / "raycluster.yaml").read_text())


def test_settings_fill_every_placeholder_and_only_those(rendered):
    left = {path.name: found for path in rendered.iterdir() if (found := PLACEHOLDER.findall(path.read_text()))}
    assert left == {}
    set_names = set(re.findall(r"^s\|(@[A-Z_]+@)\|", (CLUSTER / "settings.sed").read_text(), re.MULTILINE))
    sources = [*CLUSTER.glob("*.yaml"), *CLUSTER.glob("*.json")]
    assert {path.name for path in sources} == {path.name for path in rendered.iterdir()}
    assert set_names == {name for path in sources for name in PLACEHOLDER.findall(path.read_text())}


# --- EC2


def test_rays_launcher_takes_the_file_and_adds_no_command_to_it(aws):
    merged = prepare_config(copy.deepcopy(aws))  # fillout_defaults and the launcher's further steps
    validate_config(merged)
    for name in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert merged[name] == [], f"{name}: the image would be changed at start"
    assert merged["provider"]["cache_stopped_nodes"] is False


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("idle_timeout_minuts",), 5),
        (("max_workers",), "24"),
        (("docker", "imge"), "x"),
        (("available_node_types", "gpu_spot", "max_worker"), 8),
        (("available_node_types", "gpu_spot", "docker", "image"), "x"),
        (("available_node_types", "head", "resources", "CPU"), "0"),
        (("auth", "ssh_usr"), "ubuntu"),
    ],
)
def test_rays_schema_catches_a_slip(aws, path, value):
    *parents, name = path
    place = aws
    for parent in parents:
        place = place[parent]
    place[name] = value
    with pytest.raises(jsonschema.ValidationError, match=f"{name}|{value}"):
        validate_config(fillout_defaults(aws))


def ec2_problems(node_config: dict) -> str:
    """What EC2's RunInstances would refuse in `node_config`; empty if nothing."""
    model = botocore.session.get_session().get_service_model("ec2")
    request = {"MinCount": 1, "MaxCount": 1, **node_config}
    report = ParamValidator().validate(request, model.operation_model("RunInstances").input_shape).generate_report()
    known = {
        "InstanceType": [node_config.get("InstanceType")],
        "VolumeType": [disk["Ebs"]["VolumeType"] for disk in node_config.get("BlockDeviceMappings", ())],
        "HttpTokensState": [node_config.get("MetadataOptions", {}).get("HttpTokens", "required")],
        "MarketType": [node_config.get("InstanceMarketOptions", {}).get("MarketType", "spot")],
    }
    wrong = [
        f"{kind} {value}"
        for kind, values in known.items()
        for value in values
        if value not in model.shape_for(kind).enum
    ]
    return "\n".join([report, *wrong]).strip()


def test_ec2_would_take_every_node(aws):
    for name, node_type in aws["available_node_types"].items():
        assert ec2_problems(node_type["node_config"]) == "", name


def test_the_ec2_check_sees_slips(aws):
    node = aws["available_node_types"]["gpu_spot"]["node_config"]
    assert "InstanceTyp" in ec2_problems({**node, "InstanceTyp": "g6e.2xlarge"})
    assert "InstanceType g6e.3xlarge" in ec2_problems({**node, "InstanceType": "g6e.3xlarge"})
    assert "MarketTyp" in ec2_problems({**node, "InstanceMarketOptions": {"MarketTyp": "spot"}})


def test_ec2_head_is_idle_cpu_workers_stay_gpu_workers_come_and_go(aws):
    types = dict(aws["available_node_types"])
    head = types.pop(aws["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert "--num-cpus=0" in aws["head_start_ray_commands"][-1]
    for name, node_type in types.items():
        has_gpu = re.match(r"(g|p)\d", node_type["node_config"]["InstanceType"]) is not None
        market = node_type["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        image = node_type.get("docker", {}).get("worker_image", aws["docker"]["image"])
        assert (has_gpu, market) in {(True, "spot"), (False, None)}, name
        assert image.endswith("-cuda" if has_gpu else "-cpu"), name
        assert (node_type["min_workers"] == 0) is has_gpu, name
    assert aws["max_workers"] >= sum(node_type["max_workers"] for node_type in types.values())


# --- Kubernetes


def pods_of(spec: dict) -> dict[str, dict]:
    """Every pod template of a RayCluster's spec as a Pod; the autoscaler's container is put beside the head's."""
    templates = {"head": copy.deepcopy(spec["headGroupSpec"]["template"])}
    templates |= {group["groupName"]: copy.deepcopy(group["template"]) for group in spec["workerGroupSpecs"]}
    options = spec["autoscalerOptions"]
    autoscaler = {"name": "autoscaler", "image": "x", **{key: options[key] for key in ("resources", "securityContext")}}
    templates["head"]["spec"]["containers"].append(autoscaler)
    return {
        name: {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, **template.get("metadata", {})},
            "spec": template["spec"],
        }
        for name, template in templates.items()
    }


def check_manifest(manifest: dict, kind: str, ray: dict, version: str) -> None:
    """Refuse unknown fields and wrong types, in KubeRay's part and in the pods."""
    schema = {"$ref": f"#/$defs/{kind}", "$defs": KUBERAY_SCHEMA["$defs"]}
    jsonschema.Draft202012Validator(schema).validate(manifest)
    for pod in pods_of(ray).values():
        kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_kubernetes_and_kuberay_take_job_cluster_and_accounts(rendered, job, cluster, version):
    check_manifest(job, "RayJob", job["spec"]["rayClusterSpec"], version)
    check_manifest(cluster, "RayCluster", cluster["spec"], version)
    assert job["spec"]["rayClusterSpec"] == cluster["spec"], "the two manifests describe different clusters"
    accounts = list(yaml.safe_load_all((rendered / "serviceaccounts.yaml").read_text()))
    for account in accounts:
        kubernetes_validate.validate(account, version, strict=True)
    used = {pod["spec"]["serviceAccountName"] for pod in pods_of(cluster["spec"]).values()}
    assert used == {account["metadata"]["name"] for account in accounts}


@pytest.mark.parametrize(
    "path",
    [
        ("backofLimit",),
        ("rayClusterSpec", "enableInTreeAutoscalling"),
        ("rayClusterSpec", "autoscalerOptions", "idleTimeoutSecond"),
        ("rayClusterSpec", "workerGroupSpecs", 1, "maxReplica"),
        ("rayClusterSpec", "headGroupSpec", "template", "spec", "serviceAccount_name"),
        ("rayClusterSpec", "workerGroupSpecs", 1, "template", "spec", "tolerations", 0, "effects"),
        ("rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "envfrom"),
        ("rayClusterSpec", "autoscalerOptions", "securityContext", "runAsNonroot"),
    ],
)
def test_an_unknown_field_is_caught_at_any_depth(job, path):
    *parents, name = path
    place = job["spec"]
    for parent in parents:
        place = place[parent]
    place[name] = "x"
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError), match=str(name)):
        check_manifest(job, "RayJob", job["spec"]["rayClusterSpec"], KUBERNETES_VERSIONS[-1])


def test_kuberays_own_rules_hold(job):
    """What the operator refuses beyond the schema (its ValidateRayJobSpec and ValidateRayClusterSpec, KubeRay 1.7)."""
    spec, ray = job["spec"], job["spec"]["rayClusterSpec"]
    assert spec["submissionMode"] == "SidecarMode"
    assert not {"submitterPodTemplate", "submitterConfig", "clusterSelector"} & spec.keys()  # not in SidecarMode
    assert spec["shutdownAfterJobFinishes"]  # required by ttlSecondsAfterFinished and by suspend
    assert tuple(map(int, ray["rayVersion"].split("."))) >= (2, 52, 0)  # for authOptions.mode token
    assert ray["authOptions"]["mode"] == "token"
    for pod in pods_of(ray).values():
        assert pod["spec"]["restartPolicy"] == "Never"  # SidecarMode for the head, autoscaler v2 for all
    for group in ray["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_heads_service_has_what_operator_and_user_reach(cluster):
    """KubeRay's getServicePorts takes the container's ports as they are if there are any, and the operator looks for
    the one named dashboard: without it a RayJob never learns its job's state (FetchHeadServiceURL)."""
    (head,) = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert ports == {"gcs-server": 6379, "dashboard": 8265, "metrics": 8080}
    assert f"kubectl port-forward service/parakeet-head-svc {ports['dashboard']}:{ports['dashboard']}" in README
    for group in cluster["spec"]["workerGroupSpecs"]:
        (worker,) = group["template"]["spec"]["containers"]
        assert worker["ports"] == [{"name": "metrics", "containerPort": 8080}]


def test_kubernetes_head_is_idle_and_only_gpu_pods_wait_for_spot_nodes(cluster):
    spec = cluster["spec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert (spec["enableInTreeAutoscaling"], spec["autoscalerOptions"]["version"]) == (True, "v2")
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        resources = pod["containers"][0]["resources"]
        has_gpu = "nvidia.com/gpu" in resources["limits"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"], "an overcommitted node kills pods"
        assert pod["containers"][0]["image"].endswith("-cuda" if has_gpu else "-cpu")
        assert (group["minReplicas"] == 0) is has_gpu
        assert ("spot" in pod["nodeSelector"].values()) is has_gpu
        assert {"nvidia.com/gpu", "spot"} <= {t["key"] for t in pod.get("tolerations", [])} or not has_gpu


def test_pods_have_no_root_and_no_literal_credential(cluster):
    uid = int(re.search(r"^USER (\d+):", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)[1])
    for pod in pods_of(cluster["spec"]).values():
        for container in pod["spec"]["containers"]:
            context = container["securityContext"]
            assert (context["runAsNonRoot"], context["runAsUser"]) == (True, uid)
            assert (context["allowPrivilegeEscalation"], context["capabilities"]["drop"]) == (False, ["ALL"])
            assert not [
                env for env in container.get("env", ()) if re.search("KEY|SECRET|TOKEN", env["name"]) and "value" in env
            ]
    for path in CLUSTER.iterdir():
        assert not re.search(r"(AKIA|ASIA)[A-Z0-9]{16}|PRIVATE KEY|hf_[A-Za-z0-9]{20}", path.read_text()), path.name


# --- the image


def hadolint(dockerfile: str) -> str:
    binary = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    run = subprocess.run([binary, "--no-color", "-"], input=dockerfile, capture_output=True, text=True, check=False)
    return run.stdout + run.stderr


def test_hadolint_finds_nothing_in_the_dockerfile_and_something_in_a_worse_one():
    text = (CLUSTER / "Dockerfile").read_text()
    assert hadolint(text) == ""
    assert "DL3006" in hadolint(text.replace("FROM python:${PYTHON_VERSION}-slim-bookworm", "FROM python"))
    assert "DL3066" in hadolint(text.replace("USER 1000:1000", "USER ray"))


def test_the_image_is_made_of_the_package_and_nothing_else():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {
        "pyproject.toml",
        "cluster/requirements.txt",
        project["project"]["readme"],
        *project["project"]["license-files"],
    }
    needed |= {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert {source for line in copies for source in line.split()} == needed
    let_through = re.findall(r"^!(\S+)$", (CLUSTER / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert set(let_through) == needed


def test_pins_cover_what_project_and_ray_ask_for(cluster):
    lines = [line for line in (CLUSTER / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [requirement for extra in ("av", "hub") for requirement in project["optional-dependencies"][extra]]
    ray_default = [
        r for r in metadata.requires("ray") if Requirement(r).marker and "default" in str(Requirement(r).marker)
    ]
    for text in [*project["dependencies"], *extras, *ray_default, "boto3"]:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": "default"}):
            pin = pins.get(canonicalize_name(requirement.name))
            assert pin is not None, f"{text}: no pin"
            assert requirement.specifier.contains(pin, prereleases=True), f"{text}: pinned to {pin}"
    assert cluster["spec"]["rayVersion"] == pins["ray"]
    assert f"'ray[default]=={pins['ray']}'" in README, "the submitting machine needs the image's Ray"


# --- README


def test_readme_names_every_file():
    table = set(re.findall(r"`([^`]+)`", "".join(re.findall(r"^\| `.*?\|", README, re.MULTILINE))))
    assert {path.name for path in CLUSTER.iterdir()} - {"README.md"} <= table


@pytest.mark.parametrize("block", BASH_BLOCKS)
def test_readme_commands_are_bash(block):
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def test_job_commands_are_ones_that_the_job_takes(job):
    commands = re.findall(r"python -m jobs\.transcribe (.*?[^\\])\n", README, re.DOTALL)
    assert len(commands) == 2, "submit and resume"
    assert commands[0] == commands[1], "resume is the same command"
    for command in [*commands, job["spec"]["entrypoint"].removeprefix("python -m jobs.transcribe")]:
        config = tyro.cli(TranscribeConfig, args=shlex.split(command.replace("\\\n", " ")))
        assert config.device == "cuda"  # `auto` would look for a GPU node before there is one
        gpus = next(
            group["maxReplicas"]
            for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
            if "gpu" in group["groupName"]
        )
        assert config.model_actors == (1, gpus)
