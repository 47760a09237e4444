"""The style sheet of the report: light or dark as the reader's system is set, one column on a phone."""

STYLE = """
:root {
  color-scheme: light dark;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --page: #f6f7f9; --card: #ffffff; --line: #e3e6eb; --ink: #16191d; --soft: #5b6470;
  --bar: #3d63dd; --bar-soft: #3d63dd22; --rest: #8a94a3; --track: #eceff3;
  --ok: #2a7354; --ok-soft: #e2f2ea; --empty: #8f5e00; --empty-fill: #c2840c; --empty-soft: #fbf0d6;
  --error: #c0322c; --error-soft: #fbe6e4; --code: #f0f2f6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1216; --card: #171b21; --line: #2a3038; --ink: #e8ebef; --soft: #9ba5b2;
    --bar: #7d9bff; --bar-soft: #7d9bff2b; --rest: #697484; --track: #252b33;
    --ok: #5cc196; --ok-soft: #173126; --empty: #e2b251; --empty-fill: #d19c2f; --empty-soft: #33290f;
    --error: #ff8b82; --error-soft: #3a1a18; --code: #10141a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 40px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.02em; }
h2 { font-size: 20px; margin: 44px 0 14px; letter-spacing: -0.01em; }
h3 { font-size: 16px; margin: 0; }
h4 { font-size: 14px; margin: 14px 0 6px; }
.over-sheet { margin: 20px 0 8px; }
.below { margin-top: 16px; }
p { margin: 0 0 12px; }
.soft, figcaption p, footer { color: var(--soft); }
.soft, figcaption p { font-size: 14px; }
.heading { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 14px; }
.heading h1 { margin: 0; }
.chip { border-radius: 99px; padding: 2px 12px; font-size: 13px; font-weight: 600; white-space: nowrap; }
.chip.ok { color: var(--ok); background: var(--ok-soft); box-shadow: inset 0 0 0 1px var(--ok); }
.chip.empty { color: var(--empty); background: var(--empty-soft); box-shadow: inset 0 0 0 1px var(--empty); }
.chip.error { color: var(--error); background: var(--error-soft); box-shadow: inset 0 0 0 1px var(--error); }
.notice { border-left: 4px solid var(--empty-fill); background: var(--empty-soft); border-radius: 6px;
  padding: 12px 16px; margin: 16px 0 0; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 16px; margin-top: 24px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; }
.pair > :only-child { grid-column: 1 / -1; }
.card, figure, .sheet { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.card, figure { padding: 18px 20px; margin: 0; min-width: 0; }
figure { display: flex; flex-direction: column; }
.card .label { font-size: 14px; color: var(--soft); font-weight: 600; }
.card .value { font-size: clamp(22px, 2.7vw, 32px); font-weight: 650; line-height: 1.25; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.card .note { font-size: 14px; color: var(--soft); }
.balance { margin-top: 16px; }
.balance p { margin: 0; font-variant-numeric: tabular-nums; }
.balance p + p { margin-top: 4px; }
.balance svg { margin-top: 12px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 20px; margin: 8px 0 0; padding: 0; }
.legend li { list-style: none; font-size: 14px; }
.legend li::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 3px;
  margin-right: 7px; background: var(--rest); }
.legend .ok::before { background: var(--ok); }
.legend .empty::before { background: var(--empty-fill); }
.legend .error::before { background: var(--error); }
.legend .busy::before { background: var(--bar); }
figcaption { margin-bottom: 10px; }
figcaption p { margin: 2px 0 0; }
svg { display: block; overflow: visible; }
.plot-area { padding: 0 8px 0 38px; }
svg .grid { stroke: var(--line); }
svg .axis { stroke: var(--rest); }
svg .tick { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .start { text-anchor: start; }
svg .middle { text-anchor: middle; }
svg .end { text-anchor: end; }
svg .mark { stroke: var(--ink); stroke-dasharray: 3 3; opacity: 0.6; }
svg .mark-label { fill: var(--ink); font-size: 12px; font-weight: 600; }
svg .bar { fill: var(--bar); }
svg .bar.odd { fill: var(--empty-fill); }
svg .bar.rest, svg .bar.other { fill: var(--rest); }
svg .hit { fill: transparent; }
svg g:hover .hit { fill: var(--bar-soft); }
svg .area { fill: var(--bar-soft); }
svg .line { fill: none; stroke: var(--bar); stroke-width: 2; stroke-linejoin: round; }
svg .track, svg .share { fill: var(--track); }
svg .row-name { fill: var(--ink); font-size: 14px; font-weight: 600; }
svg .row-value { fill: var(--soft); font-size: 14px; font-variant-numeric: tabular-nums; }
svg .share { stroke-width: 1; }
svg .share.ok { fill: var(--ok); stroke: var(--ok); }
svg .share.empty { fill: var(--empty-fill); stroke: var(--empty-fill); }
svg .share.error { fill: var(--error); stroke: var(--error); }
svg .share.busy { fill: var(--bar); stroke: var(--bar); }
svg .share.idle { fill: var(--rest); stroke: var(--rest); }
details { margin-top: auto; padding-top: 10px; font-size: 14px; }
summary { cursor: pointer; color: var(--soft); width: fit-content; }
summary:hover { color: var(--ink); }
details table { margin-top: 8px; }
.scroll { max-height: 320px; overflow: auto; }
.sheet { padding: 4px 20px; overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 9px 16px 9px 0; border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td { overflow-wrap: anywhere; }
.sheet .number { width: 1%; }
.odd { color: var(--empty); font-weight: 650; }
.id { font: 12.5px/1.5 var(--mono); }
td[data-label="id"] { width: 30%; }
td[data-label="example"] { width: 26%; }
td[data-label="kind"] { white-space: nowrap; }
.facts th { width: 11em; font-weight: 600; }
pre { background: var(--code); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
  margin: 4px 0 16px; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 var(--mono); }
pre:last-child { margin-bottom: 0; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
footer { padding-top: 32px; padding-bottom: 48px; font-size: 13px; }
@media (max-width: 900px) { .cards { grid-template-columns: 1fr 1fr; } }
@media (max-width: 720px) {
  header, main, footer { padding-left: 14px; padding-right: 14px; }
  header { padding-top: 24px; }
  h1 { font-size: 25px; }
  .pair { grid-template-columns: 1fr; }
  .cards { gap: 10px; }
  .card, figure { padding: 14px; }
  .sheet { padding: 2px 14px; }
  .sheet table, .sheet tbody, .sheet tr, .sheet td, .sheet th[scope="row"] { display: block; width: 100%; }
  .sheet thead { display: none; }
  .sheet tr { padding: 10px 0; border-bottom: 1px solid var(--line); }
  .sheet tbody tr:last-child { border-bottom: 0; }
  .sheet td, .sheet th[scope="row"] { padding: 1px 0; border: 0; text-align: left; white-space: normal; }
  .sheet td[data-label] { display: grid; grid-template-columns: 6.5em 1fr; gap: 8px; width: 100%; }
  .sheet td[data-label]::before { content: attr(data-label); color: var(--soft); font-size: 13px; }
}
@media print { body { background: none; } .card, figure, .sheet { break-inside: avoid; } }
"""
