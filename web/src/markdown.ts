/**
 * A model's Markdown as safe HTML: raw HTML becomes text, links are limited to http, https and
 * mailto, and images are never loaded, since a request could leak what the model has read
 * (CVE-2025-32711).
 */

import DOMPurify from "dompurify";
import { Marked, type Tokens } from "marked";
import { t } from "./i18n";

function escapeHtml(text: string): string {
  return text.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);
}

/** The URL if it is safe to open, else null. */
export function safeUrl(text: string): string | null {
  try {
    const url = new URL(text);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

// A formula on its own lines is a block; otherwise a line of it that starts with - would be a list.
const environment = String.raw`\\begin\{(?<name>(?:align|alignat|equation|gather|multline|eqnarray)\*?)\}[\s\S]+?\\end\{\k<name>\}`;
const math = [
  { name: "display", level: "block", start: /^ {0,3}\\begin\{/m, rule: new RegExp(`^ {0,3}(?<body>${environment})[ \\t]*(?:\\n|$)`) },
  { name: "display", level: "inline", start: /\\begin\{/, rule: new RegExp(`^(?<body>${environment})`) },
  { name: "display", level: "block", start: /^ {0,3}(?:\$\$|\\\[)/m, rule: /^ {0,3}(?:\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\])[ \t]*(?:\n|$)/ },
  { name: "display", level: "inline", start: /\$\$|\\\[/, rule: /^(?:\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\])/ },
  { name: "inline", level: "inline", start: /\$|\\\(/, rule: /^(?:\$(?![\s$])([^$\n]*[^$\s\\])\$(?!\d)|\\\((.+?)\\\))/ },
];

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }: Tokens.HTML | Tokens.Tag) => escapeHtml(text),
    image: ({ href, text }: Tokens.Image) => {
      const label = escapeHtml(`[${t("image")}: ${text || href}]`);
      const url = safeUrl(href);
      return url === null ? label : anchor(url, label);
    },
    link({ href, tokens }: Tokens.Link) {
      const inner = this.parser.parseInline(tokens);
      const url = safeUrl(href);
      return url === null ? inner : anchor(url, inner);
    },
    code: ({ text, lang }: Tokens.Code) => {
      const name = (lang ?? "").split(/\s/)[0] ?? "";
      return (
        `<div class="code"><div class="code-head"><span>${escapeHtml(name)}</span>` +
        `<button type="button" data-copy>${escapeHtml(t("copy"))}</button></div>` +
        `<pre tabindex="0"><code data-language="${escapeHtml(name)}">${escapeHtml(text)}</code></pre></div>`
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
      const body = match && (match.groups?.body ?? match[1] ?? match[2]);
      return match && body ? { type: `math-${level}-${name}`, raw: match[0], body } : undefined;
    },
    renderer: (token: Tokens.Generic) =>
      `<span class="math" data-${name}>${escapeHtml(token.body as string)}</span>`,
  })),
});

function anchor(url: string, inner: string): string {
  return `<a href="${escapeHtml(url)}" target="_blank" rel="noopener noreferrer nofollow">${inner}</a>`;
}

/**
 * The blocks of a text, so that finished ones need not be rendered again. `known` are the blocks of
 * an earlier prefix of the text. Only the last few of them can still change (a list may continue
 * after white space and a number), so a long answer is not parsed from its start for every token.
 */
export function blocks(text: string, known: readonly string[] = []): string[] {
  if (isTooDeep(text)) return [text];
  const stable = known.slice(0, -4);
  const prefix = stable.join("");
  if (!prefix || !text.startsWith(prefix)) return marked.lexer(text).map((token) => token.raw);
  return [...stable, ...marked.lexer(text.slice(prefix.length)).map((token) => token.raw)];
}

// Parsing takes quadratic time in the depth of quotes and lists, and layout has no room for them.
const TOO_DEEP = /^(?:[ \t]*>){20}|^(?:[ \t]{60}|\t{15})[ \t]*(?:[-*+]|\d+[.)])[ \t]/m;

function isTooDeep(text: string): boolean {
  return TOO_DEEP.test(text);
}

export function toHtml(text: string): string {
  const html = isTooDeep(text) ? `<p>${escapeHtml(text)}</p>` : marked.parse(text, { async: false });
  // Second line of defence, should the renderer let something through.
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
