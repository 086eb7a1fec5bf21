"""An examination as text."""

from __future__ import annotations

from textwrap import wrap

from omni_sp.doctor.examine import Report
from omni_sp.doctor.findings import Finding
from omni_sp.planner.measured import Transfer
from omni_sp.version import __version__

_WIDTH = 120
_SHOWN = {"ok": "ok", "note": "note", "warning": "WARNING", "error": "ERROR"}


def as_text(report: Report) -> str:
    """Each finding with what it means, what to do about those that are not in order, what was measured, and a sum."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    where = {"cpu": "on the CPU", "cuda": "on a GPU each"}.get(report.device, f"that share {report.device}")
    count = f"{report.ranks} rank{'s' if report.ranks != 1 else ''}"
    lines = [f"Omni-SP {__version__}, {versions}; {count} {where}", ""]
    for finding in report.findings:
        lines += _entry(finding)
    if report.measured is not None and report.measured.exchange:
        lines += ["", f"{'bytes that a rank sends':>32}{'all-to-all':>28}{'ring shift':>28}"]
        for exchange, ring in zip(report.measured.exchange, report.measured.ring, strict=True):
            lines.append(f"{_bytes(exchange.num_bytes):>32}{_rate(exchange):>28}{_rate(ring):>28}")
    lines += ["", _sum(report)]
    if report.kept:
        lines.append(
            f"measurements are kept in {report.kept}: `omni-sp plan MODEL --here` and --parallel auto use them"
        )
    return "\n".join(lines)


def _entry(finding: Finding) -> list[str]:
    head = f"{_SHOWN[finding.level]:9}{finding.subject}: "
    if finding.level == "ok":
        return wrap(
            f"{head}{finding.what}: {finding.meaning}", _WIDTH, subsequent_indent=" " * 11, break_on_hyphens=False
        )
    lines = wrap(f"{head}{finding.what}", _WIDTH, subsequent_indent=" " * 11, break_on_hyphens=False)
    lines += wrap(
        f"means: {finding.meaning}", _WIDTH, initial_indent=" " * 11, subsequent_indent=" " * 18, break_on_hyphens=False
    )
    return lines + wrap(
        f"do:    {finding.remedy}", _WIDTH, initial_indent=" " * 11, subsequent_indent=" " * 18, break_on_hyphens=False
    )


def _sum(report: Report) -> str:
    errors, warnings = report.num_errors, report.num_warnings
    if not errors and not warnings:
        return "this machine is set up for it"
    parts = [f"{count} {name}{'s' if count != 1 else ''}" for count, name in ((errors, "error"), (warnings, "warning"))]
    return f"{', '.join(part for part in parts if not part.startswith('0'))}: see above"


def _bytes(count: int) -> str:
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.0f} {unit}"
    return f"{count} B"


def _rate(transfer: Transfer) -> str:
    return f"{transfer.seconds * 1e6:.0f} us, {transfer.num_bytes / transfer.seconds / 1e9:.2f} GB/s"
