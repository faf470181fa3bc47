"""The web page, built with Gradio: upload and settings on one side, the segmented image and its legend on the other.

The legend is a list of buttons with each segment's color, label, score and area. A click on a button, or on the image,
shows a segment alone.

Why not `gr.AnnotatedImage`: its legend has labels only, and a full-size PNG is written and sent for every segment.
"""

import html
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..errors import PredictorError, WebError
from ..family.digits import LABELS
from ..model.image_loading_faim2f import IMAGE_SUFFIXES
from ..runtime.drawing import class_color
from .rendering import LONGEST, Downloads, LegendRow, PageView
from .requests import Choice, Limits, Request, RequestHandler, open_picture

logger = logging.getLogger(__name__)

TITLE = "Image segmentation"
HINT = "Drop an image, or choose an example."
# Seconds between removals of old files, and the age at which files and the state of an idle page are removed.
SWEEP, OLD = 600, 3600
# Maximum number of examples on the page.
MOST_EXAMPLES = 8
# The formats that browsers show.
SUFFIXES = tuple(
    suffix
    for suffix in IMAGE_SUFFIXES
    if suffix in (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif")
)
# Held-out scenes of digits, enlarged for display only: the model resizes its input anyway.
SCENES, SCENE_SIZE = 6, 384

# Gradio's templates would evaluate braces, dollar signs and backquotes in a label.
SPECIAL = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"})

CSS = """
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
.message { margin: 0; padding: 10px 14px; border-radius: var(--radius-md); overflow-wrap: anywhere;
  color: var(--body-text-color); background: var(--background-fill-secondary); }
.message[role=alert] { color: #7f1d1d; background: #fee2e2; border: 1px solid #f87171; }
.gradio-container main { width: 100%; max-width: 1240px !important; margin: 0 auto; }
#title h1 { margin: 4px 0 0; font-size: 1.5rem; }
#title p { margin: 2px 0 4px; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
#title, #message, #legend, #title > div, #message > div, #legend > div { padding: 0 !important; }
#overlay img { cursor: crosshair; }
#files { gap: 8px; }
#files button { min-width: 0; }
footer { display: none !important; }
@media (max-width: 640px) { .gradio-container main { padding: 10px !important; } }
"""

# Marks the pressed button in place instead of rendering the list again, so that keyboard focus is kept.
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
# On narrow screens, where the result is below the inputs, scrolls it into view.
SHOW_ANSWER = """() => {
  if (window.innerWidth < 768) document.querySelector('#message').scrollIntoView({block: 'start'});
}"""


def legend_html(view: PageView) -> str:
    """The legend as HTML; empty if there are no segments."""
    if not view.rows:
        return ""
    rows = "".join(f"<li>{_button(place, row, place == view.chosen)}</li>" for place, row in enumerate(view.rows))
    # Gradio renders a value only if it differs from the last one, which `turn` ensures.
    return f'<ul class="legend" aria-label="Segments" data-turn="{view.turn}">{rows}</ul>'


def _button(place: int, row: LegendRow, pressed: bool) -> str:
    red, green, blue = class_color(row.class_id)
    score = "" if row.score is None else f"{row.score:.2f}"
    return (
        f'<button type="button" data-place="{place}" aria-pressed="{str(pressed).lower()}">'
        f'<span class="color" style="background: rgb({red}, {green}, {blue})"></span>'
        f'<span class="name">{escape_html(row.label)}</span><span class="score">{score}</span>'
        f'<span class="area">{row.area:,} px · {100 * row.share:.1f} %</span></button>'
    )


def message_html(text: str, *, wrong: bool = False) -> str:
    """The HTML of a sentence above the image, which screen readers announce."""
    return f'<p class="message" role="{"alert" if wrong else "status"}">{escape_html(text)}</p>'


def escape_html(text: str) -> str:
    """Escapes untrusted text for HTML."""
    return html.escape(text).translate(SPECIAL)


def example_pictures(folder: Path | None, id2label: Mapping[int, str], limits: Limits, into: Path) -> list[Path]:
    """The files of the example images, at most `MOST_EXAMPLES`.

    Args:
        folder: a folder of images; None for generated scenes if the model segments digits, else for no examples.
        id2label: the model's labels.
        limits: limits on an image.
        into: the folder to which generated scenes are written.

    Raises:
        ValueError: the folder has no image, or one that exceeds the limits.
    """
    if folder is not None:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
        if not paths:
            raise WebError(f"There is no image in {folder} ({', '.join(SUFFIXES)}).")
        for path in paths[:MOST_EXAMPLES]:
            open_picture(path, str(path), limits).close()
        return paths[:MOST_EXAMPLES]
    if list(id2label.values()) != LABELS:
        return []
    try:
        from ..data.digits import DigitScenes

        scenes = DigitScenes("test", SCENES)
        pixels = [scenes[index]["image"].permute(1, 2, 0).numpy() for index in range(SCENES)]
    except ImportError as error:  # scikit-learn, which contains the digits
        raise WebError(str(error)) from error
    paths = []
    for number, values in enumerate(pixels, 1):
        path = into / f"scene-{number}.png"
        Image.fromarray(values).resize((SCENE_SIZE, SCENE_SIZE), Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


def theme() -> Any:
    """Gradio's theme with system fonts, which are not loaded from other hosts."""
    return gr.themes.Soft(
        primary_hue="indigo",
        font=[gr.themes.Font(name) for name in ("system-ui", "sans-serif")],
        font_mono=[gr.themes.Font(name) for name in ("ui-monospace", "monospace")],
    ).set(
        # Darker than the theme's own, for a contrast of at least 4.5 to 1.
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        block_label_text_color="*primary_700",
        block_title_text_color="*primary_700",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        checkbox_label_background_fill_selected="*primary_600",
    )


def build_page(
    choices: dict[str, Choice], handler: RequestHandler, limits: Limits, examples: Sequence[Path]
) -> gr.Blocks:
    """Builds the page.

    Args:
        choices: networks by name; the first is selected initially.
        handler: processes the requests.
        limits: limits on requests.
        examples: files of example images.
    """
    first = next(iter(choices.values()))
    subtasks = first.predictor.subtasks
    with gr.Blocks(title=f"{first.model} · {TITLE}", analytics_enabled=False, delete_cache=(SWEEP, OLD)) as page:
        remembered = gr.State(None, time_to_live=OLD)
        gr.HTML(_heading(first.model, first.predictor.network.config.id2label), elem_id="title")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320, scale=2):
                picture = gr.Image(
                    label="Picture", placeholder=_invitation(limits), sources=["upload", "clipboard"],
                    type="filepath", image_mode=None, interactive=True, height=280, elem_id="picture", buttons=[],
                )  # fmt: skip
                if examples:
                    gr.Examples([[str(path)] for path in examples], [picture], label="Examples", elem_id="examples")
                subtask = gr.Radio(list(subtasks), value=subtasks[0], label="Subtask", elem_id="subtask")
                threshold = gr.Slider(
                    0, 1, first.threshold(subtasks[0]), step=0.01, label="Threshold",
                    info="The lowest score of a segment.",
                    interactive=subtasks[0] != "semantic", elem_id="threshold",
                )  # fmt: skip
                network = gr.Radio(list(choices), value=next(iter(choices)), label="Runtime", elem_id="runtime")
                button = gr.Button("Segment", variant="primary", elem_id="segment")
            with gr.Column(min_width=320, scale=3):
                state = gr.HTML(message_html(HINT), elem_id="message")
                overlay = gr.Image(
                    label="Segments", show_label=False, format="png", interactive=False, elem_id="overlay",
                    buttons=["download", "fullscreen"],
                )  # fmt: skip
                rows = gr.HTML("", js_on_load=ON_LOAD, elem_id="legend")
                with gr.Row(elem_id="files"):
                    document = gr.DownloadButton("JSON", interactive=False, elem_id="json", size="sm", min_width=80)
                    masks = gr.DownloadButton(
                        "Masks (zip)", interactive=False, elem_id="masks", size="sm", min_width=80
                    )
                    coco = gr.DownloadButton("COCO", interactive=False, elem_id="coco", size="sm", min_width=80)
        answers = [overlay, rows, state, remembered, document, masks, coco]

        def segment(
            given: dict[str, Any] | None, network: str, subtask: str, threshold: float
        ) -> tuple[Any, ...]:  # in the order of `answers`
            if given is None:
                return _nothing(HINT)
            try:
                started = time.perf_counter()
                request = _request(given, network, subtask, threshold)
                view, files = handler(request)
                seconds = time.perf_counter() - started
            except (WebError, PredictorError) as error:
                return _nothing(str(error), wrong=True)
            except Exception:
                logger.exception("An image could not be segmented.")
                return _nothing("The server failed on this image; see its log.", wrong=True)
            buttons = _download_buttons(files if view.rows else None)
            return view.draw(), legend_html(view), message_html(_summary(view, request, seconds)), view, *buttons

        def choose_row(view: PageView | None, event: gr.EventData) -> tuple[Any, Any]:
            chosen = _next_view(view, getattr(event, "place", None))
            # ON_LOAD has marked the button already.
            return (gr.skip(), gr.skip()) if chosen is None else (chosen.draw(), chosen)

        def choose_pixel(view: PageView | None, event: gr.SelectData) -> tuple[Any, Any, Any]:
            place = None
            if view is not None and isinstance(event.index, (list, tuple)) and len(event.index) == 2:
                place = view.row_at(*(int(side) for side in event.index))
            chosen = _next_view(view, place)
            return (gr.skip(),) * 3 if chosen is None else (chosen.draw(), legend_html(chosen), chosen)

        def choose_network(name: str, subtask: str) -> tuple[Any, Any]:
            able = choices[name].predictor.subtasks
            kept = subtask if subtask in able else able[0]
            return gr.update(choices=list(able), value=kept), _slider(choices[name], kept)

        def choose_subtask(name: str, subtask: str) -> Any:
            return _slider(choices[name], subtask)

        private: dict[str, Any] = {"api_visibility": "private"}
        answered = gr.on(
            [button.click, picture.change], segment, [picture, network, subtask, threshold], answers,
            preprocess=False,  # would decode the image before its size is checked
            trigger_mode="always_last", concurrency_limit=1, show_progress_on=[overlay], **private,
        )  # fmt: skip
        answered.then(None, js=SHOW_ANSWER, **private)
        rows.click(choose_row, [remembered], [overlay, remembered], show_progress="hidden", **private)
        overlay.select(choose_pixel, [remembered], [overlay, rows, remembered], show_progress="hidden", **private)
        network.input(choose_network, [network, subtask], [subtask, threshold], show_progress="hidden", **private)
        subtask.input(choose_subtask, [network, subtask], [threshold], show_progress="hidden", **private)
    page.queue(max_size=limits.waiting, api_open=False)
    return page


def _invitation(limits: Limits) -> str:
    return (
        f"Drop an image here, or click to choose one\nup to {limits.megabytes:g} MB, {limits.megapixels:g} megapixels"
    )


def _heading(model: str, id2label: Any) -> str:
    return f"<h1>{escape_html(TITLE)}</h1><p>{escape_html(model)} · {len(id2label)} classes</p>"


def _request(given: dict[str, Any], network: str, subtask: str, threshold: float) -> Request:
    """Checks the values of a request, which may come from the page or from any other client.

    Raises:
        WebError: the page would not send such values.
    """
    if not isinstance(given.get("path"), str) or not isinstance(network, str) or not isinstance(subtask, str):
        raise WebError("This request did not come from this page: reload it.")
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise WebError("The threshold must be a number from 0 to 1.")
    path = Path(given["path"])
    return Request(path, given.get("orig_name") or path.name, network, subtask, float(threshold))


def _nothing(text: str, *, wrong: bool = False) -> tuple[Any, ...]:
    """The page's outputs without a prediction."""
    return None, "", message_html(text, wrong=wrong), None, *_download_buttons(None)


def _download_buttons(files: Downloads | None) -> list[Any]:
    """Updates of the download buttons; each is a new object, because Gradio modifies its arguments."""
    if files is None:
        return [gr.update(value=None, interactive=False) for _ in Downloads._fields]
    return [gr.update(value=str(path), interactive=True) for path in files]


def _next_view(view: PageView | None, place: Any) -> PageView | None:
    """The view after a click on a row, or on no segment (`place` is None); None if nothing changes."""
    if view is None or (place is None and view.chosen is None):
        return None
    return view.choose(place if isinstance(place, int) else None)


def _slider(choice: Choice, subtask: str) -> Any:
    return gr.update(value=choice.threshold(subtask), interactive=subtask != "semantic")


def _summary(view: PageView, request: Request, seconds: float) -> str:
    count = len(view.rows)
    if not count and request.subtask != "semantic":
        return f"Nothing has a score above {request.threshold:.2f}: lower the threshold, or choose another subtask."
    what = "class" if request.subtask == "semantic" else "segment"
    plural = "" if count == 1 else "es" if what == "class" else "s"
    small = " The image is shown at reduced size; downloads are full size." if max(view.image.size) == LONGEST else ""
    alone = " Click one, here or in the list, to see it alone." if count > 1 else ""
    return f"{count} {what}{plural} in {seconds:.2f} s by {request.network}.{alone}{small}"


__all__ = ["CSS", "build_page", "escape_html", "example_pictures", "legend_html", "message_html", "theme"]
