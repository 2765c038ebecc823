"""Small stories from a seeded grammar, and a judge that says whether a story holds together."""

from msfs_functional.synthetic.stories.judging import RULES, judge, shares
from msfs_functional.synthetic.stories.telling import beginning, stories

__all__ = ["RULES", "beginning", "judge", "shares", "stories"]
