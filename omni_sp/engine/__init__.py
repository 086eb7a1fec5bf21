"""Rank processes: how they start, what they run, how they fail and end."""
