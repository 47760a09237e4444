"""Nodes for Ray's autoscaler: processes on this machine. Ray's own provider of such nodes cannot set their memory."""

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class NodeProvider(FakeMultiNodeProvider):
    """The autoscaler plans with the memory in a node's configuration; the node itself has what it finds."""

    def create_node_with_resources_and_labels(self, node_config, tags, count, resources, labels):
        started = {name: amount for name, amount in resources.items() if name != "memory"}
        super().create_node_with_resources_and_labels(node_config, tags, count, started, labels)
