"""The HTML document of reports, inspections and `mi.find`: one file, no external resources."""

import importlib.resources
from collections.abc import Iterable
from html import escape


def assemble(title: str, sections: Iterable[str], style: str = '') -> str:
    """Return the HTML document.

    Args:
      title: title of the window, as text.
      sections: HTML of the body. Empty sections are left out.
      style: CSS rules beside those of `mi/report/page.css`.
    """
    stylesheet = importlib.resources.files('mi').joinpath('report', 'page.css')
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f'<title>{escape(title)}</title>\n'
        f'<style>{stylesheet.read_text(encoding="utf-8")}{style}</style>\n</head>\n<body>\n'
        + '\n'.join(filter(None, sections))
        + '\n</body>\n</html>\n'
    )
