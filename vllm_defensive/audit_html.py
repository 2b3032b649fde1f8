"""A picture of one eviction: which tokens each layer kept, over the text itself, and what each head got.

`python -m vllm_defensive.audit show FILE --html OUT` writes one file that needs nothing but a browser.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

from vllm_defensive.audit import Audit

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>__TITLE__</title>
<style>
:root { color-scheme: light dark; --ink: #1b1b1f; --paper: #fdfdfb; --rule: #d8d8d2; --heat: 214, 96, 21; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --paper: #17181c; --rule: #3a3b42; --heat: 255, 150, 60; } }
body { margin: 0; font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
header, main { max-width: 1180px; margin: auto; padding: 0 20px; }
h1 { font-size: 19px; margin: 22px 0 2px; } p { margin: 4px 0; opacity: .8; }
main { display: grid; grid-template-columns: minmax(0, 1fr) 300px; gap: 28px; align-items: start; margin-top: 14px; }
@media (max-width: 860px) { main { grid-template-columns: 1fr; } }
#text { white-space: pre-wrap; overflow-wrap: anywhere; border-top: 1px solid var(--rule); padding-top: 10px; }
#text span { border-radius: 2px; }
#text span.window { border-bottom: 2px solid rgb(var(--heat)); }
aside { position: sticky; top: 12px; border-top: 1px solid var(--rule); padding-top: 10px; }
label { display: block; margin-bottom: 4px; } input { width: 100%; }
canvas { width: 100%; image-rendering: pixelated; border: 1px solid var(--rule); cursor: pointer; }
#hint { min-height: 3em; font-variant-numeric: tabular-nums; }
.scale { height: 10px; background: linear-gradient(90deg, rgba(var(--heat), 0), rgba(var(--heat), .85)); }
.ends { display: flex; justify-content: space-between; font-size: 13px; opacity: .8; }
</style></head><body>
<header><h1>__TITLE__</h1><p>__FACTS__</p></header>
<main>
<div id="text" aria-label="The prompt, each token shaded by the share of heads that kept it"></div>
<aside>
<label for="layer">Shading: <b id="which"></b></label>
<input id="layer" type="range" min="-1" value="-1">
<div class="scale"></div><div class="ends"><span>no head kept it</span><span>every head did</span></div>
<p style="margin-top:14px">Tokens kept by each head (row: layer, column: KV head). Click a row to shade by that layer.</p>
<canvas id="heads"></canvas><div id="hint"></div>
<p>Underlined: the observation window, which every head keeps.</p>
</aside></main>
<script>
const data = __DATA__;
const L = data.counts.length, H = data.counts[0].length, T = data.tokens.length;
const text = document.getElementById("text"), slider = document.getElementById("layer");
const which = document.getElementById("which"), hint = document.getElementById("hint");
const heat = () => getComputedStyle(document.documentElement).getPropertyValue("--heat");
// kept[l] is a string with one hexadecimal-like digit a token: how many of the layer's heads kept it, base 36.
const kept = (l, t) => parseInt(data.kept[l][t], 36) / data.levels;
const mean = Array.from({length: T}, (_, t) => { let s = 0; for (let l = 0; l < L; l++) s += kept(l, t); return s / L; });
const spans = data.tokens.map((token, t) => {
  const span = document.createElement("span");
  span.textContent = token;
  if (t >= T - data.window) span.className = "window";
  span.title = `token ${t}: kept by ${(100 * mean[t]).toFixed(0)} % of all heads`;
  text.append(span);
  return span;
});
function shade(layer) {
  which.textContent = layer < 0 ? "all layers" : `layer ${layer}`;
  spans.forEach((span, t) => {
    span.style.background = `rgba(${heat()}, ${0.85 * (layer < 0 ? mean[t] : kept(layer, t))})`;
  });
}
slider.max = L - 1;
slider.oninput = () => shade(+slider.value);
const canvas = document.getElementById("heads"), box = 14;
canvas.width = H * box; canvas.height = L * box;
canvas.style.maxWidth = `${Math.min(300, H * 40)}px`;
canvas.style.height = `${Math.min(480, L * box)}px`;
const paint = canvas.getContext("2d"), most = Math.max(...data.counts.flat());
data.counts.forEach((row, l) => row.forEach((count, h) => {
  paint.fillStyle = `rgba(${heat()}, ${count / most})`;
  paint.fillRect(h * box, l * box, box - 1, box - 1);
}));
function cell(event) {
  const area = canvas.getBoundingClientRect();
  const h = Math.floor((event.clientX - area.left) / area.width * H);
  const l = Math.floor((event.clientY - area.top) / area.height * L);
  return [Math.min(Math.max(l, 0), L - 1), Math.min(Math.max(h, 0), H - 1)];
}
canvas.onmousemove = event => {
  const [l, h] = cell(event);
  hint.textContent = `layer ${l}, head ${h}: ${data.counts[l][h]} of ${T} tokens (${(100 * data.counts[l][h] / T).toFixed(1)} %)`;
};
canvas.onclick = event => { slider.value = cell(event)[0]; shade(+slider.value); };
shade(-1);
</script></body></html>
"""  # noqa: E501 - the page's own line lengths
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def render(audit: Audit, tokens: Sequence[str]) -> str:
    """The page, given the text of each of the prompt's `T` tokens. Raises ValueError if they are not `T`."""
    if len(tokens) != audit.num_tokens:
        raise ValueError(f"{len(tokens)} token texts for an audit of {audit.num_tokens} tokens")
    heads = audit.kept_counts.shape[1]
    # One base-36 digit a token and layer keeps the file small; beyond 35 heads the share is rounded to 35ths.
    levels = min(heads, len(_DIGITS) - 1)
    share_LT = audit.mask().sum(dim=1) * levels // heads if heads > levels else audit.mask().sum(dim=1)
    data = {
        "tokens": list(tokens),
        "kept": ["".join(_DIGITS[n] for n in row) for row in share_LT.tolist()],
        "levels": levels,
        "counts": audit.kept_counts.tolist(),
        "window": audit.window,
    }
    effective = float(audit.kept_counts.float().mean()) / audit.num_tokens
    facts = (
        f"{audit.num_tokens} tokens; keep ratio {audit.keep_ratio:g}, really kept {100 * effective:.1f} %; "
        f"{audit.packed_blocks} packed blocks of {audit.block_size} tokens, {audit.shared_blocks} shared; "
        f"{audit.kept_counts.shape[0]} layers, {heads} KV heads"
    )
    # "</" could end the script early, whatever the prompt says.
    payload = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    page = _PAGE.replace("__TITLE__", html.escape(f"KV eviction by {audit.policy}"))
    return page.replace("__FACTS__", html.escape(facts)).replace("__DATA__", payload)
