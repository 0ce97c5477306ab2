/** Highlight code and render formulas in finished blocks; both libraries are loaded on demand. */

import DOMPurify from "dompurify";

export async function decorate(element: HTMLElement): Promise<void> {
  const codes = element.querySelectorAll<HTMLElement>("code[data-language]:not([data-done])");
  const formulas = element.querySelectorAll<HTMLElement>(".math:not([data-done])");
  if (codes.length) {
    const { highlight } = await import("./highlight");
    for (const code of codes) {
      code.dataset.done = "";
      highlight(code, code.dataset.language ?? "");
    }
  }
  if (formulas.length) {
    const { default: temml } = await import("temml");
    for (const formula of formulas) {
      formula.dataset.done = "";
      const source = formula.textContent ?? "";
      try {
        const displayMode = "display" in formula.dataset;
        // Untrusted: no \href, \includegraphics or \class.
        const mathml = temml.renderToString(source, { displayMode, trust: false, throwOnError: true });
        // The Content-Security-Policy forbids style attributes, even in text that is about to be
        // sanitized.
        formula.innerHTML = DOMPurify.sanitize(mathml.replace(/ style="[^"]*"/g, ""), {
          USE_PROFILES: { mathMl: true },
        });
      } catch {
        formula.textContent = source;
      }
    }
  }
}
