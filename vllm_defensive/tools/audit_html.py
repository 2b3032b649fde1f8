"""A picture of one eviction: which tokens each layer kept, over the text itself, and what each layer and head got.

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
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #5c5c66; --paper: #fdfdfb; --rule: #d8d8d2; --heat: 245, 130, 32; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #f2f2f5; --soft: #a9a9b4; --paper: #17181c; --rule: #3a3b42; --heat: 206, 92, 10; } }
body { margin: 0 auto; max-width: 1240px; padding: 0 22px 30px; font: 15px/1.6 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 20px; margin: 20px 0 2px; } h2 { font-size: 14px; margin: 0 0 4px; } p { margin: 2px 0 8px; color: var(--soft); }
main { display: grid; grid-template-columns: minmax(0, 1fr) 380px; gap: 32px; align-items: start; margin-top: 16px; }
@media (max-width: 900px) { main { grid-template-columns: 1fr; } aside { order: -1; } }
#text { white-space: pre-wrap; overflow-wrap: anywhere; }
#text span { border-radius: 2px; padding: 1px 0; }
#text span.window { border-bottom: 2px solid var(--soft); }
#text span:empty::before { content: "·"; color: var(--soft); } /* part of a character that a later token completes */
aside { position: sticky; top: 14px; font-size: 13px; line-height: 1.45; }
.key { display: grid; grid-template-columns: auto 1fr auto; gap: 8px; align-items: center; margin-bottom: 14px; }
.scale { height: 12px; border: 1px solid var(--rule); background: linear-gradient(90deg, rgba(var(--heat), 0), rgb(var(--heat))); }
#layers { max-height: calc(100vh - 250px); min-height: 240px; overflow-y: auto; border-top: 1px solid var(--rule);
  padding-top: 4px; font-variant-numeric: tabular-nums; }
.row { display: grid; grid-template-columns: 30px minmax(0, calc(__HEADS__ * 20px)) minmax(60px, 1fr) 88px; gap: 8px;
  align-items: center; width: 100%; height: 17px; padding: 0; border: 0; background: none; color: inherit; font: inherit; }
button.row { cursor: pointer; } button.row:hover, .row.chosen { background: var(--rule); }
.head { color: var(--soft); height: auto; } .row > :first-child, .row > :last-child { text-align: right; }
.cells { display: grid; grid-template-columns: repeat(__HEADS__, 1fr); height: 13px; gap: 1px; }
.cells i { outline: 1px solid var(--rule); outline-offset: -1px; }
.bar { position: relative; height: 9px; }
.bar i { display: block; height: 100%; background: rgb(var(--heat)); }
.bar::after { content: ""; position: absolute; top: -4px; bottom: -4px; left: var(--mean); border-left: 1px dashed var(--soft); }
</style></head><body>
<h1>__TITLE__</h1><p>__FACTS__</p>
<main>
<div id="text" aria-label="The prompt, each token shaded by the share of heads that kept it"></div>
<aside>
<h2>Shading of the text: <span id="which"></span></h2>
<div class="key"><span>dropped by all</span><div class="scale"></div><span>kept by all heads</span></div>
<h2>Budget: tokens that each layer kept</h2>
<p>A cell is one KV head: the more colour, the more it kept. The bar is the mean of the layer's heads, the dashed line that of all
layers. <b>Click a layer</b> to shade the text by its heads, again for all.</p>
<div class="row head"><span>layer</span><span>heads</span><span>mean of heads</span><span>tokens, share</span></div>
<div id="layers"></div>
<p style="margin-top:10px">Underlined: the observation window, which every head keeps. Layers with sliding windows are not
evicted, and not counted here.</p>
</aside></main>
<script>
const data = __DATA__;
const L = data.counts.length, H = data.counts[0].length, T = data.tokens.length;
const text = document.getElementById("text"), layers = document.getElementById("layers");
// kept[l] has one digit a token, base 36: how many of the layer's heads kept it, of `levels`.
const kept = (l, t) => parseInt(data.kept[l][t], 36) / data.levels;
const mean = Array.from({length: T}, (_, t) => { let s = 0; for (let l = 0; l < L; l++) s += kept(l, t); return s / L; });
const percent = share => `${(100 * share).toFixed(0)} %`;
const heat = share => `rgba(var(--heat), ${share})`;
const add = (parent, tag, properties = {}) => parent.appendChild(Object.assign(document.createElement(tag), properties));
const spans = data.tokens.map((token, t) => add(text, "span", {
  textContent: token,
  className: t >= T - data.window ? "window" : "",
  title: `token ${t}: kept by ${percent(mean[t])} of all heads`,
}));
let chosen = -1;
const rows = data.counts.map((counts, l) => {
  const row = add(layers, "button", {className: "row", type: "button", onclick: () => shade(chosen === l ? -1 : l)});
  row.title = `layer ${l}: its heads kept ${counts.join(", ")} of ${T} tokens`;
  add(row, "span", {textContent: l});
  const cells = add(row, "span", {className: "cells"}), bar = add(row, "span", {className: "bar"});
  for (const count of counts) add(cells, "i").style.background = heat(count / data.most);
  add(bar, "i").style.width = `${100 * data.layers[l] / Math.max(...data.layers)}%`;
  bar.style.setProperty("--mean", `${100 * data.mean / Math.max(...data.layers)}%`);
  add(row, "span", {textContent: `${data.layers[l].toFixed(0)}, ${percent(data.layers[l] / T)}`, className: "budget"});
  return row;
});
function shade(layer) {
  chosen = layer;
  document.getElementById("which").textContent = layer < 0 ? "all layers" : `layer ${layer}`;
  rows.forEach((row, l) => row.classList.toggle("chosen", l === layer));
  spans.forEach((span, t) => { span.style.background = heat(layer < 0 ? mean[t] : kept(layer, t)); });
}
shade(-1);
</script></body></html>
"""  # noqa: E501 - the page's own line lengths
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def render(audit: Audit, tokens: Sequence[str]) -> str:
    """The page, given the text of each of the prompt's `T` tokens. Raises ValueError if they are not `T`."""
    if len(tokens) != audit.stop:
        raise ValueError(f"{len(tokens)} token texts for an audit of {audit.stop} tokens")
    layers, heads = audit.kept_counts.shape
    # One base-36 digit a token and layer keeps the file small; beyond 35 heads the share is rounded to 35ths.
    levels = min(heads, len(_DIGITS) - 1)
    share_LT = audit.mask().sum(dim=1) * levels // heads if heads > levels else audit.mask().sum(dim=1)
    counts_LH = audit.kept_counts.double()
    mean = float(counts_LH.mean())
    data = {
        "tokens": list(tokens),
        "kept": ["".join(_DIGITS[n] for n in row) for row in share_LT.tolist()],
        "levels": levels,
        "counts": audit.kept_counts.tolist(),
        "most": int(audit.kept_counts.max()),
        "layers": [round(budget, 1) for budget in counts_LH.mean(dim=1).tolist()],
        "mean": round(mean, 1),
        "window": audit.window,
    }
    facts = (
        f"Of {audit.stop} prompt tokens the {layers} x {heads} KV heads (layers x heads) kept {mean:.0f} each on "
        f"average, {100 * mean / audit.stop:.1f} % (asked for: {100 * audit.keep_ratio:g} %), at least "
        f"{int(counts_LH.min())} and at most {int(counts_LH.max())}. In memory: {audit.packed_blocks} packed blocks of "
        f"{audit.block_size} tokens, {audit.shared_blocks} shared blocks left in place."
    )
    # "<" could end the script, or begin a comment in which "</script>" no longer ends it, whatever the prompt says.
    payload = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = _PAGE.replace("__TITLE__", html.escape(f"KV eviction by {audit.policy}")).replace("__HEADS__", str(heads))
    return page.replace("__FACTS__", html.escape(facts)).replace("__DATA__", payload)
