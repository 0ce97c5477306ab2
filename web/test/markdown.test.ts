import { expect, test, vi } from "vitest";

// Node has neither a document nor a language; what is tested here needs none.
vi.mock("dompurify", () => ({ default: { sanitize: (html: string) => html } }));
vi.mock("../src/i18n", () => ({ t: (key: string) => key }));
const { blocks, harmless, toHtml } = await import("../src/markdown");

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

test("blocks of a growing text are those of the whole", () => {
  let known: string[] = [];
  for (let end = 1; end <= TEXT.length; end++) {
    known = blocks(TEXT.slice(0, end), known);
    expect(known).toEqual(blocks(TEXT.slice(0, end)));
  }
});

test("a text that turned out otherwise is read anew", () => {
  const known = blocks("one\n\ntwo\n\nthree\n\nfour");
  expect(blocks("else\n\nwhere", known)).toEqual(blocks("else\n\nwhere"));
});

test("a formula by itself is no list, and money is no formula", () => {
  expect(toHtml("$$\na\n- b\n$$")).toContain('<span class="math" data-display>');
  expect(toHtml("$$\na\n- b\n$$")).not.toContain("<li>");
  expect(toHtml("it costs $5 and $6")).not.toContain("math");
  expect(toHtml("so $x^2$ it is")).toContain('<span class="math" data-inline>x^2</span>');
});

test("only addresses that a click may open", () => {
  expect(harmless("https://a.example/b")).toBe("https://a.example/b");
  for (const bad of ["javascript:alert(1)", "data:text/html,x", "/v1/models", "file:///etc/x", ""]) {
    expect(harmless(bad)).toBeNull();
  }
});
