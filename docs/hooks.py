"""What mkdocs needs to build the site from pages that are also read in the repository.

README.md, CONTRIBUTING.md and others lie outside of docs/. They become pages of the site, and links to them follow. A
link to a file that is no page, such as a config, becomes its path, because the site does not contain the file.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "PROTOCOL.md": "protocol.md",
    "CHANGELOG.md": "changelog.md",
    "results/LOG.md": "log.md",
}
SOURCES = {page: source for source, page in PAGES.items()}


def on_files(files, config):
    """Add the pages that lie outside of docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite the links of one page; a block `sh run` becomes a plain one, since mkdocs knows no second word."""
    path = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(path, f"docs/{path}"))

    def link(match):
        text, (address, hash, anchor) = match[1], match[2].partition("#")
        if not address or "://" in address:
            return match[0]
        target = posixpath.normpath(posixpath.join(folder, address))
        if target in PAGES or target.startswith("docs/"):
            return f"[{text}]({PAGES.get(target, target.removeprefix('docs/'))}{hash}{anchor})"
        return text if target in text else f"{text} (`{target}`)"

    markdown = re.sub(r"^```sh run$", "```sh", markdown, flags=re.MULTILINE)
    return re.sub(r"(?<!\\)\[([^\]]*(?:\][^(\]]*)*?)\]\(([^)\s]+)\)", link, markdown)
