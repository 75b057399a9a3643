"""Turns the cross-references of docstrings, such as :class:`~robust_if.tuning.Plain`, into links."""

import re
from typing import Any

ROLE = re.compile(r":(?:class|func|data|meth|mod|attr):<code>~?([\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """The page with a link for every role; a name that the reference does not hold stays plain."""
    return ROLE.sub(lambda found: f'<autoref identifier="{found[1]}" optional><code>{found[1].rpartition(".")[2]}</code></autoref>', html)
