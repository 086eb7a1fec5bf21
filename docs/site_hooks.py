"""What the site adds to the pages of this folder: README.md and its like, and the files that pages link to.

Pages link to files as these lie in the repository, so that links work there as well. A link that leaves ``docs`` has no
target on the site, so the hooks below put a copy of the target there: source code as a page, other files as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Files outside this folder that are pages of the site.
PAGES_ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "compat/README.md": "compat.md",
}
_LINK = re.compile(r"\[([^\]]*)\]\(([^()#\s:]+)(#[^()\s]*)?\)")
_LANGUAGES = {".py": "python", ".yml": "yaml", ".toml": "toml", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere, and a copy of each file outside ``docs`` that a page links to."""
    for name, page in PAGES_ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    copied: set[Path] = set()
    for file in list(files.documentation_pages()):
        source = _source_of(file.src_uri)
        for _, link, _ in _LINK.findall(source.read_text(encoding="utf-8")):
            target = (source.parent / link).resolve()
            if target.is_file() and _uri_of(target).startswith("repository/") and target not in copied:
                copied.add(target)
                files.append(_copy_of(target, config))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let the links of one page lead to the pages and copies of the site."""
    source = _source_of(page.file.src_uri)
    if not source.is_relative_to(ROOT) or page.file.src_uri.startswith("repository/"):
        return markdown
    up = "../" * page.file.src_uri.count("/")

    def to_site(match: re.Match[str]) -> str:
        text, link, anchor = match.groups()
        target = (source.parent / link).resolve()
        if target.is_dir():
            return text  # a folder is no page
        return f"[{text}]({up}{_uri_of(target)}{anchor or ''})" if target.is_file() else match[0]

    return _LINK.sub(to_site, markdown)


def _source_of(page: str) -> Path:
    """The file in the repository that a page of the site is made from."""
    sources = {uri: name for name, uri in PAGES_ELSEWHERE.items()}
    return ROOT / sources.get(page, f"docs/{page}")


def _uri_of(target: Path) -> str:
    """Where a file of the repository stands on the site."""
    name = target.relative_to(ROOT).as_posix()
    if name in PAGES_ELSEWHERE:
        return PAGES_ELSEWHERE[name]
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    visible = name.lstrip(".")  # the build leaves out what begins with a dot
    return f"repository/{visible}.md" if target.suffix in _LANGUAGES else f"repository/{visible}"


def _copy_of(target: Path, config: Any) -> File:
    """A page that shows a source file, or the file as it is."""
    if target.suffix not in _LANGUAGES:
        return File.generated(config, _uri_of(target), abs_src_path=str(target))
    text = target.read_text(encoding="utf-8")
    page = f"# `{target.relative_to(ROOT).as_posix()}`\n\n````{_LANGUAGES[target.suffix]}\n{text}````\n"
    return File.generated(config, _uri_of(target), content=page)
