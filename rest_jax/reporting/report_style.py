"""The report's style sheet: one column of cards, readable in light and dark appearance and on paper."""

CSS = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #ffffff; --ink: #1f2328; --muted: #656d76; --line: #e4e7eb;
  --accent: #0b4fa8; --good: #1a7f37; --bad: #b3261e; --warn: #fff4e0; --changed: #fbe9b7; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #161b22; --ink: #e6edf3; --muted: #9198a1;
  --line: #2d333b; --accent: #8cc4ff; --good: #4ac26b; --bad: #ff7b72; --warn: #3a2d12; --changed: #4d3e12; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; }
h2 { font-size: 17px; margin: 0 0 4px; }
p { margin: 0 0 10px; }
.muted, .note { color: var(--muted); }
.note { font-size: 13px; max-width: 100ch; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin-top: 18px; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 14px; margin-top: 18px; }
.tiles .card { margin: 0; }
.tile-name { color: var(--muted); font-size: 13px; }
.tile-value { font-size: 25px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile-from { color: var(--muted); font-size: 15px; font-weight: 400; }
.tile-detail { font-size: 13px; color: var(--muted); }
.good { color: var(--good); } .bad { color: var(--bad); }
.warning { background: var(--warn); }
.alarm { background: var(--warn); border: 2px solid var(--bad); font-weight: 600; }
.plots { columns: 460px 2; column-gap: 18px; }
.plots .card { break-inside: avoid; display: inline-block; width: 100%; }
.plots img { width: 100%; height: auto; display: block; margin-top: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--muted); font-size: 13px; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child td { border-bottom: 0; }
thead th { vertical-align: bottom; }
th.number, td.number { text-align: right; }
td.number { white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
tr.final td { font-weight: 600; }
tr.grow td { color: var(--muted); }
.examples td { width: 25%; overflow-wrap: anywhere; }
.examples .score { display: block; color: var(--muted); font-size: 12px; margin-top: 3px; }
mark { background: var(--changed); color: inherit; border-radius: 3px; padding: 0 2px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 0; font-size: 14px; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
pre, code { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 10px 0 0; }
summary { cursor: pointer; font-weight: 600; }
@media print { .card { break-inside: avoid; } }
""".strip()
