"""What a rewriting of Inductor's graphs leaves behind, for tests."""

import uuid

from torch.fx import Graph

from msfs_functional.epilogues import InTurn


class Watched(InTurn):
    """Passes; notes the ops that graphs have after them."""

    def __init__(self, *passes):
        super().__init__(*passes)
        self.calls: list = []

    def uuid(self) -> str:
        return uuid.uuid4().hex  # a graph out of a cache would not come by

    def __call__(self, graph: Graph) -> None:
        super().__call__(graph)
        graph.lint()
        self.calls += [node.target for node in graph.nodes if node.op == "call_function"]
