"""The looks as one HTML file that holds everything: browsers draw captions of every script."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from data.looking.sheet import BOXES, described, enlarged
from data.samples import Item, Kind
from tokenizer.atomic import atomic_path

_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em; color: #1e1e1e }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .8em; text-align: right }
td:first-child, th:first-child { text-align: left } tr { border-bottom: 1px solid #ddd }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(WIDTHpx, 1fr)); gap: 16px }
figure { margin: 0 } figcaption { font-size: 12px; overflow-wrap: anywhere } b { color: #1450a0 } i { color: #6e6e6e }
img { max-width: 100%; image-rendering: auto } .wide { overflow-x: auto }
"""


def write_page(
    path: Path,
    title: str,
    lines: Sequence[str],
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    items: Sequence[Item],
    kind: Kind,
    plots: Path,
) -> None:
    """Write the page.

    Args:
        lines: told under the title.
        head, rows: of the table of quantities.
        items: shown with captions.
        plots: PNG to include.
    """
    table = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>",
        f"<title>{_text(title)}</title>",
        f"<style>{_STYLE.replace('WIDTH', str(BOXES[kind][1]))}</style><h1>{_text(title)}</h1>",
        *(f"<p>{_text(line)}</p>" for line in lines),
        f"<div class='wide'><table><tr>{''.join(f'<th>{_text(name)}</th>' for name in head)}</tr>{table}</table></div>",
        f"<img alt='plots' src='{_uri(plots.read_bytes(), 'png')}'>",
        "<div class='sheet'>",
        *(_figure(item, kind) for item in items),
        "</div></html>",
    ]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(parts) + "\n", encoding="utf-8", errors="replace")


def _figure(item: Item, kind: Kind) -> str:
    picture = ""
    if item.pixels is not None:
        buffer = io.BytesIO()
        Image.fromarray(enlarged(item.pixels.numpy(), BOXES[kind])).save(buffer, "WEBP", quality=85)
        picture = f"<img alt='' src='{_uri(buffer.getvalue(), 'webp')}'>"
    label = f"<b dir='auto'>{_text(item.facts['label'])}</b><br>" if item.facts["label"] is not None else ""
    caption = f"<br><span dir='auto'>{_text(item.caption)}</span>" if item.caption else ""
    words = f"{label}<i>{_text(described(item))}</i>{caption}"
    return f"<figure title='{_text(item.id)}'>{picture}<figcaption>{words}</figcaption></figure>"


def _uri(contents: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(contents).decode()}"


def _text(text: str) -> str:
    return html.escape(text, quote=True)
