"""
A demo page for a language model: text generation, next-token probabilities, attention weights and sentiment.

The file is copied into a Hub Space, so it imports nothing from this package. It requires gradio.
"""

import html
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextIteratorStreamer,
    pipeline,
)


# With more tokens, the cells become too small for touch screens and the labels illegible.
MAX_ATTENTION_TOKENS = 16
NUM_BARS = 10

CSS = """
.gradio-container { max-width: 52rem !important; margin: 0 auto !important; }
.bars { display: grid; grid-template-columns: minmax(4rem, max-content) 1fr 3.6rem; gap: .35rem .6rem;
  align-items: center; font-size: .95rem; }
.bars .name { font-family: ui-monospace, monospace; text-align: right; overflow: hidden; text-overflow: ellipsis;
  white-space: pre; max-width: 10rem; }
.bars .track { background: var(--background-fill-secondary); border-radius: .3rem; height: 1.1rem; }
.bars .bar { background: var(--color-accent); border-radius: .3rem; height: 100%; min-width: 2px; }
.bars .share { font-variant-numeric: tabular-nums; text-align: right; }
.heatmap { width: 100%; max-width: 40rem; margin: 0 auto; display: block; font-family: ui-monospace, monospace; }
.heatmap text { fill: var(--body-text-color); }
.heatmap .cell { fill: var(--color-accent); }
.heatmap .ground { fill: var(--background-fill-secondary); }
"""


class Page:
    """The contents of the page, independent of gradio.

    Args:
        model: causal language model with eager attention, the only implementation that returns attention weights.
        tokenizer: its tokenizer.
        classifier: text-classification pipeline, or None.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, classifier: Any = None):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.classifier = classifier
        self.context_length = model.config.max_position_embeddings
        self.num_layers = model.config.num_hidden_layers
        self.num_heads = model.config.num_attention_heads

    def encode(self, text: str) -> torch.Tensor:
        """Return ids (1, T) that begin with end-of-text, as in training, truncated from the left."""
        ids = self.tokenizer(text)["input_ids"]
        # Some tokenizers, such as GPT-2's, do not add it.
        if ids[:1] != [self.tokenizer.eos_token_id]:
            ids = [self.tokenizer.eos_token_id, *ids]
        return torch.tensor([ids[-self.context_length :]], device=self.model.device)

    def generate(
        self, text: str, max_new_tokens: int, temperature: float, top_k: int, top_p: float, repetition_penalty: float
    ) -> Iterator[str]:
        """Yield the text with more and more generated tokens.

        A temperature of 0 selects greedy decoding. When the context is full, its first half is dropped.
        """
        sampling = {"temperature": temperature, "top_k": int(top_k), "top_p": top_p} if temperature > 0 else {}
        remaining = int(max_new_tokens)
        while remaining > 0:
            ids = self.encode(text)
            if ids.shape[1] >= self.context_length:
                ids = ids[:, -max(self.context_length // 2, 1) :]
            num_new = min(remaining, self.context_length - ids.shape[1])
            config = GenerationConfig(
                max_new_tokens=num_new,
                do_sample=temperature > 0,
                repetition_penalty=repetition_penalty,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
                **sampling,
            )
            before = text
            for piece in self._stream(ids, config):
                text += piece
                yield text
            remaining -= num_new
            if text == before or self.encode(text).shape[1] < self.context_length:
                break

    def _stream(self, ids: torch.Tensor, config: GenerationConfig) -> Iterator[str]:
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopped = threading.Event()
        errors: list[Exception] = []

        def run() -> None:
            try:
                self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    streamer=streamer,
                    stopping_criteria=[lambda ids, scores, **kwargs: torch.full(ids.shape[:1], stopped.is_set())],
                )
            except Exception as error:
                errors.append(error)
                streamer.end()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            # also when the reader stops early
            stopped.set()
            thread.join()
        if errors:
            raise errors[0]

    @torch.no_grad()
    def next_tokens(self, text: str) -> str:
        """Return a bar chart of the most likely next tokens, as HTML."""
        logits = self.model(self.encode(text)).logits[0, -1].float()
        best = logits.softmax(-1).topk(min(NUM_BARS, len(self.tokenizer)))
        return bar_chart(self.token_names(best.indices.tolist()), best.values.tolist())

    @torch.no_grad()
    def attention(self, text: str, layer: int, head: int) -> str:
        """Return a heatmap of the attention weights of one head, as SVG. Layers and heads are counted from 1."""
        ids = self.encode(text)
        weights = self.model(ids, output_attentions=True).attentions[int(layer) - 1][0, int(head) - 1]
        # The model reads the whole text, but only its end is shown.
        shown = slice(-MAX_ATTENTION_TOKENS, None)
        return heatmap(self.token_names(ids[0, shown].tolist()), weights[shown, shown].float().tolist())

    def sentiment(self, text: str) -> str:
        """Return a bar chart of the classifier's scores, as HTML."""
        if not text.strip():
            return ""
        answers = self.classifier(text, top_k=None, truncation=True)
        return bar_chart([answer["label"] for answer in answers], [answer["score"] for answer in answers])

    def token_names(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token, with visible white space."""
        texts = (str(self.tokenizer.decode([token])) for token in ids)
        return [text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") for text in texts]


def bar_chart(names: Sequence[str], shares: Sequence[float]) -> str:
    """Return a horizontal bar chart, as HTML, of shares between 0 and 1."""
    rows = "".join(
        f'<div class="name" title="{html.escape(name)}">{html.escape(name)}</div>'
        f'<div class="track"><div class="bar" style="width:{100 * share:.2f}%"></div></div>'
        f'<div class="share">{share:.1%}</div>'
        for name, share in zip(names, shares, strict=True)
    )
    return f'<div class="bars">{rows}</div>'


def heatmap(names: Sequence[str], weights: Sequence[Sequence[float]]) -> str:
    """Return a causal attention map, as SVG, with a row per query and a column per key.

    Darker cells have larger weights. A tooltip shows the number.
    """
    size, margin = 22, 96
    side = margin + size * len(names)
    parts = [f'<rect class="ground" x="{margin}" y="{margin}" width="{side - margin}" height="{side - margin}"/>']
    for i, name in enumerate(names):
        label = html.escape(name if len(name) <= 12 else name[:11] + "…")
        center = margin + size * i + size / 2
        parts.append(f'<text x="{margin - 6}" y="{center + 4}" text-anchor="end" font-size="13">{label}</text>')
        rotation = f'transform="translate({center + 4} {margin - 6}) rotate(-90)"'
        parts.append(f'<text {rotation} font-size="13">{label}</text>')
        for j, weight in enumerate(weights[i][: i + 1]):
            title = f"{html.escape(name)} → {html.escape(names[j])}: {weight:.1%}"
            x, y = margin + size * j, margin + size * i
            parts.append(
                f'<rect class="cell" x="{x}" y="{y}" width="{size - 1}" height="{size - 1}" '
                f'fill-opacity="{weight:.3f}"><title>{title}</title></rect>'
            )
    return f'<svg class="heatmap" viewBox="0 0 {side} {side}" role="img">{"".join(parts)}</svg>'


def load_page(model: str, classifier: str | None = None, trust_remote_code: bool = False) -> Page:
    """Load the model and the optional classifier of a page, each from a folder or the Hub."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model, trust_remote_code=trust_remote_code, attn_implementation="eager"
    )
    loaded.to(device)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token is None:
        raise ValueError(
            f"model={model!r}: its tokenizer has no eos_token, which is needed at the beginning of texts. Set one."
        )
    classify = None
    if classifier is not None:
        classify = pipeline(
            "text-classification", model=classifier, trust_remote_code=trust_remote_code, device=device
        )
    return Page(loaded, tokenizer, classify)


def build(page: Page, title: str, prompt: str = "", examples: Sequence[str] = ()) -> Any:
    """Build the gradio app of a page."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr

    millions = page.model.num_parameters() / 1e6
    with gr.Blocks(title=title, analytics_enabled=False) as app:
        gr.Markdown(
            f"# {html.escape(title)}\n{millions:.2f} million parameters, {page.num_layers} layers of {page.num_heads} "
            f"heads, {page.context_length} tokens of context. Write the beginning of a text and let the model "
            "continue it. You can edit the text at any time."
        )
        text = gr.Textbox(prompt, label="Text", lines=6, max_lines=16, elem_id="text", autoscroll=True)
        with gr.Row():
            generate = gr.Button("Generate", variant="primary", elem_id="generate", min_width=80)
            stop = gr.Button("Stop", elem_id="stop", min_width=80)
            clear = gr.Button("Clear", elem_id="clear", min_width=80)
        if examples:
            gr.Examples([[example] for example in examples], text, label="Examples")
        with gr.Accordion("Sampling settings", open=False):
            num_new = gr.Slider(1, 512, 80, step=1, label="New tokens", elem_id="num_new")
            temperature = gr.Slider(
                0, 2, 0.8, step=0.05, label="Temperature", info="0: greedy decoding", elem_id="temperature"
            )
            top_k = gr.Slider(0, 200, 0, step=1, label="Top-k", info="0: all tokens")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
            penalty = gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty")
        panels: list[tuple[Any, list[Any], Any]] = []
        with gr.Tabs():
            with gr.Tab("Next token"):
                panels.append((page.next_tokens, [text], gr.HTML(elem_id="next")))
            if page.num_layers > 0:
                with gr.Tab("Attention"):
                    with gr.Row():
                        layer = gr.Number(
                            1, label="Layer", minimum=1, maximum=page.num_layers, step=1, precision=0, elem_id="layer"
                        )
                        head = gr.Number(
                            1, label="Head", minimum=1, maximum=page.num_heads, step=1, precision=0, elem_id="head"
                        )
                    gr.Markdown(
                        f"Each row shows how much a token attends to itself and to earlier tokens. The last "
                        f"{MAX_ATTENTION_TOKENS} tokens are shown."
                    )
                    panels.append((page.attention, [text, layer, head], gr.HTML(elem_id="attention")))
            if page.classifier is not None:
                with gr.Tab("Sentiment"):
                    panels.append((page.sentiment, [text], gr.HTML(elem_id="sentiment")))

        # The panels are updated when the text changes, by typing or by generation.
        writing = generate.click(page.generate, [text, num_new, temperature, top_k, top_p, penalty], text)
        stop.click(None, cancels=[writing])
        clear.click(lambda: "", None, text)
        for function, inputs, output in panels:
            sources = [app.load, text.change, *(source.change for source in inputs[1:])]
            gr.on(sources, function, inputs, output, trigger_mode="always_last", show_progress="hidden")
    return app


def launch(app: Any, **kwargs: Any) -> Any:
    """Serve an app, with system fonts and without requests to other hosts."""
    import gradio as gr

    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Soft(primary_hue="indigo", font=fonts, font_mono=["ui-monospace", "monospace"])
    return app.queue(default_concurrency_limit=2).launch(theme=theme, css=CSS, ssr_mode=False, **kwargs)
