import { memo } from "./memo";
import { useLayoutEffect, useMemo, useRef } from "preact/hooks";
import type { Citation } from "../api";
import { decorate } from "../decorate";
import { language, t } from "../i18n";
import { blocks, toHtml } from "../markdown";
import { copyText } from "../platform";

const MARKER = /\[(\d{1,3})\]/;

/** One block: made anew only when its text changes, so a long answer stays smooth. */
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
    if (props.numbers) cite(current, new Set(props.numbers.split(",").map(Number)), props.onCite);
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
  // In the end once more as a whole: a definition of a link may stand far below its use.
  const parts = useMemo(
    () => (known.current = blocks(props.text, props.finished ? [] : known.current)),
    [props.text, props.finished],
  );
  const citations = props.citations ?? [];
  const numbers = citations.map((each) => each.number).join(",");
  const onCite = (number: number) => {
    const found = citations.find((each) => each.number === number);
    if (found) props.onCite?.(found);
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

/** Turn [1] into a button, in the text alone: not in code. */
function cite(root: HTMLElement, known: Set<number>, onCite: (number: number) => void): void {
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
