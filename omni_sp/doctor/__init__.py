"""Whether a machine is set up for ranks: what it has, what it measures, and what it proves."""

from omni_sp.doctor.examine import Report, examine
from omni_sp.doctor.findings import Finding

__all__ = ["Finding", "Report", "examine"]
