import { expect, test } from "vitest";
import { bounded, toMathMl } from "../src/formulas";

/** Lengths in em of all attributes and styles. */
function lengths(mathml: string): number[] {
  const units = { em: 1, ex: 0.5, pt: 1 / 12, px: 1 / 16, mu: 1 / 18 };
  const values = [...mathml.matchAll(/(?:="|[: ])([+-]?[\d.]+)(em|ex|pt|px|mu)(?=[";\s])/g)];
  return values.map(([, digits, unit]) => Number(digits) * units[unit as keyof typeof units]);
}

const SIZES = ["99999em", "-99999em", "99999pt", "1e9em", "999999999999999999999em", "9999in", "9999cm", "9999mu", "9999ex"];
const COMMANDS = [
  "\\rule{SIZE}{SIZE}", "\\rule[SIZE]{1em}{SIZE}", "\\raisebox{SIZE}{x}", "\\kern SIZE x", "\\hspace{SIZE}x",
  "\\hskip SIZE x", "\\mkern SIZE x", "\\raise SIZE\\hbox{x}", "\\lower SIZE\\hbox{x}", "\\genfrac(){SIZE}{0}{a}{b}",
  "a \\above{SIZE} b", "\\smash{\\rule{1em}{SIZE}}", "\\mathllap{\\rule{SIZE}{SIZE}}", "\\phantom{\\rule{SIZE}{SIZE}}",
  "\\def\\a{\\rule{SIZE}{SIZE}}\\a", "\\begin{matrix}a\\\\[SIZE]b\\end{matrix}",
  "\\renewcommand{\\arraystretch}{9999}\\begin{matrix}a\\\\b\\end{matrix}", "\\Huge{\\Huge{\\Huge x}}",
]; // prettier-ignore

test("no command sets a length beyond the limits", () => {
  let rendered = 0;
  for (const command of COMMANDS) {
    for (const size of SIZES) {
      for (const display of [true, false]) {
        let mathml: string;
        try {
          mathml = toMathMl(command.replaceAll("SIZE", size), display);
        } catch {
          continue; // shown as text
        }
        rendered++;
        for (const length of lengths(mathml)) {
          expect(length, `${command} ${size}`).toBeLessThanOrEqual(20);
          expect(length, `${command} ${size}`).toBeGreaterThanOrEqual(-3);
        }
        expect(mathml).not.toContain(" style=");
      }
    }
  }
  expect(rendered).toBeGreaterThan(COMMANDS.length * 2);
});

test("usual lengths stay", () => {
  expect(toMathMl("a\\quad b\\,c\\!d", false)).toContain('width="1em"');
  expect(toMathMl("\\Bigg(", false)).toContain('minsize="3em"');
  expect(toMathMl("\\rule{2em}{1pt}", false)).toContain('width="2em"');
  expect(toMathMl("\\begin{align}a&=b\\end{align}", true)).toContain("tml-right");
  expect(toMathMl("\\textcolor{red}{x}", true)).toContain('data-css="color:#ff0000"');
  expect(toMathMl("\\boxed{x}", true)).toContain("border:1px solid");
});

test("styles are limited to what Temml needs", () => {
  const style = (text: string) => bounded(`<math style="${text}"></math>`);
  expect(style("position:fixed;top:0;left:0;z-index:99")).toBe('<math data-css="top:0;left:0"></math>');
  expect(style("background-image:url(https://a.example/x);color:url(x);width:9999vw")).toBe('<math data-css="width:0"></math>');
  expect(style("margin:-99em 99em;padding:2em")).toBe('<math data-css="margin:-3em 20em;padding:2em"></math>');
  expect(style("border-top:999px solid")).toBe('<math data-css="border-top:1em solid"></math>');
});

test("text that looks like an attribute is not changed", () => {
  const mathml = toMathMl('\\text{ width="99em" style="x"}', false);
  expect(mathml.replaceAll("\u00a0", " ")).toContain("width=&quot;99em&quot; style=&quot;x&quot;");
});

test("formulas that are too long, too deep or grow too far are refused", () => {
  const bombs = [
    "x".repeat(5001),
    "\\frac{1}{".repeat(200) + "x" + "}".repeat(200),
    "\\sqrt{".repeat(500) + "x" + "}".repeat(500),
    "\\def\\a{\\a}\\a",
    "\\def\\a{xxxxxxxxxx}\\def\\b{\\a\\a\\a\\a\\a\\a\\a\\a\\a\\a}\\def\\c{\\b\\b\\b\\b\\b\\b\\b\\b\\b\\b}\\def\\d{\\c\\c\\c\\c\\c\\c\\c\\c}\\d\\d",
    `\\def\\a{${"x+".repeat(1500)}}${"\\a".repeat(900)}`,
    `\\newcommand{\\a}{${"x+".repeat(1500)}}${"\\a".repeat(600)}`,
    `\\let\\z\\a\\gdef\\a{${"x+".repeat(1500)}}${"\\a".repeat(600)}`,
  ];
  for (const source of bombs) expect(() => toMathMl(source, true), source.slice(0, 40)).toThrow();
});

test("macros are allowed", () => {
  expect(toMathMl("\\newcommand{\\Q}{\\mathbb{R}}x \\in \\Q^n", false)).toContain("ℝ");
});
