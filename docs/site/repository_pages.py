"""A hook of mkdocs: pages of the repository that do not lie in docs/, and links between all pages.

Pages link to files by their place in the repository, so that links work wherever the repository is
browsed. Here a link to a file that is a page of the site becomes a link to that page; a link to any
other file, such as a header, becomes its text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]

# Place in the repository -> page of the site.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "ops/hash/spec.md": "formats/hash.md",
    "ops/hyper/spec.md": "formats/hyper.md",
    "ops/sparse/spec.md": "formats/sparse.md",
    "ops/winding/spec.md": "formats/winding.md",
}
SOURCES = {page: source for source, page in PAGES.items() if page != "index.md"}

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside docs/."""
    for page, source in SOURCES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point the links of one page at pages of the site."""
    here = page.file.src_uri
    source = SOURCES.get(here, f"docs/{here}")

    def replace(link: re.Match[str]) -> str:
        """A link as the site has it."""
        if "://" in link["target"]:
            return link[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["target"]))
        if not (ROOT / place).exists():
            raise PluginError(f"{source}: {link['target']} does not exist")
        target = PAGES.get(place, place.removeprefix("docs/"))
        if files.get_file_from_path(target) is None:
            return link["text"]
        relative = posixpath.relpath(target, posixpath.dirname(here) or ".")
        return f"[{link['text']}]({relative}{link['anchor'] or ''})"

    return _LINK.sub(replace, markdown)
