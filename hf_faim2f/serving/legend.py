"""The list beside the picture: every segment's color, name, score and area, each a button that shows it alone."""

import html

from ..runtime.drawing import class_color
from .rendering import Row, Shown

# The page's template engines read what stands in braces and behind dollar signs; a label is a label.
SPECIAL = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"})

STYLE = """
.legend { display: flex; flex-direction: column; gap: 4px; margin: 0; padding: 0; list-style: none; }
.legend li { margin: 0; padding: 0; }
.legend button {
  display: grid; grid-template-columns: 18px minmax(0, 1fr) auto auto; gap: 10px; align-items: center; width: 100%;
  min-height: 40px; padding: 6px 10px; text-align: left; font: inherit; color: var(--body-text-color);
  background: var(--background-fill-primary); border: 1px solid var(--border-color-primary);
  border-radius: var(--radius-md); cursor: pointer;
}
.legend button:hover { border-color: var(--color-accent); }
.legend button:focus-visible { outline: 3px solid var(--color-accent); outline-offset: 1px; }
.legend button[aria-pressed=true] { border-color: var(--color-accent); background: var(--color-accent-soft); }
.legend .color { width: 18px; height: 18px; border-radius: 4px; border: 1px solid rgba(0, 0, 0, .35); }
.legend .name { overflow-wrap: anywhere; font-weight: 600; }
.legend .score, .legend .area { font-variant-numeric: tabular-nums; white-space: nowrap; }
.legend .area { color: var(--body-text-color-subdued); min-width: 9em; text-align: right; }
@media (max-width: 640px) {
  .legend button { grid-template-columns: 18px minmax(0, 1fr) auto; }
  .legend .area { grid-column: 2 / 4; text-align: left; }
}
.told { margin: 0; padding: 10px 14px; border-radius: var(--radius-md); overflow-wrap: anywhere;
  color: var(--body-text-color); background: var(--background-fill-secondary); }
.told[role=alert] { color: #7f1d1d; background: #fee2e2; border: 1px solid #f87171; }
"""

# A pressed button stays in the document, so that the keyboard's place in the list is not lost.
ON_LOAD = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-place]');
  if (!button) return;
  const pressed = button.getAttribute('aria-pressed') === 'true';
  element.querySelectorAll('button[data-place]').forEach(other => other.setAttribute('aria-pressed', 'false'));
  button.setAttribute('aria-pressed', String(!pressed));
  trigger('click', {place: Number(button.dataset.place)});
});
"""


def legend(shown: Shown) -> str:
    """HTML of the list; empty for no segments."""
    if not shown.rows:
        return ""
    rows = "".join(f"<li>{_button(place, row, place == shown.chosen)}</li>" for place, row in enumerate(shown.rows))
    # The number makes every answer another one, which is rendered even if it says what the last one said.
    return f'<ul class="legend" aria-label="Segments" data-turn="{shown.turn}">{rows}</ul>'


def _button(place: int, row: Row, pressed: bool) -> str:
    red, green, blue = class_color(row.class_id)
    score = "" if row.score is None else f"{row.score:.2f}"
    return (
        f'<button type="button" data-place="{place}" aria-pressed="{str(pressed).lower()}">'
        f'<span class="color" style="background: rgb({red}, {green}, {blue})"></span>'
        f'<span class="name">{escaped(row.label)}</span><span class="score">{score}</span>'
        f'<span class="area">{row.area:,} px · {100 * row.share:.1f} %</span></button>'
    )


def told(text: str, *, wrong: bool = False) -> str:
    """HTML of a sentence under the picture, which is read aloud as it comes."""
    return f'<p class="told" role="{"alert" if wrong else "status"}">{escaped(text)}</p>'


def escaped(text: str) -> str:
    """A stranger's text as HTML."""
    return html.escape(text).translate(SPECIAL)


__all__ = ["ON_LOAD", "STYLE", "escaped", "legend", "told"]
