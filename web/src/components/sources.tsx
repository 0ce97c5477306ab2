/** Where an answer is from: the passage in its document, and how it was found. */

import { useEffect, useState } from "preact/hooks";
import { getJson, type Citation, type Hit, type Retrieval, type SourceText } from "../api";
import { number, t } from "../i18n";
import { Dialog } from "./dialog";

export function place(each: { doc: string; page: number | null }): string {
  return each.page === null ? each.doc : `${each.doc}, ${t("pageNumber", { n: each.page })}`;
}

/** The document's text around the passage, which is marked and scrolled to. */
export function SourcePanel(props: {
  base: string;
  citation: Pick<Citation, "number" | "hash" | "start" | "end" | "doc" | "page" | "text">;
  onClose: () => void;
}) {
  const { base, citation } = props;
  const [source, setSource] = useState<SourceText | null>(null);
  const [problem, setProblem] = useState<string | null>(null);
  useEffect(() => {
    const where = `start=${citation.start}&end=${citation.end}&around=4000`;
    getJson<SourceText>(
      `/v1/knowledge_bases/${encodeURIComponent(base)}/documents/${citation.hash}?${where}`,
    ).then(setSource, (error) => setProblem(String(error.message)));
  }, [base, citation.hash, citation.start]);
  const mark = (element: HTMLElement | null) => element?.scrollIntoView({ block: "center" });
  // Offsets count characters, not JavaScript's halves of them.
  const letters = source ? [...source.text] : [];
  const from = source ? source.start - source.text_start : 0;
  const to = source ? source.end - source.text_start : 0;
  return (
    <Dialog title={place(citation)} side onClose={props.onClose}>
      {problem && <p class="problem">{problem}</p>}
      {source ? (
        <div class="source" tabindex={0}>
          {letters.slice(0, from).join("")}
          <mark ref={mark}>{letters.slice(from, to).join("")}</mark>
          {letters.slice(to).join("")}
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
              <b>{hit.number ?? i + 1}</b> {[place(hit), ...hit.headings].join(" › ")}
            </span>
            <span class="legs">
              {(["lexical", "dense"] as const).map((leg) => {
                const found = hit.legs[leg];
                return (
                  <span key={leg} class={found ? `leg ${leg}` : "leg none"}>
                    {t(leg)} {found ? `#${found.rank} · ${number(found.score, 3)}` : "–"}
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
    <Dialog title={t("howFound")} side onClose={props.onClose}>
      <h3>{t("question")}</h3>
      <p class="asked">{retrieval.query}</p>
      {!retrieval.found && <p class="note">{t("notFound")}</p>}
      <h3>{t("passages")}</h3>
      <HitList hits={retrieval.hits} onOpen={props.onOpen} />
      {retrieval.left_out > 0 && <p class="note">{t("leftOut", { n: retrieval.left_out })}</p>}
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
