"""Small stories from a seeded grammar, and a judge that says whether a story holds together."""

from msfs_functional.synthetic.stories.judging import judge
from msfs_functional.synthetic.stories.telling import beginning, stories

__all__ = ["beginning", "judge", "stories"]
