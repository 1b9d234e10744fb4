"""How do the ranks of a lane share its attention? Importing it makes `IMPLEMENTATION` known to transformers."""

from meshweave.parallel.context.attention import IMPLEMENTATION
from meshweave.parallel.context.groups import ContextGroups, context_groups, ulysses_size
from meshweave.parallel.context.plan import SequencePlan

__all__ = ["IMPLEMENTATION", "ContextGroups", "SequencePlan", "context_groups", "ulysses_size"]
