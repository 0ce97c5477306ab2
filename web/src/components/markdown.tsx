import { memo } from "./memo";
import { useLayoutEffect, useMemo, useRef } from "preact/hooks";
import type { Citation } from "../api";
import { decorate } from "../decorate";
import { language, t } from "../i18n";
import { blocks, toHtml } from "../markdown";
import { copyText } from "../platform";

const MARKER = /\[(\d{1,3})\]/;

/** One block, rendered again only when its text changes, so that long answers stay smooth. */
const Block = memo(function Block(props: {
  text: string;
  finished: boolean;
  numbers: string;
  onCite: (number: number) => void;
}) {
  const element = useRef<HTMLDivElement>(null);
  const html = useMemo(() => toHtml(props.text), [props.text, language.value]);
  useLayoutEffect(() => {
    const { current } = element;
    if (current === null) return;
    current.innerHTML = html;
    nameCheckboxes(current);
    isolateDirections(current);
    if (props.numbers) addCitationButtons(current, new Set(props.numbers.split(",").map(Number)), props.onCite);
    if (props.finished) void decorate(current);
  }, [html, props.finished, props.numbers]);
  return <div ref={element} />;
});

export function Markdown(props: {
  text: string;
  finished: boolean;
  citations?: Citation[] | null;
  onCite?: (citation: Citation) => void;
}) {
  const known = useRef<string[]>([]);
  // When finished, parse the whole again: a link may be defined far below its use.
  const parts = useMemo(
    () => (known.current = blocks(props.text, props.finished ? [] : known.current)),
    [props.text, props.finished],
  );
  const citations = props.citations ?? [];
  const numbers = citations.map((each) => each.number).join(",");
  const onCite = (number: number) => {
    const citation = citations.find((each) => each.number === number);
    if (citation) props.onCite?.(citation);
  };
  const copy = async (event: MouseEvent) => {
    const button = (event.target as HTMLElement).closest<HTMLElement>("[data-copy]");
    if (button === null) return;
    const code = button.closest(".code")?.querySelector("code")?.textContent ?? "";
    await copyText(code);
    button.textContent = t("copied");
    setTimeout(() => (button.textContent = t("copy")), 1500);
  };
  return (
    <div class="markdown" onClick={copy}>
      {parts.map((part, i) => (
        <Block
          key={i}
          text={part}
          finished={props.finished || i < parts.length - 1}
          numbers={numbers}
          onCite={onCite}
        />
      ))}
    </div>
  );
}

/** A task's box is named after its text. */
function nameCheckboxes(root: HTMLElement): void {
  for (const box of root.querySelectorAll("input[type=checkbox]")) {
    const item = box.closest("li")?.cloneNode(true) as HTMLElement | undefined;
    for (const nested of item?.querySelectorAll("ul, ol, pre") ?? []) nested.remove();
    box.setAttribute("aria-label", item?.textContent?.trim() || t("task"));
  }
}

/** Right-to-left text in a text of the other direction, and the reverse. */
function isolateDirections(root: HTMLElement): void {
  for (const block of root.querySelectorAll("p, li, td, th, h1, h2, h3, h4, h5, h6")) {
    block.setAttribute("dir", "auto");
  }
}

/** Turn [1] into a button, except in code and formulas. */
function addCitationButtons(root: HTMLElement, known: Set<number>, onCite: (number: number) => void): void {
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  const texts: Text[] = [];
  while (walker.nextNode()) {
    const text = walker.currentNode as Text;
    if (!text.parentElement?.closest("code, .math")) texts.push(text);
  }
  for (let text of texts) {
    for (let match = MARKER.exec(text.data); match; match = MARKER.exec(text.data)) {
      const number = Number(match[1]);
      const rest = text.splitText(match.index + match[0].length);
      if (known.has(number)) {
        const button = document.createElement("button");
        button.type = "button";
        button.className = "cite";
        button.textContent = String(number);
        button.setAttribute("aria-label", t("source", { n: number }));
        button.addEventListener("click", () => onCite(number));
        text.data = text.data.slice(0, match.index);
        text.after(button);
      }
      text = rest;
    }
  }
}
