"""The README as an index of packages shows it; all else is in setup.cfg."""

import configparser
import re
from pathlib import Path

LINK = re.compile(r"(!?)\[([^][]*)\]\((?!https?:|#)([^)\s]+)\)")


def standalone(text: str, source: str | None) -> str:
    """The Markdown `text` without relative links, which lead nowhere outside the repository.

    `source`: the repository's address. Links and pictures become absolute; without an address links become their
    words, and pictures are left out.
    """

    def link(found: re.Match[str]) -> str:
        picture, words, path = found.groups()
        if source:
            return f"{picture}[{words}]({source.rstrip('/')}/{'raw' if picture else 'blob'}/HEAD/{path})"
        return "" if picture else words

    return LINK.sub(link, text)


if __name__ == "__main__":
    from setuptools import setup

    here = Path(__file__).parent
    config = configparser.ConfigParser()
    config.read(here / "setup.cfg", "utf-8")
    urls = dict(line.split(" = ", 1) for line in config["metadata"]["project_urls"].split("\n") if line)
    readme = (here / "README.md").read_text("utf-8")
    setup(long_description=standalone(readme, urls.get("Source")), long_description_content_type="text/markdown")
