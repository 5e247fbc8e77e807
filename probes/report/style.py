"""The page's style sheet: one column that fits a phone, light and dark, and ink-friendly in print."""

CSS = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #555e68; --line: #dde1e6; --back: #fdfdfc; --panel: #f4f5f6;
  --accent: #1d63b8; --good: #1b6e3c; --bad: #a33a12; --heat: 96, 165, 240; --least: 0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e9ebee; --soft: #a4acb6; --line: #353b43; --back: #14171a;
  --panel: #1d2126; --accent: #79b2f4; --good: #7ccf9b; --bad: #f0a07c; --heat: 52, 110, 180; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 2.5rem) 4rem; max-width: 82rem; background: var(--back);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: clamp(1.5rem, 5vw, 2.1rem); line-height: 1.2; letter-spacing: -.01em; margin: 0 0 .6rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: 1.4rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; } h4 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { max-width: 46rem; margin: .5rem 0; overflow-wrap: anywhere; } .lead { font-size: 1.08rem; color: var(--soft); }
.note, .notes, figcaption, footer { color: var(--soft); font-size: .88rem; } .notes { padding-left: 1.2rem; }
.notes li { max-width: 52rem; margin: .25rem 0; overflow-wrap: anywhere; }
a { color: var(--accent); } code, pre { font: .84rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
code { overflow-wrap: anywhere; } section ul { overflow-wrap: anywhere; }
pre { overflow: auto; max-height: 24rem; white-space: pre-wrap; overflow-wrap: anywhere;
  padding: .8rem; background: var(--panel); border-radius: 6px; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; border-radius: 3px; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; margin: 1.2rem 0 0; padding: 0; }
nav a { display: inline-block; padding: .25rem 0; }
footer { margin-top: 4rem; border-top: 1px solid var(--line); }

.scroll { overflow-x: auto; margin: .8rem 0;  /* a shade at the right edge until the end is scrolled to */
  background: linear-gradient(to left, var(--back) 40%, transparent) right / 2.5rem 100% no-repeat local,
    linear-gradient(to left, rgba(128, 128, 128, .35), transparent) right / 1rem 100% no-repeat scroll; }
 figure { margin: 0 0 1rem; min-width: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; line-height: 1.35; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
th, td { padding: .38rem .35rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; } thead th { color: var(--soft); border-bottom-color: var(--soft); vertical-align: bottom; }
td:not(.from), th.number { text-align: right; white-space: nowrap; }
th.long { white-space: normal; max-width: 9rem; overflow-wrap: break-word; }
.plain td, .plain thead th + th { text-align: right; }
tbody th[scope=row], thead tr:first-child th:first-child { position: sticky; left: 0; background: var(--back);
  min-width: 7.5rem; max-width: 17rem; overflow-wrap: anywhere; z-index: 1; }
thead tr:first-child th[scope=colgroup] { color: var(--ink); font-weight: 600; border-left: 1px solid var(--line);
  border-bottom: 0; }
th.kind { color: var(--soft); font-size: .8rem; letter-spacing: .04em; text-transform: uppercase; padding-top: 1.1rem; }
td.from, th.from { color: var(--soft); font-size: .78rem; min-width: 4.5rem; max-width: 15rem; }
td.none { color: var(--soft); } td small { color: var(--soft); font-size: .78rem; }
td:not(.none) small { display: block; white-space: nowrap; }
strong { font-weight: 700; } td:not(.heat) strong { color: var(--accent); }
tr.published :is(th, td) { font-style: italic; color: var(--soft); background: var(--panel); }
tr.mean :is(th, td) { border-top: 1px solid var(--soft); color: var(--soft); font-weight: 500; }
td.better data { color: var(--good); } td.worse data { color: var(--bad); }
.bar { display: block; height: .3rem; margin-top: .28rem; border-radius: 2px; min-width: 3.2rem;
  background: linear-gradient(to right, var(--accent) calc(var(--share) * 100%), var(--line) 0); }
td .bar { min-width: 5rem; }

.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
article { padding: 1.1rem 1.2rem; background: var(--panel); border-radius: 10px; min-width: 0; }
article h3 { margin: 0; } article p { margin: .2rem 0; font-size: .92rem; color: var(--soft); }
article ol { list-style: none; margin: .8rem 0 0; padding: 0; display: grid; gap: .6rem; }
article li { display: grid; grid-template-columns: 1fr auto; gap: 0 .6rem; font-size: .92rem; }
article li .bar { grid-column: 1 / -1; } article li data { font-variant-numeric: tabular-nums; }
article li:first-child :is(.who, data) { font-weight: 700; } .who { overflow-wrap: anywhere; }

.maps { display: flex; flex-wrap: wrap; gap: .6rem 1.4rem; }
.map tbody th[scope=row], .map thead tr:first-child th:first-child { min-width: 4.8rem; }
.maps figure { max-width: 100%; }
td.heat { border: 2px solid var(--back); border-radius: 4px; min-width: 5.2rem;
  background-image: linear-gradient(rgba(var(--heat), var(--least)) 0 0); }
HEAT
.map td.none { border: 2px solid var(--back); }
.pair { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.chart { width: 100%; max-width: 40rem; height: auto; display: block; font-size: 12px; }
.scroll .chart { min-width: 27rem; } details .chart { max-width: 30rem; }
.chart text { fill: var(--soft); } .chart .name, .chart .axis { fill: var(--ink); }
.chart .grid { stroke: var(--line); } .mark { fill: var(--accent); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
.legend svg { width: .9rem; height: .9rem; vertical-align: -.1rem; }
.curve { fill: none; stroke: var(--soft); stroke-width: 1; opacity: .7; }
.curve.best { stroke: var(--accent); stroke-width: 2.5; opacity: 1; }

details { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; padding: .6rem 0; overflow-wrap: anywhere; }
summary::marker { color: var(--soft); } details[open] > summary { font-weight: 600; }
img { max-width: 100%; height: auto; display: block; border-radius: 4px; }
.grid { display: grid; gap: .3rem; align-items: center; font-size: .8rem; color: var(--soft); min-width: 46rem; }
.grid img { width: 100%; image-rendering: pixelated; }
.scene { width: 100%; height: auto; display: block; border-radius: 6px; margin-bottom: .5rem; font-size: 10px; }
.scene .box { fill: none; stroke: #fff; stroke-width: 1.6; paint-order: stroke; outline: 1px solid #000; }
.scene .plate { fill: #111; } .scene text { fill: #fff; font-weight: 700; }
article .asked { color: var(--ink); } article .answer { color: var(--accent); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; margin: .4rem 0 1rem; }
dt { font-weight: 600; } dd { margin: 0; color: var(--soft); }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
  tbody th[scope=row], thead tr:first-child th:first-child { max-width: 8.5rem; } }

@media print {
  @page { size: A4 landscape; margin: 12mm; }
  :root { --ink: #000; --soft: #444; --line: #bbb; --back: #fff; --panel: #fff; --accent: #0b4a94; --good: #000;
    --bad: #000; --heat: 190, 210, 235; color-scheme: light; }
  html { font-size: 9.5pt; } body { max-width: none; padding: 0; } nav { display: none; } h2 { margin-top: 1.4rem; }
  h2, h3, h4, summary, figcaption { break-after: avoid; } tr, figure, article { break-inside: avoid; }
  thead { display: table-header-group; } .scroll, pre { overflow: visible; max-height: none; }
  .scroll { background: none; }
  .grid, .scroll .chart { min-width: 0; } table { font-size: .76rem; width: 100%; }
  td.from, th.from, td small { font-size: .66rem; } data { white-space: nowrap; }
  th, td { padding: .15rem .3rem; white-space: normal !important; min-width: 0 !important; }
  tbody th[scope=row], thead tr:first-child th:first-child { position: static; overflow-wrap: anywhere;
    min-width: 6rem !important; } td.from { max-width: 5.5rem; }
  article { border: 1px solid var(--line); } a { color: inherit; text-decoration: none; }
  .bar, td.heat { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
""".replace("HEAT", "\n".join(f".h{i} {{ --least: {0.06 + 0.94 * i / 8:.3f}; }}" for i in range(9)))
