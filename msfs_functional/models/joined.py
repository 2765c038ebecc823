"""Several models as one, of one flat dict of parameters: one optimizer, average, mesh take all.

model = joined(denoiser=dit(config), text=text_tower(tower))    # denoiser.*, text.*
context = model.apply(params, "text.hidden_states", ids, lengths=lengths)
y = model.apply(params, "denoiser", x, t, context)
"""

import operator
import re
from typing import Any

from torch import nn

from msfs_functional.params import Functional, Initializer, Rules, functional


class Joined(nn.Module):
    """The skeleton behind `joined`."""

    def __init__(self, parts: dict[str, nn.Module]):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """What a part, or "part.method", returns."""
        return operator.attrgetter(path)(self)(*args, **kwargs)


def joined(**models: Functional) -> Functional:
    """The models as one; parameters start as they do alone, from keys of their longer names."""
    rules: Rules[Initializer] = [
        (rf"^{part}\.{re.escape(name)}$", initialize)
        for part, model in models.items()
        for name, initialize in model.initializers.items()
    ]
    skeletons = {part: model.skeleton for part, model in models.items()}
    return functional(lambda: Joined(skeletons), rules)
