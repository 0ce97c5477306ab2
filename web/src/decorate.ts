/** Highlight code and render formulas in finished blocks; both libraries are loaded on demand. */

import DOMPurify from "dompurify";

const MAX_CODE = 200_000; // characters; longer code stays plain
const WORK = 12; // ms, after which the browser may draw and handle input

export async function decorate(element: HTMLElement): Promise<void> {
  const codes = element.querySelectorAll<HTMLElement>("code[data-language]:not([data-done])");
  const formulas = element.querySelectorAll<HTMLElement>(".math:not([data-done])");
  if (codes.length) {
    const { highlight } = await import("./highlight");
    for (const code of codes) {
      code.dataset.done = "";
      const length = code.textContent?.length ?? 0;
      if (length <= MAX_CODE) highlight(code, code.dataset.language ?? "");
    }
  }
  if (formulas.length) {
    const { toMathMl } = await import("./formulas");
    let started = performance.now();
    for (const formula of formulas) {
      if (performance.now() - started > WORK) {
        await new Promise((resolve) => setTimeout(resolve));
        started = performance.now();
      }
      formula.dataset.done = "";
      const source = formula.textContent ?? "";
      try {
        draw(formula, toMathMl(source, "display" in formula.dataset));
      } catch {
        formula.textContent = source;
      }
    }
  }
}

function draw(formula: HTMLElement, mathml: string): void {
  formula.innerHTML = DOMPurify.sanitize(mathml, {
    USE_PROFILES: { mathMl: true },
    ADD_ATTR: ["class"], // of Temml's style sheet
  });
  for (const element of formula.querySelectorAll<MathMLElement>("[data-css]")) {
    for (const each of element.dataset.css!.split(";")) {
      const [name, value] = each.split(":");
      if (name && value) element.style.setProperty(name, value);
    }
    delete element.dataset.css;
  }
  // Too wide for a line or too high: scrolled in a block of its own.
  const { scrollWidth, clientWidth, scrollHeight, clientHeight } = formula;
  const isClipped = scrollWidth > clientWidth + 8 || scrollHeight > clientHeight + 24;
  if ("inline" in formula.dataset && isClipped) formula.classList.add("wide");
}
