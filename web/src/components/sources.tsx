/** Sources of an answer: the passage in its document, and the retrieval details. */

import { useEffect, useState } from "preact/hooks";
import { getJson, type Citation, type Hit, type Retrieval, type SourceText } from "../api";
import { explain } from "../chat/state";
import { number, t } from "../i18n";
import { Dialog } from "./dialog";

type Source = Pick<Citation, "doc" | "page" | "page_end" | "line" | "line_end">;

/** The document, with pages or lines where they are known. */
export function sourceLabel(each: Source): string {
  const { doc, page, page_end, line, line_end } = each;
  if (page !== null) return t("placeIn", { doc, place: span("page", page, page_end) });
  if (line != null) return t("placeIn", { doc, place: span("line", line, line_end) });
  return doc;
}

function span(unit: "page" | "line", first: number, last?: number | null): string {
  if (last == null || last === first) return t(`${unit}Number`, { n: first });
  return t(`${unit}Range`, { first, last });
}

/** The text around a passage, which is highlighted and scrolled into view. */
export function SourcePanel(props: {
  knowledgeBase: string;
  citation: Source & Pick<Citation, "number" | "hash" | "start" | "end" | "text">;
  onClose: () => void;
}) {
  const { knowledgeBase, citation } = props;
  const [source, setSource] = useState<SourceText | null>(null);
  const [problem, setProblem] = useState<string | null>(null);
  useEffect(() => {
    const range = `start=${citation.start}&end=${citation.end}&around=4000`;
    getJson<SourceText>(
      `/v1/knowledge_bases/${encodeURIComponent(knowledgeBase)}/documents/${citation.hash}?${range}`,
    ).then(setSource, (error) => setProblem(explain(error)));
  }, [knowledgeBase, citation.hash, citation.start]);
  const mark = (element: HTMLElement | null) => element?.scrollIntoView({ block: "center" });
  // Offsets count code points; JavaScript strings count UTF-16 code units.
  const characters = source ? [...source.text] : [];
  const from = source ? source.start - source.text_start : 0;
  const to = source ? source.end - source.text_start : 0;
  return (
    <Dialog title={sourceLabel(citation)} side onClose={props.onClose}>
      {problem && <p class="problem">{problem}</p>}
      {source ? (
        <div class="source" tabindex={0}>
          {characters.slice(0, from).join("")}
          <mark ref={mark}>{characters.slice(from, to).join("")}</mark>
          {characters.slice(to).join("")}
        </div>
      ) : (
        !problem && <div class="source">{citation.text}</div>
      )}
    </Dialog>
  );
}

export function HitList(props: { hits: Hit[]; onOpen: (hit: Hit) => void }) {
  return (
    <ol class="hits">
      {props.hits.map((hit, i) => (
        <li key={`${hit.hash}-${hit.start}`}>
          <button type="button" class="hit" onClick={() => props.onOpen(hit)}>
            <span class="hit-title">
              <b>{hit.number ?? i + 1}</b> {[sourceLabel(hit), ...hit.headings].join(" › ")}
            </span>
            <span class="legs">
              {(["lexical", "dense"] as const).map((leg) => {
                const result = hit.legs[leg];
                return (
                  <span key={leg} class={result ? `leg ${leg}` : "leg none"}>
                    {t(leg)} {result ? `#${result.rank} · ${number(result.score, 3)}` : "–"}
                  </span>
                );
              })}
              <span class="leg">
                {t("score")} {number(hit.score, 4)}
              </span>
            </span>
            <span class="hit-text">{hit.text.trim().replace(/\n{2,}/g, "\n")}</span>
          </button>
        </li>
      ))}
    </ol>
  );
}

export function Inspector(props: {
  retrieval: Retrieval;
  onOpen: (hit: Hit) => void;
  onClose: () => void;
}) {
  const { retrieval } = props;
  return (
    <Dialog title={t("retrievalDetails")} side onClose={props.onClose}>
      <h3>{t("searchQuery")}</h3>
      <p class="query">{retrieval.query}</p>
      {!(retrieval.asked ?? retrieval.found) && <p class="note">{t("noPassages")}</p>}
      <h3>{t("passages")}</h3>
      <HitList hits={retrieval.hits} onOpen={props.onOpen} />
      {retrieval.left_out > 0 && <p class="note">{t("passagesOmitted", { n: retrieval.left_out })}</p>}
      {retrieval.prompt !== null && (
        <details>
          <summary>{t("promptSent")}</summary>
          <pre class="prompt" tabindex={0}>
            {retrieval.prompt}
          </pre>
        </details>
      )}
    </Dialog>
  );
}
