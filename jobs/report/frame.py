"""The frame of every report page: one style sheet, no script, nothing loaded. Knows nothing of what is reported."""

import base64
import hashlib

import parakeet_core
from jobs.report.markup import Html, element, safe
from jobs.report.style import STYLE


def render_page(title: str, header: Html, main: Html) -> Html:
    """A whole page. Its policy allows the one style sheet by its digest and nothing else."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = Html(
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{safe(title)}</title><style>{STYLE}</style>"
    )
    footer = element(
        "footer", f"parakeet-batch {parakeet_core.__version__}. This page loads nothing and runs no script."
    )
    body = element("body", header, main, footer)
    return Html(f'<!doctype html>\n<html lang="en">{element("head", head)}{body}</html>\n')
