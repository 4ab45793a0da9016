"""How the page's own HTML looks, in the light and in the dark: colors that are not its own are the theme's."""

from __future__ import annotations

STYLE = """<style>
.bx { font-size: 14px; color: var(--body-text-color); }
.bx-top { display: flex; gap: 28px; flex-wrap: wrap; margin-bottom: 8px; }
.bx-top div span { display: block; font-size: 12px; opacity: .7; }
.bx-top div b { font-size: 20px; }
.bx-text { opacity: .8; margin: 4px 0; overflow-wrap: anywhere; }
.bx-exit { display: grid; grid-template-columns: 96px minmax(150px, 5fr) minmax(150px, 4fr); gap: 4px 14px;
  border: 1px solid var(--border-color-primary); border-radius: 6px; padding: 6px 10px; margin-top: 6px; }
.bx-exit.answers { border: 2px solid #0072b2; }
.bx-exit.behind { opacity: .5; border-style: dashed; }
.bx-name b, .bx-name small { display: block; }
.bx-tag { font-size: 11px; border-radius: 4px; padding: 1px 5px; background: var(--background-fill-secondary); }
.bx-exit.answers .bx-tag { background: #0072b2; color: white; }
.bx-bar { display: grid; grid-template-columns: minmax(48px, 22%) 1fr 48px; gap: 6px; align-items: center;
  font-size: 12px; line-height: 16px; }
.bx-bar span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bx-bar i { display: block; height: 10px; border-radius: 2px; min-width: 1px; }
.bx-bar u { text-decoration: none; text-align: right; }
.bx-why { font-size: 12px; line-height: 17px; }
.bx-why b { display: block; font-size: 13px; }
.bx-chip { display: inline-block; border: 1px solid var(--border-color-primary); border-radius: 4px;
  padding: 0 4px; margin: 1px 3px 1px 0; font-variant-numeric: tabular-nums; }
.bx-chip.yes { border-color: #009e73; box-shadow: inset 0 -2px #009e73; }
.bx-dots { letter-spacing: 2px; color: #0072b2; margin-left: 8px; }
.bx-note { border-left: 3px solid #e69f00; padding: 4px 10px; margin: 6px 0; }
.bx-error { border-left: 3px solid #d55e00; padding: 6px 10px; margin: 6px 0; }
.bx table { border-collapse: collapse; margin-top: 8px; }
.bx td, .bx th { padding: 2px 12px 2px 0; text-align: right; }
.bx td:first-child, .bx th:first-child { text-align: left; }
.bx-command { white-space: pre-wrap; overflow-wrap: anywhere; padding: 6px 10px;
  background: var(--background-fill-secondary); }
@media (max-width: 620px) { .bx-exit { grid-template-columns: 1fr; } }
</style>"""
