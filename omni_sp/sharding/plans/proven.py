"""Classes that are proven exact by tests over several ranks, and those that are refused, with the reason."""

PROVEN: frozenset[str] = frozenset()

REFUSED: dict[str, str] = {}
