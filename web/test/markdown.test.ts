import { expect, test, vi } from "vitest";

// Node has neither a document nor a language; these tests need none.
vi.mock("dompurify", () => ({ default: { sanitize: (html: string) => html } }));
vi.mock("../src/i18n", () => ({ t: (key: string) => key }));
const { blocks, safeUrl, toHtml } = await import("../src/markdown");

const TEXT = `# One

A paragraph
of two lines.

- a
- b

  still b

| x | y |
|---|---|
| 1 | 2 |

\`\`\`python
def f():

    return 1
\`\`\`

$$
a
- b
$$

1. one

2. two
> quote
`;

test("blocks of a growing text equal those of the whole", () => {
  let known: string[] = [];
  for (let end = 1; end <= TEXT.length; end++) {
    known = blocks(TEXT.slice(0, end), known);
    expect(known).toEqual(blocks(TEXT.slice(0, end)));
  }
});

test("a changed text is parsed again", () => {
  const known = blocks("one\n\ntwo\n\nthree\n\nfour");
  expect(blocks("else\n\nwhere", known)).toEqual(blocks("else\n\nwhere"));
});

test("display formulas are not lists, and prices are not formulas", () => {
  expect(toHtml("$$\na\n- b\n$$")).toContain('<span class="math" data-display>');
  expect(toHtml("$$\na\n- b\n$$")).not.toContain("<li>");
  expect(toHtml("it costs $5 and $6")).not.toContain("math");
  expect(toHtml("so $x^2$ it is")).toContain('<span class="math" data-inline>x^2</span>');
});

test("only safe URLs are links", () => {
  expect(safeUrl("https://a.example/b")).toBe("https://a.example/b");
  for (const bad of ["javascript:alert(1)", "data:text/html,x", "/v1/models", "file:///etc/x", ""]) {
    expect(safeUrl(bad)).toBeNull();
  }
});
