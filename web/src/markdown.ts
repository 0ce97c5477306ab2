/**
 * A model's Markdown as HTML that can do no harm: raw HTML is text, links go only to http, https
 * and mailto, and no image is ever loaded, since fetching one could carry what was read to a
 * stranger (CVE-2025-32711).
 */

import DOMPurify from "dompurify";
import { Marked, type Tokens } from "marked";
import { t } from "./i18n";

function escaped(text: string): string {
  return text.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);
}

/** Only addresses that a click may open. */
export function harmless(address: string): string | null {
  try {
    const url = new URL(address);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

// A formula that stands by itself is a block, or a line of it that begins with - would be a list.
const math = [
  { name: "display", level: "block", start: /^ {0,3}(?:\$\$|\\\[)/m, rule: /^ {0,3}(?:\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\])[ \t]*(?:\n|$)/ },
  { name: "display", level: "inline", start: /\$\$|\\\[/, rule: /^(?:\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\])/ },
  { name: "inline", level: "inline", start: /\$|\\\(/, rule: /^(?:\$(?![\s$])([^$\n]*[^$\s\\])\$(?!\d)|\\\((.+?)\\\))/ },
];

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }: Tokens.HTML | Tokens.Tag) => escaped(text),
    image: ({ href, text }: Tokens.Image) => {
      const shown = escaped(`[${t("image")}: ${text || href}]`);
      const address = harmless(href);
      return address === null ? shown : anchor(address, shown);
    },
    link({ href, tokens }: Tokens.Link) {
      const inner = this.parser.parseInline(tokens);
      const address = harmless(href);
      return address === null ? inner : anchor(address, inner);
    },
    code: ({ text, lang }: Tokens.Code) => {
      const name = (lang ?? "").split(/\s/)[0] ?? "";
      return (
        `<div class="code"><div class="code-head"><span>${escaped(name)}</span>` +
        `<button type="button" data-copy>${escaped(t("copy"))}</button></div>` +
        `<pre tabindex="0"><code data-language="${escaped(name)}">${escaped(text)}</code></pre></div>`
      );
    },
    table(token: Tokens.Table) {
      const cell = (each: Tokens.TableCell) => {
        const tag = each.header ? "th" : "td";
        const align = each.align ? ` class="align-${each.align}"` : "";
        return `<${tag}${align}>${this.parser.parseInline(each.tokens)}</${tag}>`;
      };
      const row = (cells: Tokens.TableCell[]) => `<tr>${cells.map(cell).join("")}</tr>`;
      const body = token.rows.map(row).join("");
      return `<div class="table" tabindex="0"><table><thead>${row(token.header)}</thead><tbody>${body}</tbody></table></div>`;
    },
  },
  extensions: math.map(({ name, level, start, rule }) => ({
    name: `math-${level}-${name}`,
    level,
    start: (source: string) => {
      const at = source.search(start);
      return at < 0 ? undefined : at;
    },
    tokenizer: (source: string) => {
      const match = rule.exec(source);
      const body = match && (match[1] ?? match[2]);
      return match && body ? { type: `math-${level}-${name}`, raw: match[0], body } : undefined;
    },
    renderer: (token: Tokens.Generic) =>
      `<span class="math" data-${name}>${escaped(token.body as string)}</span>`,
  })),
});

function anchor(address: string, inner: string): string {
  return `<a href="${escaped(address)}" target="_blank" rel="noopener noreferrer nofollow">${inner}</a>`;
}

/**
 * The blocks of a text, so that those that are finished need not be drawn again. `known`: those of
 * its beginning, from a moment ago; only the last few of them can still change (a list waits behind
 * white space and a number for its next entry), so a long answer is not read from its start with
 * every token.
 */
export function blocks(text: string, known: readonly string[] = []): string[] {
  const kept = known.slice(0, -4);
  const begun = kept.join("");
  if (!begun || !text.startsWith(begun)) return marked.lexer(text).map((token) => token.raw);
  return [...kept, ...marked.lexer(text.slice(begun.length)).map((token) => token.raw)];
}

export function toHtml(text: string): string {
  const html = marked.parse(text, { async: false });
  // A second wall: what the renderer lets through by mistake is taken out here.
  return DOMPurify.sanitize(html, {
    ALLOWED_TAGS: [
      "a", "b", "blockquote", "br", "button", "code", "del", "div", "em", "h1", "h2", "h3", "h4",
      "h5", "h6", "hr", "input", "li", "ol", "p", "pre", "span", "strong", "table", "tbody", "td",
      "th", "thead", "tr", "ul",
    ],
    ALLOWED_ATTR: [
      "class", "href", "target", "rel", "type", "start", "tabindex", "checked", "disabled",
      "data-copy", "data-language", "data-display", "data-inline",
    ],
    ADD_ATTR: ["target"],
  });
}
