"""cluster/'s policies and dashboard: who may do what in S3 and EC2, and queries over metrics that exist.

The policies are judged by an evaluator of the few features they use, for the requests that each part of the job makes
to S3. The dashboard's queries are parsed by a PromQL parser and compared with the job's metrics.
"""

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

import botocore.session
import promql_parser
import pytest
import ray

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
VALUES = {"ACCOUNT_ID": "1", "REGION": "r", **{f"{k}_BUCKET": k.lower() for k in ("INPUT", "OUTPUT", "MODEL")}}
VALUES |= {"INPUT_PREFIX": "in/a", "OUTPUT_PREFIX": "out", "MODEL_PREFIX": "m/0.6b"}


def policy(name: str) -> list[dict]:
    text = (CLUSTER / name).read_text()
    return json.loads(re.sub(r"@([A-Z_]+)@", lambda found: VALUES[found[1]], text))["Statement"]


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def holds(condition: dict, context: dict[str, str]) -> bool:
    """IAM's StringEquals and StringLikeIfExists: every key must match one of its values."""
    for operator, keys in condition.items():
        for key, patterns in keys.items():
            if key not in context:
                if operator == "StringLikeIfExists":
                    continue
                return False
            matches = {"StringEquals": str.__eq__, "StringLikeIfExists": fnmatchcase}[operator]
            if not any(matches(context[key], pattern) for pattern in as_list(patterns)):
                return False
    return True


def allowed(statements: list[dict], action: str, resource: str, context: dict[str, str] | None = None) -> bool:
    """IAM's answer for policies that only allow: one statement that matches is enough."""
    assert all(statement["Effect"] == "Allow" for statement in statements)
    return any(
        action in as_list(statement["Action"])
        and any(fnmatchcase(resource, pattern) for pattern in as_list(statement["Resource"]))
        and holds(statement.get("Condition", {}), context or {})
        for statement in statements
    )


NEEDED = {  # jobs/storage/files.py and s3fs ask for these; a request for one object has no s3:prefix
    "is the input an object or a folder": ("s3:ListBucket", "input", {"s3:prefix": "in/a"}),
    "list the input": ("s3:ListBucket", "input", {"s3:prefix": "in/a/"}),
    "missing input object is 404, not 403": ("s3:ListBucket", "input", {}),
    "read audio": ("s3:GetObject", "input/in/a/x.wav", {}),
    "input is one manifest": ("s3:GetObject", "input/in/a", {}),
    "what is done": ("s3:ListBucket", "output", {"s3:prefix": "out/transcripts/"}),
    "no job file yet is 404, not 403": ("s3:ListBucket", "output", {}),
    "read the job file": ("s3:GetObject", "output/out/plan/job.json", {}),
    "commit a part": ("s3:PutObject", "output/out/transcripts/p.parquet", {}),
    "list the model": ("s3:ListBucket", "model", {"s3:prefix": "m/0.6b/"}),
    "fetch the model": ("s3:GetObject", "model/m/0.6b/model.safetensors", {}),
    "model is one .nemo": ("s3:GetObject", "model/m/0.6b", {}),
}
REFUSED = {
    "list elsewhere": ("s3:ListBucket", "input", {"s3:prefix": "in/b/"}),
    "list a neighbour with the same start": ("s3:ListBucket", "input", {"s3:prefix": "in/ab/"}),
    "read elsewhere": ("s3:GetObject", "input/in/b/x.wav", {}),
    "read a neighbour with the same start": ("s3:GetObject", "input/in/ab", {}),
    "write to the input": ("s3:PutObject", "input/in/a/x.wav", {}),
    "remove input": ("s3:DeleteObject", "input/in/a/x.wav", {}),
    "write beside the output": ("s3:PutObject", "output/other/p.parquet", {}),
    "remove output": ("s3:DeleteObject", "output/out/transcripts/p.parquet", {}),
    "write to the model": ("s3:PutObject", "model/m/0.6b/model.safetensors", {}),
    "another bucket": ("s3:GetObject", "secrets/in/a/x.wav", {}),
    "change a bucket": ("s3:PutBucketPolicy", "output", {}),
}


@pytest.mark.parametrize(("action", "path", "context"), NEEDED.values(), ids=NEEDED)
def test_the_job_may_do_what_it_does(action, path, context):
    assert allowed(policy("iam-policy.json"), action, f"arn:aws:s3:::{path}", context)


@pytest.mark.parametrize(("action", "path", "context"), REFUSED.values(), ids=REFUSED)
def test_the_job_may_do_nothing_else(action, path, context):
    assert not allowed(policy("iam-policy.json"), action, f"arn:aws:s3:::{path}", context)


@pytest.mark.parametrize("statement", policy("iam-policy.json"), ids=lambda statement: statement["Sid"])
def test_no_statement_can_go(statement):
    rest = [other for other in policy("iam-policy.json") if other != statement]
    lost = [
        why
        for why, (action, path, context) in NEEDED.items()
        if not allowed(rest, action, f"arn:aws:s3:::{path}", context)
    ]
    assert lost, f"{statement['Sid']} is not needed"


def test_compaction_may_remove_output_and_nothing_more():
    (statement,) = policy("iam-policy-compact.json")
    assert statement["Action"] == "s3:DeleteObject"
    assert allowed([statement], "s3:DeleteObject", "arn:aws:s3:::output/out/transcripts/p.parquet")
    assert not allowed([statement], "s3:DeleteObject", "arn:aws:s3:::output/other/p.parquet")
    assert not allowed([statement], "s3:DeleteObject", "arn:aws:s3:::input/in/a/x.wav")


def test_the_autoscaler_may_start_nodes_and_end_its_own():
    statements = policy("iam-policy-autoscaler.json")
    operations = botocore.session.get_session().get_service_model("ec2").operation_names
    for action in {action for statement in statements for action in as_list(statement["Action"])} - {"iam:PassRole"}:
        assert action.removeprefix("ec2:") in operations, action
    node, here = "arn:aws:ec2:r:1:instance/i-1", {"ec2:Region": "r"}
    own = {**here, "ec2:ResourceTag/ray-cluster-name": "parakeet"}
    assert allowed(statements, "ec2:DescribeInstances", "*", here)
    assert allowed(statements, "ec2:RunInstances", node, here)
    assert allowed(statements, "ec2:CreateTags", node, {**here, "ec2:CreateAction": "RunInstances"})
    assert allowed(statements, "ec2:CreateTags", node, own)
    assert allowed(statements, "ec2:TerminateInstances", node, own)
    assert not allowed(
        statements, "ec2:CreateTags", node, here
    )  # it could tag a foreign node as its own, then terminate it
    assert not allowed(
        statements, "ec2:TerminateInstances", node, {**here, "ec2:ResourceTag/ray-cluster-name": "other"}
    )
    to_ec2 = {"iam:PassedToService": "ec2.amazonaws.com"}
    assert allowed(statements, "iam:PassRole", "arn:aws:iam::1:role/parakeet-worker", to_ec2)
    assert not allowed(statements, "iam:PassRole", "arn:aws:iam::1:role/admin", to_ec2)


def test_policies_and_launcher_file_agree_on_names():
    text = (CLUSTER / "aws.yaml").read_text()
    assert re.search(r"^cluster_name: parakeet\b", text, re.MULTILINE)
    assert set(re.findall(r"IamInstanceProfile: \{Name: (\S+)\}", text)) == {"parakeet-head", "parakeet-worker"}


# --- the dashboard

METRICS = {  # name: (kind, labels); test_metrics.py compares them with what a node serves, with `ray_` in front
    "parakeet_items_total": ("counter", {"status"}),
    "parakeet_errors_total": ("counter", {"kind"}),
    "parakeet_audio_seconds_total": ("counter", {"node"}),
    "parakeet_stage_seconds_total": ("counter", {"stage"}),
    "parakeet_shards_total": ("counter", set()),
    "parakeet_shard_seconds": ("histogram", {"le"}),
    "parakeet_model_idle_ratio": ("gauge", set()),
    "parakeet_queue_shards": ("gauge", set()),
}
WORKER_LABELS = {"SessionName", "NodeAddress", "WorkerId", "Component", "Version"}  # seen on a metric made in an actor
NODE_LABELS = {"SessionName", "ip", "RayNodeType", "IsHeadNode", "Version"}  # seen on Ray's own node gauges
# Text, not import: the module needs Ray's dashboard packages.
RAY_NODE_METRICS = (Path(ray.__file__).parent / "dashboard/modules/reporter/reporter_agent.py").read_text()
DASHBOARD = json.loads((CLUSTER / "grafana-dashboard.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]


def parse(query: str) -> promql_parser.Expr:
    """The query as Grafana sends it, its variables filled in."""
    query = query.replace("$__rate_interval", "1m").replace("$__range", "1h").replace("$session", "s.*")
    assert "$" not in query, query
    return promql_parser.parse(query)


def selectors(query: str) -> list[tuple[promql_parser.VectorSelector, bool]]:
    """(selector, whether it selects a range) for each metric of the query."""
    found = []

    def visit(node) -> bool:
        if isinstance(node, promql_parser.MatrixSelector):
            found.append((node.vector_selector, True))
            return True
        if isinstance(node, promql_parser.VectorSelector):
            found.append((node, False))
        return True

    promql_parser.walk(parse(query), visit)
    ranged = {str(selector) for selector, is_range in found if is_range}
    return [(s, is_range) for s, is_range in found if is_range or str(s) not in ranged]


def grouping_labels(query: str) -> set[str]:
    labels = set()

    def visit(node) -> bool:
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier:
            labels.update(node.modifier.labels)
        return True

    promql_parser.walk(parse(query), visit)
    return labels


def declared(series: str) -> tuple[str, str, set[str]]:
    """(name, kind, labels) of the metric that a stored series such as `ray_x_bucket` comes from."""
    name = series.removeprefix("ray_")
    if name in METRICS and METRICS[name][0] != "histogram":
        return name, METRICS[name][0], METRICS[name][1] | WORKER_LABELS
    base = re.sub(r"_(bucket|sum|count)$", "", name)
    if base != name and METRICS.get(base, ("",))[0] == "histogram":
        return base, "counter", METRICS[base][1] | WORKER_LABELS
    assert f'Gauge(\n        "{name}"' in RAY_NODE_METRICS, f"{series}: neither the job nor Ray has this metric"
    return name, "gauge", NODE_LABELS


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_each_query_asks_for_metrics_and_labels_that_exist(title, query):
    found = selectors(query)
    assert found
    for selector, is_range in found:
        _, kind, labels = declared(selector.name)
        assert is_range is (kind == "counter"), f"{selector.name}: a counter needs a rate, a gauge must not have one"
        assert {matcher.name for matcher in selector.matchers.matchers} <= labels
        assert grouping_labels(query) <= labels


def test_every_metric_of_the_job_is_shown():
    shown = {declared(selector.name)[0] for _, query in QUERIES for selector, _ in selectors(query)}
    assert METRICS.keys() <= shown


@pytest.mark.parametrize(
    "query", ["rate(ray_parakeet_item_total[5m])", "ray_parakeet_items_total", "rate(ray_parakeet_queue_shards[5m])"]
)
def test_the_query_check_sees_slips(query):
    with pytest.raises(AssertionError):
        test_each_query_asks_for_metrics_and_labels_that_exist("", query)


def test_grafana_would_lay_the_dashboard_out():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24  # Grafana's grid
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "session"}
    for panel in panels:
        assert panel["description"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEFGH"[: len(panel["targets"])])
        for target in panel["targets"]:
            labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert labels <= grouping_labels(target["expr"]), "a legend names a label that the query drops"
