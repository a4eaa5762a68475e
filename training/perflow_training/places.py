"""Paths that are folders of this machine: a URL would silently become a folder of that name."""

import re
from collections.abc import Mapping

#: Path("s3://bucket") has lost a slash; one letter and a colon is a drive
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def url_problem(paths: Mapping[str, object]) -> str | None:
    """What is wrong with the first of `paths` (how the user names it -> value) that is a URL; None if none is."""
    for name, value in paths.items():
        if value and URL.match(str(value)):
            scheme = str(value).partition(":")[0].lower()
            if scheme == "file":
                way_out = "Write it as a plain path, such as /data/run."
            else:
                way_out = "Give a folder or file of this machine (a mounted disk is one), and copy to or from there."
            return f"`{name}={value}` is a URL ({scheme}), and only paths can be read and written here. {way_out}"
    return None
