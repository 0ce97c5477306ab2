/** Code and formulas, once their block is finished: both libraries are fetched when needed. */

import DOMPurify from "dompurify";

export async function decorate(element: HTMLElement): Promise<void> {
  const codes = element.querySelectorAll<HTMLElement>("code[data-language]:not([data-done])");
  const formulas = element.querySelectorAll<HTMLElement>(".math:not([data-done])");
  if (codes.length) {
    const { colour } = await import("./highlight");
    for (const code of codes) {
      code.dataset.done = "";
      colour(code, code.dataset.language ?? "");
    }
  }
  if (formulas.length) {
    const { default: temml } = await import("temml");
    for (const formula of formulas) {
      formula.dataset.done = "";
      const source = formula.textContent ?? "";
      try {
        const displayMode = "display" in formula.dataset;
        // No \href, \includegraphics or \class: what a formula may do is to be seen.
        const mathml = temml.renderToString(source, { displayMode, trust: false, throwOnError: true });
        // Its style attributes are few, and the Content-Security-Policy allows none, not even in
        // a text that is about to be cleaned.
        formula.innerHTML = DOMPurify.sanitize(mathml.replace(/ style="[^"]*"/g, ""), {
          USE_PROFILES: { mathMl: true },
        });
      } catch {
        formula.textContent = source;
      }
    }
  }
}
