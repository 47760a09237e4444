"""Nodes for Ray's autoscaler: processes on this machine. Its own provider of such nodes cannot be told their memory."""

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class NodeProvider(FakeMultiNodeProvider):
    """The autoscaler counts on the memory of a node's configuration; the node has what it finds."""

    def create_node_with_resources_and_labels(self, node_config, tags, count, resources, labels):
        started = {name: amount for name, amount in resources.items() if name != "memory"}
        super().create_node_with_resources_and_labels(node_config, tags, count, started, labels)
